"""Declares the torchvision operators that a CPU build of torch does not have, when torchvision is imported.

The ``.pth`` file beside this module imports it in every interpreter of the environment, worker processes
included. It imports nothing but ``sys`` then: the rest waits for torchvision.

torchvision first loads its compiled operators and, where that fails (a CUDA build beside a CPU build of
torch), goes on without them, until ``torchvision._meta_registrations`` annotates ``nms`` and ``qnms``. The
hook acts at that module's import: late enough to know that the compiled operators are missing, early
enough to declare the two. It declares signatures only. Calling such an operator is still refused by
torchvision in its own words, and its image transforms, which are plain torch, work.
"""

import sys

_BEFORE = "torchvision._meta_registrations"
_SIGNATURES = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# torch forgets a declaration when the object that made it is collected.
_libraries: list[object] = []


def declare_missing() -> None:
    """Declare those of torchvision's two annotated operators that torch lacks; nothing on a CUDA build."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    missing = [name for name in _SIGNATURES if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SIGNATURES[name])
    _libraries.append(library)


class TorchvisionImport:
    """Import hook that finds no module: it only notices one being looked for."""

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> None:
        """Declare the operators when torchvision is about to annotate them; always None, "not mine"."""
        if fullname == _BEFORE:
            declare_missing()


sys.meta_path.insert(0, TorchvisionImport)
