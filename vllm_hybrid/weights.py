"""The weight files of a checkpoint: which they are, whether they are whole, and whether they fit its shape.

Only headers are read, so that a checkpoint of any size is checked at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import check_present, read_json_object

INDEX = "model.safetensors.index.json"
# Names as published, and as transformers saves them since 4.52. vLLM's LLaVA reads both.
_NEW_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
TOWER = "model.vision_tower."
# Releases differ in whether the tower has this inner part; what lies in it is the same.
_INNER_TOWER = "vision_model."
# A buffer that older releases saved. It holds 0, 1, 2, ... and is not read.
POSITION_IDS = f"{TOWER}embeddings.position_ids"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its name there, and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


def weight_files(checkpoint: str | Path) -> list[Path]:
    """The safetensors files that vLLM loads: those of the checkpoint's index, or else all there are.

    Raises:
        ValueError: there is none, the index is broken, or a file that it names is missing.

    """
    folder = Path(checkpoint)
    index = folder / INDEX
    if index.is_symlink() or index.is_file():
        files = sorted({folder / name for name in _weight_map(index).values()})
    else:
        # A dangling link has a place in the list, so that it is named. Hidden files vLLM does not see.
        files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} has no safetensors weights; give a complete checkpoint that has them")
    for file in files:
        check_present(file)
    return files


def stored_tensors(checkpoint: str | Path) -> dict[str, StoredTensor]:
    """The tensors of the weight files by their newer names, the tower's without "vision_model.".

    Raises:
        ValueError: a file is missing or damaged, or lacks a tensor that the index promises.

    """
    folder = Path(checkpoint)
    files = weight_files(folder)
    headers = {file: _header(file) for file in files}
    if (folder / INDEX).is_file():
        for tensor, name in _weight_map(folder / INDEX).items():
            if tensor not in headers[folder / name]:
                raise ValueError(
                    f"{folder / name} lacks {tensor}, which {INDEX} promises; fetch both again, or repair "
                    "the index"
                )
    return {
        newer_name(name): StoredTensor(file, name, shape)
        for file, header in headers.items()
        for name, shape in header.items()
    }


def newer_name(name: str) -> str:
    """A weight's name as transformers saves it since 4.52, the tower's without "vision_model."."""
    for old, new in _NEW_NAMES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.startswith(TOWER):
        name = TOWER + name.removeprefix(TOWER).removeprefix(_INNER_TOWER)
    return name


def check_weights(
    checkpoint: str | Path, config: Any, *, always_tower: bool = False
) -> dict[str, StoredTensor]:
    """See that the weight files are whole and hold what the configuration asks for.

    Args:
        checkpoint: its folder.
        config: a ``LlavaConfig``. Where it names a quantisation, tensors have other names and shapes, and
            are not compared with it.
        always_tower: compare the vision tower's tensors also then.

    Returns:
        What is stored, see :func:`stored_tensors`.

    Raises:
        ValueError: the first fault, in one sentence.

    """
    stored = stored_tensors(checkpoint)
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised and not always_tower:
        return stored
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if not quantised or name.startswith(TOWER):
            _check_tensor(checkpoint, name, shape, stored.get(name))
    # A tower that is deeper than its configuration says would give features of another layer.
    for name, found in stored.items():
        if name.startswith(TOWER) and name not in expected and name != POSITION_IDS:
            raise ValueError(
                f"{found.file} has a vision tower weight {found.name}, which config.json does not ask for; "
                "give a checkpoint whose config.json belongs to it"
            )
    return stored


def _check_tensor(
    checkpoint: str | Path, name: str, shape: tuple[int, ...], found: StoredTensor | None
) -> None:
    if found is None:
        raise ValueError(
            f"{checkpoint} lacks the weight {name}, which its config.json asks for; give a complete "
            "checkpoint whose config.json belongs to it"
        )
    if found.shape != shape:
        raise ValueError(
            f"{found.name} in {found.file} has shape {list(found.shape)}, but config.json asks for "
            f"{list(shape)}; give a checkpoint whose config.json belongs to it"
        )


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a LLaVA model by their newer names, the tower's without "vision_model.".

    Args:
        config: a ``LlavaConfig``.

    Raises:
        ValueError: no model can have it.

    """
    import torch
    from transformers import LlavaForConditionalGeneration

    plain = copy.deepcopy(config)
    # Shapes depend on neither. An attention that a checkpoint names need not be installed, and old
    # configurations have -1 for a padding token.
    plain._attn_implementation = "eager"
    plain.text_config.pad_token_id = None
    try:
        with torch.device("meta"):
            state = LlavaForConditionalGeneration(plain).state_dict()
    except Exception as error:  # whatever a nonsensical size makes of some layer
        raise ValueError(
            f"config.json describes no model that can be built ({_one_line(error)}); give another checkpoint"
        ) from error
    shapes = {newer_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    shapes.pop(POSITION_IDS, None)
    if config.tie_word_embeddings or config.text_config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor, as an index has them."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f"{index} has no weight_map; fetch it again, or remove it if there is one weight file"
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} has {name!r} as the file of {tensor}; give the name of a safetensors file beside it"
            )
    return names


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name. The library compares the file's length with what the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off or damaged ({_one_line(error)}); fetch it again") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
