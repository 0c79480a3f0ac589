"""FastV's choice: which image tokens the upper layers still see (arXiv 2403.06764, section 4.1)."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch


def select_tokens(importance: torch.Tensor, lengths: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Keep each image's most important tokens; the host does not wait for the device.

    Args:
        importance: float [tokens], all images' live tokens one after the other; no NaN.
        lengths: int64 [images], live tokens of each image.
        kept: int64 [images], how many to keep of each, see :func:`live_to_kept`.

    Returns:
        bool [tokens]: each image's most important, ties to the earlier token.

    """
    device = importance.device
    tokens = importance.shape[0]
    image = torch.arange(lengths.shape[0], device=device).repeat_interleave(lengths, output_size=tokens)
    by_importance = importance.argsort(descending=True, stable=True)
    order = by_importance[image[by_importance].argsort(stable=True)]
    place = torch.arange(tokens, device=device) - (lengths.cumsum(0) - lengths)[image]
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    keep[order] = place < kept[image]
    return keep


@functools.lru_cache(maxsize=1 << 16)
def live_to_kept(live: int, ratio: float) -> int:
    """Image tokens FastV keeps of ``live``: ceil((1 - ratio) * live), at least 1 (FastV, section 4.1).

    The ratio counts as the decimal it was written as, so that 0.9 of 10 leaves 1, not 2.
    """
    return max(1, math.ceil((1 - Fraction(repr(float(ratio)))) * live))
