"""The image processor that a checkpoint names: what turns pictures into the vision tower's pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from .sentences import one_line

# Wide and tall: a processor that keeps pictures' proportions shows.
_PROBES = ((48, 32), (32, 48))


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


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
