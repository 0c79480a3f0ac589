"""The image processor that a checkpoint names: what turns pictures into the vision tower's pixels.

On the way to the tower's square it may make much larger pictures: one of 1 x 1 000 000 pixels has to be
336 x 336 000 000 before its middle is cut out, and one call would take all memory there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_hybrid.errors import one_line

# Wide and tall: a processor that keeps pictures' proportions shows.
_PROBES = ((48, 32), (32, 48))
_SIZES = ("size", "crop_size", "pad_size")
_GROUPS = ("common_kwargs", "images_kwargs")
_STEPS = ("do_pad", "do_resize", "do_center_crop")


def load_image_processor(checkpoint: str | Path, image_size: int) -> Any:
    """Load the image processor as vLLM's LLaVA does: the checkpoint says which, and with which settings.

    Args:
        checkpoint: the checkpoint's folder.
        image_size: side of the square that the vision tower takes, in pixels.

    Returns:
        A transformers image processor.

    Raises:
        ValueError: there is none, it cannot be loaded, or what it makes does not fit the tower.

    """
    # LlavaProcessor, which vLLM loads, takes this for its image processor too; text needs no loading here.
    from transformers import AutoImageProcessor

    probes = [Image.new("RGB", size) for size in _PROBES]
    try:
        processor = AutoImageProcessor.from_pretrained(str(checkpoint), trust_remote_code=False)
        made = [tuple(processor(images=[p], return_tensors="pt")["pixel_values"][0].shape) for p in probes]
    except Exception as error:  # Which one depends on what is wrong in its file.
        raise ValueError(
            f"the image processor of {checkpoint} cannot be loaded ({one_line(error)}); "
            "repair its preprocessor_config.json or processor_config.json"
        ) from error
    wanted = (3, image_size, image_size)
    for shape in made:
        if shape != wanted:
            raise ValueError(
                f"the image processor of {checkpoint} makes {_text(shape)} values of a picture, but the "
                f"tower takes {_text(wanted)}; correct size and crop_size in its preprocessor_config.json"
            )
    return processor


def check_size(size: tuple[int, int], image_processor: Any, changes: Mapping[str, Any] | None = None) -> None:
    """Refuse a picture of which an image processor would make more pixels than vLLM reads.

    Args:
        size: width and height of the picture.
        image_processor: see :func:`load_image_processor`.
        changes: options of one call that replace those of the image processor.

    Raises:
        ValueError: it would, on its way to the tower's square.

    """
    from vllm import envs

    limit = envs.VLLM_MAX_IMAGE_PIXELS
    made = most_pixels(size, image_processor, changes)
    if 0 < limit < made:
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} grows to {made:.4g} pixels before it is cut to size, more "
            f"than VLLM_MAX_IMAGE_PIXELS={limit}; give one that is less narrow"
        )


def most_pixels(
    size: tuple[int, int], image_processor: Any, changes: Mapping[str, Any] | None = None
) -> float:
    """The most pixels that a picture has while an image processor pads, resizes and crops it.

    Args:
        size: width and height of the picture.
        image_processor: see :func:`load_image_processor`.
        changes: see :func:`check_size`.

    """
    given = _ungrouped(changes or {})
    settings = {name: given.get(name, getattr(image_processor, name, None)) for name in (*_SIZES, *_STEPS)}
    wanted, cropped, padded = (_sides(settings[name]) for name in _SIZES)
    width, height = map(float, size)
    largest = width * height
    if settings["do_pad"]:
        # To a square, or to what is named.
        width = height = max(width, height, *padded.values())
        largest = max(largest, width * height)
    if settings["do_resize"]:
        width, height = _resized(width, height, wanted)
        largest = max(largest, width * height)
    if settings["do_center_crop"]:
        # What is smaller is padded first.
        width, height = max(width, cropped["width"]), max(height, cropped["height"])
        largest = max(largest, width * height)
    return largest


def _resized(width: float, height: float, wanted: dict[str, float]) -> tuple[float, float]:
    if wanted["shortest_edge"]:
        scale = wanted["shortest_edge"] / max(1, min(width, height))
        return width * scale, height * scale
    return max(wanted["width"], wanted["longest_edge"]), max(wanted["height"], wanted["longest_edge"])


def _sides(size: Any) -> dict[str, float]:
    """A size as transformers takes it, 0 for what it does not name: what is no size, transformers refuses."""
    names = ("shortest_edge", "longest_edge", "width", "height")
    if isinstance(size, int | float):
        return dict.fromkeys(names, float(size))
    if isinstance(size, list | tuple):
        size = dict(zip(("height", "width"), size, strict=False))
    found = {name: _member(size, name) for name in names}
    return {name: float(side) if isinstance(side, int | float) else 0.0 for name, side in found.items()}


def _member(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _ungrouped(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call, also those that transformers' processors take in groups of their own."""
    flat = dict(options)
    for group in map(options.get, _GROUPS):
        flat |= group if isinstance(group, Mapping) else {}
    return flat


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
