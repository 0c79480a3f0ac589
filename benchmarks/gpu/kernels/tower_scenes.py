"""Scenes for the tower's kernels: images in the tower, and merges of which every decision is clear.

The lengths that come out of a scene's merges are chosen, not found: thresholds lie in the gap between the
cosines that are to merge and the others. So kernels and reference may differ in rounding and still have to
decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from benchmarks.gpu.kernels.scenes import random_owner
from vllm_hybrid.attention.interface import DeviceTower
from vllm_hybrid.attention.reference import ReferenceAttention
from vllm_hybrid.method.device_tokens import DeviceTokens, Lengths
from vllm_hybrid.method.token_merging import PackedTokens, merge
from vllm_hybrid.models.tower_capacity import grant
from vllm_hybrid.tools.calibrate import live_schedule

# Two cosines that decide something are at least this far apart; float32 has them to some 1e-7.
MARGIN = 1e-5
# Of the images of a batch one half leaves fewer than the average divided by, or more than it times, this.
PICTURES_DIFFER = 1.3


@dataclass(frozen=True)
class TowerHeads:
    """Shape of the tower's attention."""

    heads: int
    head_size: int

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class TowerShape:
    """What a scene is made of. Its stages are the tokens before the first merge and behind each.

    Attributes:
        heads: shape of the attention.
        patches: patches of an image.
        lengths: in every stage the tokens of every image, class token included.
        rows: in every stage the rows there are; those that no token has are padding.

    """

    heads: TowerHeads
    patches: int
    lengths: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.lengths[0])

    @property
    def merges(self) -> int:
        """How many layers merge."""
        return len(self.lengths) - 1

    @property
    def unmerged(self) -> bool:
        """Whether the first stage is the tower's first layer."""
        return all(length == self.patches + 1 for length in self.lengths[0])

    @property
    def first_overflow(self) -> int | None:
        """The first stage that has more tokens than rows, None where there is none."""
        fits = [sum(lengths) <= rows for lengths, rows in zip(self.lengths, self.rows, strict=True)]
        return None if all(fits) else fits.index(False)

    @property
    def whole(self) -> int:
        """Images that have all their rows in every stage; further ones are cut short and mean nothing."""
        ends = zip(self.lengths, self.rows, strict=True)
        return min(sum(sum(lengths[: i + 1]) <= rows for i in range(self.images)) for lengths, rows in ends)

    def compared(self, stage: int) -> int:
        """First rows of a stage whose content is known: all, unless some images were cut short."""
        return self.rows[stage] if self.first_overflow is None else sum(self.lengths[stage][: self.whole])


@dataclass
class TowerLayer:
    """What a merging layer is given beside the tokens.

    Attributes:
        qkv: [rows, 3 * width], what one product makes of them: queries, keys and values side by side.
        added: [rows, width], what the attention's second product is to add.
        threshold: float32 [images], infinity where nothing merges.

    """

    qkv: torch.Tensor
    added: torch.Tensor
    threshold: torch.Tensor

    def heads(self, head_size: int) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [rows, heads, head_size] each, views."""
        return tuple(x.unflatten(-1, (-1, head_size)) for x in self.qkv.chunk(3, dim=-1))


@dataclass
class TowerScene:
    """Images somewhere in the tower and layers that merge; no numbers for padding.

    Attributes:
        shape: what it was made of.
        hidden: [T, width], tokens of the first stage.
        size: float32 [T], patches a token stands for; 1 for class tokens.
        owner: int64 [images, patches], the token of its image that holds each patch, class token not counted.
        layers: one for each merge, with a row for each token of its stage.

    """

    shape: TowerShape
    hidden: torch.Tensor
    size: torch.Tensor
    owner: torch.Tensor
    layers: list[TowerLayer]

    @property
    def scale(self) -> float:
        """Factor on the attention's logits."""
        return float(self.shape.heads.head_size**-0.5)

    def to(self, device: str, dtype: torch.dtype) -> TowerScene:
        """As the kernels take it: on a device, in as many rows as there are; padding holds no number.

        Args:
            device: where to.
            dtype: of features, queries, keys and values.

        """
        rows = self.shape.rows

        def fitted(packed: torch.Tensor, stage: int) -> torch.Tensor:
            return _fitted(packed.to(device, dtype), rows[stage], math.nan)

        layers = [
            TowerLayer(fitted(layer.qkv, stage), fitted(layer.added, stage), layer.threshold.to(device))
            for stage, layer in enumerate(self.layers)
        ]
        hidden = fitted(self.hidden, 0)
        size = _fitted(self.size.to(device), rows[0], 1.0)
        return replace(self, hidden=hidden, size=size, owner=self.owner.to(device), layers=layers)

    def tokens(self) -> DeviceTokens:
        """The first stage's tokens, of a scene that :meth:`to` made."""
        shape, device = self.shape, self.hidden.device
        if shape.unmerged and shape.rows[0] == sum(shape.lengths[0]):
            return DeviceTokens.start(self.hidden.unflatten(0, (shape.images, -1)), shape.merges)
        ends = torch.tensor(shape.lengths[0]).cumsum(0)
        bounds = torch.empty(shape.merges + 1, shape.images + 3, dtype=torch.int32, device=device)
        bounds[0] = torch.cat([ends.new_zeros(1), ends, torch.tensor([shape.rows[0], int(ends[-1])])])
        index = torch.empty(shape.merges, shape.rows[0], dtype=torch.int32, device=device)
        return DeviceTokens(self.hidden, self.size, bounds, index)

    def packed(self) -> PackedTokens:
        """The first stage's tokens as plain torch takes them, of a scene of :func:`make_tower_scene`."""
        return PackedTokens(self.hidden, self.size, torch.tensor(self.shape.lengths[0]), self.owner)


def _fitted(packed: torch.Tensor, rows: int, padding: float) -> torch.Tensor:
    """The first rows of [T, ...], or all of them and padding behind: [rows, ...]."""
    behind = packed.new_full((max(0, rows - packed.shape[0]), *packed.shape[1:]), padding)
    return torch.cat([packed[:rows], behind])


def make_tower_scene(shape: TowerShape, seed: int, dtype: torch.dtype) -> TowerScene:
    """A scene in float32 on the CPU, of numbers that a dtype holds.

    An image in which every token merges that may is blank there: all its keys are alike, so the earliest B
    token takes all.

    Args:
        shape: what it is made of.
        seed: of the random numbers.
        dtype: of features, queries, keys and values.

    Raises:
        ValueError: more tokens are to merge in a layer than can.

    """
    draw = torch.Generator().manual_seed(seed)
    width, live = shape.heads.width, [length - 1 for length in shape.lengths[0]]
    if shape.unmerged:
        owner = torch.arange(shape.patches).repeat(shape.images, 1)
    else:
        owner = torch.stack([random_owner(shape.patches, own, draw) for own in live])
    counts = [torch.bincount(own, minlength=own_live) for own, own_live in zip(owner, live, strict=True)]
    size = torch.cat([F.pad(count, (1, 0), value=1) for count in counts]).float()
    layers = []
    for before, after in pairwise(shape.lengths):
        tokens = sum(before)
        # What queries, values and the rest are is a matter of no decision.
        query, value, added = torch.randn(3, tokens, width, generator=draw).to(dtype).float()
        keys, thresholds = zip(
            *(
                _keys(length, length - left, shape.heads, dtype, draw)
                for length, left in zip(before, after, strict=True)
            ),
            strict=True,
        )
        qkv = torch.cat([query, torch.cat(keys).flatten(1), value], dim=1)
        layers.append(TowerLayer(qkv, added, torch.tensor(thresholds)))
    hidden = torch.randn(sum(shape.lengths[0]), width, generator=draw).to(dtype).float()
    return TowerScene(shape, hidden, size, owner, layers)


def _keys(
    length: int, merges: int, heads: TowerHeads, dtype: torch.dtype, draw: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Keys of an image, and the threshold at which so many of its tokens merge.

    Returns:
        float32 [length, heads, head_size] of numbers that the dtype holds, and the threshold.

    """
    mergeable = (length + 1) // 2 - 1
    if not 0 <= merges <= mergeable:
        raise ValueError(f"{merges} of {length} tokens cannot merge in one layer")
    size = (heads.heads, heads.head_size)
    if mergeable == 0:
        return torch.randn(length, *size, generator=draw).to(dtype).float(), math.inf
    if merges == mergeable:
        blank = torch.zeros(length, *size)
        blank[:, :, 0] = 1
        return blank, 0.5

    def drawn(tokens: int) -> torch.Tensor:
        return (direction + torch.randn(tokens, *size, generator=draw)).to(dtype).float()

    direction = torch.randn(*size, generator=draw)
    keys = drawn(length)
    while True:
        unit = F.normalize(keys.double().sum(dim=1), dim=-1)
        scores = unit[2::2] @ unit[1::2].T
        best = scores.topk(min(2, scores.shape[1]), dim=1).values
        # Of a single B token nothing is chosen.
        undecided = (best[:, 0] - best[:, -1] < MARGIN) & (best.shape[1] > 1)
        if merges == 0 and not bool(undecided.any()):
            return keys, math.inf
        if merges:
            ordered = best[:, 0].sort(descending=True)
            above, below = ordered.values[merges - 1 : merges + 1]
            if not bool(undecided.any()) and above - below > MARGIN:
                return keys, float((above + below) / 2)
            undecided[ordered.indices[merges]] |= above - below <= MARGIN
        # An A token's keys decide about itself alone.
        again = 2 + 2 * undecided.nonzero()[:, 0]
        keys[again] = drawn(again.shape[0])


def kernel_results(scene: TowerScene, ops: DeviceTower) -> dict[str, torch.Tensor]:
    """What the tower's kernels make of a scene of :meth:`TowerScene.to`; as :func:`tower_reference`."""
    shape, tokens = scene.shape, scene.tokens()
    attended, hidden, sizes = [], [], []
    for stage, layer in enumerate(scene.layers):
        query, key, value = layer.heads(shape.heads.head_size)
        attended.append(ops.attend(query, key, value, tokens, scene.scale))
        tokens = ops.merge(tokens, layer.added, ops.metric(key), layer.threshold, shape.rows[stage + 1])
        hidden.append(tokens.hidden)
        sizes.append(tokens.size)
    # The kernel follows the first stage's tokens; in the middle of the tower patches share them.
    owner = ops.owners(tokens, shape.patches).gather(1, scene.owner)
    overflowed = Lengths.read(tokens).overflowed
    return _results(shape, attended, hidden, sizes, tokens.bounds.tolist(), overflowed, owner)


def tower_reference(scene: TowerScene) -> dict[str, torch.Tensor]:
    """What the tower's kernels must make of a scene of :func:`make_tower_scene`; float32 on the CPU.

    Returns:
        ``attend`` and ``hidden``, rows of all merging layers' attention and of all stages behind a merge, 0
        at padding; ``sizes`` of the latter, 1 at padding; ``bounds`` of the images' rows, with how many rows
        there are, how many were needed, and whether rows did not suffice; ``owners``. Of a scene whose rows
        do not suffice what the images have that were not cut short.

    """
    shape, tokens = scene.shape, scene.packed()
    attended, hidden, sizes, lengths = [], [], [], [tokens.layout.lengths]
    for stage, layer in enumerate(scene.layers):
        query, key, value = layer.heads(shape.heads.head_size)
        answer = ReferenceAttention().proportional_attention(query, key, value, tokens, scene.scale)
        attended.append(_fitted(answer, shape.rows[stage], 0.0))
        tokens.hidden = tokens.hidden + layer.added
        tokens = merge(tokens, key.mean(dim=1), layer.threshold)
        hidden.append(_fitted(tokens.hidden, shape.rows[stage + 1], 0.0))
        sizes.append(_fitted(tokens.size, shape.rows[stage + 1], 1.0))
        lengths.append(tokens.layout.lengths)
    bounds = [
        [0, *torch.tensor(own).cumsum(0).tolist(), rows, sum(own)]
        for own, rows in zip(lengths, shape.rows, strict=True)
    ]
    overflows = shape.first_overflow is not None
    return _results(shape, attended, hidden, sizes, bounds, overflows, tokens.owner)


def _results(
    shape: TowerShape,
    attended: list[torch.Tensor],
    hidden: list[torch.Tensor],
    sizes: list[torch.Tensor],
    bounds: list[list[int]],
    overflowed: bool,
    owner: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Of the rows of all stages those whose content is known, one stage after the other."""
    stages = range(shape.merges)
    # What is needed behind an overflow depends on what was cut.
    last = shape.merges if shape.first_overflow is None else shape.first_overflow
    known = [own[: shape.whole + 1] for own in bounds] + [own[-2:] for own in bounds[: last + 1]]
    return {
        "attend": torch.cat([attended[s][: shape.compared(s)] for s in stages]),
        "hidden": torch.cat([hidden[s][: shape.compared(s + 1)] for s in stages]),
        "sizes": torch.cat([sizes[s][: shape.compared(s + 1)] for s in stages]),
        "bounds": torch.tensor([n for own in known for n in own] + [overflowed]),
        "owners": owner[: shape.whole],
    }


def tower_lengths(images: int, live: int, patches: int, layers: int) -> list[list[int]]:
    """Tokens of every image before the first layer and behind each, as pictures differ.

    Args:
        images: how many.
        live: live tokens behind the last layer, on average.
        patches: patches of an image.
        layers: layers of the tower; all merge, each as many as any other.

    Returns:
        [layers + 1][images], class tokens included.

    """
    # Quantiles of a log-normal distribution.
    place = (torch.arange(images) + 0.5) / images
    spread = torch.exp(math.log(PICTURES_DIFFER) / 0.6745 * math.sqrt(2) * torch.erfinv(2 * place - 1))
    wanted = (live * spread / spread.mean()).round().clamp(2, patches - 1).int().tolist()
    found = []
    for own in wanted:
        left = [patches]
        for after in live_schedule(patches, own, layers):
            left.append(max(round(after), left[-1] - left[-1] // 2))
        found.append([n + 1 for n in left])
    return [list(stage) for stage in zip(*found, strict=True)]


def granted_rows(lengths: list[list[int]]) -> list[int]:
    """Rows that the tower grants each stage once it knows pictures that left as many tokens."""
    unmerged = sum(lengths[0])
    return [unmerged, *grant([sum(stage) for stage in lengths[1:]], unmerged)]
