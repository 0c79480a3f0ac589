"""How an image's live tokens travel through vLLM's encoder cache: features, who owns each patch, the level.

Both model runners insist on one row per placeholder. The live tokens' features fill the first rows; two
channels behind the features carry, for every patch, the live token that owns it, and a third the number of
the level at which the image was encoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# bf16 holds integers exactly only up to 256, so a patch's owner travels as two digits of this base.
_OWNER_BASE = 128
_CHANNELS = 3


def encode(features: torch.Tensor, owner: torch.Tensor, level: torch.Tensor) -> list[torch.Tensor]:
    """Encoder outputs of some images.

    Args:
        features: [images, patches, C], the live tokens' in the first rows of each image.
        owner: int64 [images, patches], the live token that holds each patch; below 128 * 128.
        level: int64 [images], number of each image's level; up to 256.

    Returns:
        For each image [patches, C + 3].

    """
    numbers = [owner // _OWNER_BASE, owner % _OWNER_BASE, level[:, None].expand_as(owner)]
    return list(torch.cat([features, torch.stack(numbers, dim=-1).to(features.dtype)], dim=-1))


def decode(outputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What encoder outputs carry; no round trip to the device.

    Args:
        outputs: of :func:`encode`.

    Returns:
        The features [patches, C] of each, a view; int64 [images, patches], the owner of each patch; int64
        [images], numbers of their levels.

    """
    numbers = torch.stack([output[:, -_CHANNELS:] for output in outputs])
    high, low, level = numbers.long().unbind(-1)
    return [output[:, :-_CHANNELS] for output in outputs], high * _OWNER_BASE + low, level[:, 0]


def check(outputs: Sequence[torch.Tensor], patches: int, channels: int) -> None:
    """Refuse what is not a whole encoder output.

    Args:
        outputs: of the images of a step.
        patches: patches of an image.
        channels: channels of the features, C.

    Raises:
        RuntimeError: an image is not whole, or an output does not say who owns its patches and its level.

    """
    lengths = {output.shape[0] for output in outputs}
    if lengths != {patches}:
        raise RuntimeError(
            f"a step holds image pieces of {sorted(lengths)} rows, not whole images of {patches}; "
            "the scheduler must not split images"
        )
    width = channels + _CHANNELS
    widths = {output.shape[1] for output in outputs}
    if widths != {width}:
        raise RuntimeError(
            f"a step holds encoder outputs of width {sorted(widths)}, not {width}: they do not say which "
            "patches their rows own"
        )
