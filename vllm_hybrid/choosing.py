"""FastV's choice: which image tokens the upper layers still see (arXiv 2403.06764)."""

from __future__ import annotations

import functools

import torch

from .config import live_to_kept


@functools.lru_cache(maxsize=64)
def _kept_table(most: int, ratio: float) -> torch.Tensor:
    return torch.tensor([live_to_kept(n, ratio) for n in range(most + 1)])


def choose(importance: torch.Tensor, lengths: torch.Tensor, ratio: float, most: int = 4096) -> torch.Tensor:
    """Keep each image's most important tokens.

    Args:
        importance: float [tokens], all images' live tokens one after the other.
        lengths: int64 [images], live tokens of each image.
        ratio: share to drop, in [0, 1).
        most: upper bound of lengths.

    Returns:
        bool [tokens]: per image the ceil((1 - ratio) * n) most important, at least one, ties to the
        earlier token.

    """
    device = importance.device
    tokens = importance.shape[0]
    image = torch.arange(lengths.shape[0], device=device).repeat_interleave(lengths, output_size=tokens)
    by_importance = importance.argsort(descending=True, stable=True)
    order = by_importance[image[by_importance].argsort(stable=True)]
    starts = lengths.cumsum(0) - lengths
    rank = torch.arange(tokens, device=device) - starts[image]
    kept = _kept_table(most, ratio).to(device)[lengths]
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    keep[order] = rank < kept[image]
    return keep
