"""The tower's tokens on fixed shapes: how many an image has left is known on the device alone.

The tokens of all images are packed one after the other into as many rows as the host grants a layer, its
capacity. What lies behind the last image is padding: zeros, which no token sees. A merge that leaves more
tokens than the next layer has rows cuts the last images short; it is noted, and the batch is then to be run
again with more room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_hybrid.method.token_merging import LiveTokens, live_places


@dataclass
class DeviceTokens:
    """Tokens of several images at one layer of the tower.

    Attributes:
        hidden: [rows, C], tokens of all images, each image's class token first; zeros behind them.
        size: float32 [rows], patches a token stands for; 1 for class tokens and padding.
        bounds: int32 [merging layers + 1, images + 3], before the first merge and after each: first row of
            every image, one past the last row of all, the rows there are, the rows that were needed.
            Written as far as ``merges``.
        index: int32 [merging layers, rows before the first merge], what each merge made of the numbers of
            an image's tokens (0 is the class token). Written as far as ``merges``.
        merges: merges carried out so far.

    """

    hidden: torch.Tensor
    size: torch.Tensor
    bounds: torch.Tensor
    index: torch.Tensor
    merges: int = 0

    @classmethod
    def start(cls, hidden: torch.Tensor, merging_layers: int) -> DeviceTokens:
        """Unmerged tokens [images, 1 + P, C] that are going to be merged in some layers."""
        images, length, _ = hidden.shape
        rows, device = images * length, hidden.device
        bounds = torch.empty(merging_layers + 1, images + 3, dtype=torch.int32, device=device)
        torch.clamp(
            torch.arange(0, (images + 3) * length, length, dtype=torch.int32, device=device),
            max=rows,
            out=bounds[0],
        )
        return cls(
            hidden=hidden.flatten(0, 1),
            size=torch.ones(rows, device=device),
            bounds=bounds,
            index=torch.empty(merging_layers, rows, dtype=torch.int32, device=device),
        )

    @property
    def images(self) -> int:
        """How many images there are."""
        return self.bounds.shape[1] - 3

    @property
    def rows(self) -> int:
        """Rows that this layer's tensors have room for."""
        return self.hidden.shape[0]

    @property
    def starts(self) -> torch.Tensor:
        """int32 [images + 2]: stretches of rows at this layer, of every image and of the padding."""
        return self.bounds[self.merges, : self.images + 2]


@dataclass(frozen=True)
class Lengths:
    """What the one read at the end of a batch brings.

    Attributes:
        images: after each merge, tokens of every image, class tokens included.
        overflowed: whether a merge left more tokens than there were rows, so that all of this is void.

    """

    images: list[list[int]]
    overflowed: bool

    @classmethod
    def read(cls, tokens: DeviceTokens) -> Lengths:
        """Ask the device; the host waits for it once."""
        after = tokens.bounds.tolist()[1:]
        images = [[end - first for first, end in zip(row[:-3], row[1:-2], strict=True)] for row in after]
        return cls(images, any(needed > rows for *_, rows, needed in after))


def live_tokens(tokens: DeviceTokens, owner: torch.Tensor, lengths: Sequence[int]) -> LiveTokens:
    """The live tokens behind the last merge; the host does not wait for the device.

    Args:
        tokens: of which all merges are done.
        owner: int64 [images, P], the live token that holds each patch.
        lengths: tokens of every image, class token included, as the device has them.

    """
    counts = [length - 1 for length in lengths]
    row, image, index = live_places(tokens.starts[:-1].diff() - 1, sum(counts))
    return LiveTokens(tokens.hidden[row], image, index, owner, counts)
