"""DToMe: dynamic token merging, packed over the images of a batch (DyMU, arXiv 2504.17040, section 3.1).

Images keep their own token counts; their tokens lie one after the other, class token first. All steps
work on a padded view [images, longest, ...]; no loop runs over images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class PackedTokens:
    """Tokens of several images at one layer of the tower.

    Attributes:
        hidden: [T, C], tokens of all images, each image's class token first.
        size: float32 [T], patches a token stands for; 1 for class tokens.
        lengths: int64 [images], tokens per image, class token included.
        owner: int64 [images, P], number (0 .. n - 1, class token not counted) of the live token that
            holds each patch.

    """

    hidden: torch.Tensor
    size: torch.Tensor
    lengths: torch.Tensor
    owner: torch.Tensor
    _longest: int = 0
    _even: bool = True

    @classmethod
    def start(cls, hidden: torch.Tensor) -> PackedTokens:
        """Unmerged tokens [images, 1 + P, C]."""
        images, length, _ = hidden.shape
        device = hidden.device
        return cls(
            hidden=hidden.flatten(0, 1),
            size=torch.ones(images * length, device=device),
            lengths=torch.full((images,), length, device=device),
            owner=torch.arange(length - 1, device=device).repeat(images, 1),
            _longest=length,
            _even=True,
        )

    @property
    def inside(self) -> torch.Tensor:
        """bool [images, longest]: which places of the padded view hold a token."""
        return torch.arange(self._longest, device=self.lengths.device) < self.lengths[:, None]


def pad(packed: torch.Tensor, tokens: PackedTokens) -> torch.Tensor:
    """[T, ...] to [images, longest, ...], zeros behind short images; a view where all are equally long."""
    images = tokens.lengths.shape[0]
    if tokens._even:
        return packed.unflatten(0, (images, tokens._longest))
    padded = packed.new_zeros(images, tokens._longest, *packed.shape[1:])
    padded[tokens.inside] = packed
    return padded


def unpad(padded: torch.Tensor, tokens: PackedTokens) -> torch.Tensor:
    """The inverse of :func:`pad`."""
    return padded.flatten(0, 1) if tokens._even else padded[tokens.inside]


def log_size_bias(tokens: PackedTokens) -> torch.Tensor | None:
    """What proportional attention adds to the key logits (ToMe, section 3.2).

    Returns:
        float32 [images, 1, 1, longest], log(size), -inf at padding; None while nothing has merged.

    """
    if tokens._even and tokens._longest == tokens.owner.shape[1] + 1:
        return None
    return pad(tokens.size, tokens).log()[:, None, None, :]


def merge(tokens: PackedTokens, metric: torch.Tensor, threshold: float | None) -> PackedTokens:
    """Merge similar tokens inside each image (design section 1).

    Tokens at even index (A) merge into their most similar token at odd index (B) where the cosine is
    strictly above the threshold; the class token never does. One host round trip, to learn the new
    lengths.

    Args:
        tokens: the tokens.
        metric: [T, D], keys averaged over heads; normalised here.
        threshold: least cosine, exclusive; None or infinity merges nothing.

    Returns:
        The merged tokens: of each image the unmerged A tokens in index order, then the B tokens.

    """
    if threshold is None or threshold == float("inf"):
        return tokens
    inside = tokens.inside
    a_inside, b_inside = inside[:, 0::2], inside[:, 1::2]
    unit = F.normalize(pad(metric.float(), tokens), dim=-1)
    scores = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).masked_fill(~b_inside[:, None, :], float("-inf"))
    best, into = scores.max(dim=-1)
    best = best.masked_fill(~a_inside, float("-inf"))
    best[:, 0] = float("-inf")
    merged = _best_above(best, threshold, (tokens.lengths - 1) // 2)
    return _join(tokens, merged, into, a_inside, b_inside)


def _best_above(best: torch.Tensor, threshold: float, most: torch.Tensor) -> torch.Tensor:
    """bool like best [images, A]: scores above the threshold, at most ``most`` per image, best first."""
    order = best.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(best.shape[1], device=best.device).expand_as(order)
    )
    return (best > threshold) & (rank < most[:, None])


def _join(
    tokens: PackedTokens, merged: torch.Tensor, into: torch.Tensor, a_inside: torch.Tensor, b_inside: torch.Tensor
) -> PackedTokens:
    images, longest = merged.shape[0], tokens._longest
    stays = a_inside & ~merged
    kept_a = stays.sum(dim=1)
    # New index of every old token, class token at 0.
    new_a = stays.cumsum(1) - 1
    new_b = kept_a[:, None] + torch.arange(b_inside.shape[1], device=merged.device)
    new_index = torch.empty(images, longest, dtype=torch.int64, device=merged.device)
    new_index[:, 1::2] = new_b
    new_index[:, 0::2] = torch.where(merged, new_b.gather(1, into), new_a)
    lengths = tokens.lengths - merged.sum(dim=1)
    lengths_list = lengths.tolist()
    starts = lengths.cumsum(0) - lengths
    target = (new_index + starts[:, None])[tokens.inside]
    total = sum(lengths_list)

    size = _segment_sum(tokens.size[:, None], target, total)[:, 0]
    # Tokens that absorb nothing keep their features to the bit.
    alone = torch.bincount(target, minlength=total) == 1
    weighted = _segment_sum(tokens.hidden.float() * tokens.size[:, None], target, total) / size[:, None]
    hidden = weighted.to(tokens.hidden.dtype)
    single = alone[target]
    hidden[target[single]] = tokens.hidden[single]
    return PackedTokens(
        hidden=hidden,
        size=size,
        lengths=lengths,
        owner=new_index.gather(1, tokens.owner + 1) - 1,
        _longest=max(lengths_list),
        _even=len(set(lengths_list)) == 1,
    )


def _segment_sum(values: torch.Tensor, segment: torch.Tensor, segments: int) -> torch.Tensor:
    """Sum rows [T, C] by segment, in index order and without atomics, so that runs agree to the bit."""
    order = segment.argsort(stable=True)
    lengths = torch.bincount(segment, minlength=segments)
    return torch.segment_reduce(values[order], "sum", lengths=lengths, unsafe=True)
