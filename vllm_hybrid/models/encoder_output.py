"""How an image's live tokens travel through vLLM's encoder cache: features, and who owns each patch.

Both model runners insist on one row per placeholder. The live tokens' features fill the first rows; two
channels behind the features carry, for every patch, the live token that owns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# bf16 holds integers exactly only up to 256, so a patch's owner travels as two digits of this base.
_OWNER_BASE = 128
_OWNER_CHANNELS = 2


def encode(features: torch.Tensor, owner: torch.Tensor) -> list[torch.Tensor]:
    """Encoder outputs of some images.

    Args:
        features: [images, patches, C], the live tokens' in the first rows of each image.
        owner: int64 [images, patches], the live token that holds each patch; below 128 * 128.

    Returns:
        For each image [patches, C + 2].

    """
    digits = torch.stack([owner // _OWNER_BASE, owner % _OWNER_BASE], dim=-1)
    return list(torch.cat([features, digits.to(features.dtype)], dim=-1))


def decode(outputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The features [patches, C] of each output, a view, and int64 [images, patches] owners; no round trip."""
    owner = torch.stack([output[:, -_OWNER_CHANNELS:] for output in outputs])
    high, low = owner.long().unbind(-1)
    return [output[:, :-_OWNER_CHANNELS] for output in outputs], high * _OWNER_BASE + low


def check(outputs: Sequence[torch.Tensor], patches: int, channels: int) -> None:
    """Refuse what is not a whole encoder output.

    Args:
        outputs: of the images of a step.
        patches: patches of an image.
        channels: channels of the features, C.

    Raises:
        RuntimeError: an image is not whole, or an output does not say who owns its patches.

    """
    lengths = {output.shape[0] for output in outputs}
    if lengths != {patches}:
        raise RuntimeError(
            f"a step holds image pieces of {sorted(lengths)} rows, not whole images of {patches}; "
            "the scheduler must not split images"
        )
    width = channels + _OWNER_CHANNELS
    widths = {output.shape[1] for output in outputs}
    if widths != {width}:
        raise RuntimeError(
            f"a step holds encoder outputs of width {sorted(widths)}, not {width}: they do not say which "
            "patches their rows own"
        )
