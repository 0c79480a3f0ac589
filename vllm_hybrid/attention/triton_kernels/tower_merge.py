"""DToMe on fixed shapes (DyMU, arXiv 2504.17040, section 3.1): a layer's merge in four kernels.

``metric`` adds up the keys of a token over heads. ``match`` gives each token at even index (A) its most
similar token at odd index (B), and counts merges by tile. ``plan`` says where every token goes: its new index
is a count of tokens before it, and so is its place in the list of members of the new tokens. ``join`` takes
the means. To move: keys once, features before and behind the merge once. How many tokens an image has is read
from ``starts``, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.stretches import find_stretch, tile_count

# What differs from batch to batch is no reason to compile a kernel again: numbers of rows and images, and
# where a layer's part of a tensor begins.

# Tokens of a tile of the match and the plan: half are A, half are B.
_TILE = 64
# Tokens that these are compared with at a time; more would need more registers than there are.
_OTHERS = 32
_COUNTS = 128
_METRIC_ROWS = 16
_STEP = 16
_CHANNELS = 512
_MEMBERS = 4
_PATCHES = 128


@triton.jit(do_not_specialize=["rows"])
def _metric(key, out, rows, heads, stride, head_stride, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr,
            ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, SIZE_PAD)
    mask = (row < rows)[:, None] & (channel < SIZE)[None, :]
    at = key + row.to(tl.int64)[:, None] * stride + channel[None, :]
    acc = tl.zeros([ROWS, SIZE_PAD], tl.float32)
    for head in range(heads):
        acc += tl.load(at + head * head_stride, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * SIZE + channel[None, :], acc, mask=mask)


def metric(key: torch.Tensor) -> torch.Tensor:
    """float32 [rows, head_size]: keys [rows, heads, head_size], channels contiguous, summed over heads."""
    rows, heads, head_size = key.shape
    out = torch.empty(rows, head_size, device=key.device)
    _metric[(triton.cdiv(rows, _METRIC_ROWS),)](
        key, out, rows, heads, key.stride(0), key.stride(1),
        SIZE=head_size, SIZE_PAD=triton.next_power_of_2(head_size), ROWS=_METRIC_ROWS,
    )  # fmt: skip
    return out


@triton.jit
def _channels(metric, row, there, channel, SIZE: tl.constexpr):
    """float32 [n, channels] of some rows of the metric, zero elsewhere."""
    at = metric + row.to(tl.int64)[:, None] * SIZE + channel[None, :]
    return tl.load(at, mask=there[:, None] & (channel < SIZE)[None, :], other=0.0)


@triton.jit
def _cosines(metric, a, real_a, b, real_b, SIZE: tl.constexpr, STEP: tl.constexpr):
    """float32 [n, m]: cosine of rows ``a`` and rows ``b`` of the metric."""
    product = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    square_a = tl.zeros([a.shape[0]], tl.float32)
    square_b = tl.zeros([b.shape[0]], tl.float32)
    for at in range(0, SIZE, STEP):
        channel = at + tl.arange(0, STEP)
        x = _channels(metric, a, real_a, channel, SIZE)
        y = _channels(metric, b, real_b, channel, SIZE)
        # Cosines decide, so they are multiplied in float32, which no tensor core does.
        product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
        square_a += tl.sum(x * x, axis=1)
        square_b += tl.sum(y * y, axis=1)
    product = product / tl.maximum(tl.sqrt(square_a), 1e-12)[:, None]
    return product / tl.maximum(tl.sqrt(square_b), 1e-12)[None, :]


@triton.jit(do_not_specialize=["stretches"], do_not_specialize_on_alignment=["starts", "threshold"])
def _match(
    metric, starts, threshold, into, merging, stretches,
    SIZE: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    image = find_stretch(starts, tile, stretches, TILE)
    first = tl.load(starts + image)
    # Padding, the last stretch, counts as no tokens.
    length = tl.where(image < stretches - 1, tl.load(starts + image + 1) - first, 0)
    begin = (tile - (first // TILE + image)) * TILE
    count = 0
    if begin < length:
        a = begin + 2 * tl.arange(0, TILE // 2)
        best = tl.full([TILE // 2], float("-inf"), tl.float32)
        found = tl.zeros([TILE // 2], tl.int32)
        for at in range(1, length, 2 * OTHERS):
            b = at + 2 * tl.arange(0, OTHERS)
            score = _cosines(metric, first + a, a < length, first + b, b < length, SIZE, STEP)
            score = tl.where((b < length)[None, :], score, float("-inf"))
            top = tl.max(score, axis=1)
            # The earlier of equals, here and between the rounds of the loop.
            earliest = tl.min(tl.where(score == top[:, None], b[None, :], length), axis=1)
            found = tl.where(top > best, earliest // 2, found)
            best = tl.maximum(best, top)
        merges = (a > 0) & (a < length) & (best > tl.load(threshold + image))
        tl.store(into + first + a, tl.where(merges, found, -1), mask=a < length)
        count = tl.sum(merges.to(tl.int32), axis=0)
    tl.store(merging + tile, count)


@triton.jit(
    do_not_specialize=["stretches", "capacity"], do_not_specialize_on_alignment=["starts", "bounds", "index"]
)
def _plan(
    into, merging, starts, bounds, index, order, member_start, member_count, stretches, capacity,
    TILE: tl.constexpr, OTHERS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    image = find_stretch(starts, tile, stretches, TILE)
    images = stretches - 1
    if image == images:
        return
    first = tl.load(starts + image)
    end = tl.load(starts + image + 1)
    own_tiles = first // TILE + image
    last_tile = end // TILE + image
    begin = (tile - own_tiles) * TILE
    before = tl.zeros([COUNTS], tl.int32)
    here = tl.zeros([COUNTS], tl.int32)
    for at in range(0, last_tile + 1, COUNTS):
        other = at + tl.arange(0, COUNTS)
        merges = tl.load(merging + other, mask=other <= last_tile, other=0)
        before += tl.where(other < own_tiles, merges, 0)
        here += tl.where(other < own_tiles, 0, merges)
    merged = tl.sum(here, axis=0)
    new_first = first - tl.sum(before, axis=0)
    new_end = new_first + (end - first) - merged
    if begin == 0:
        tl.store(bounds + image, tl.minimum(new_first, capacity))
        if image == images - 1:
            tl.store(bounds + images, tl.minimum(new_end, capacity))
            tl.store(bounds + images + 1, capacity)
            tl.store(bounds + images + 2, new_end)
    a_count = (end - first + 1) // 2
    token = begin + tl.arange(0, TILE)
    real = token < end - first
    half = token // 2
    is_b = token % 2 == 1
    own_into = tl.load(into + first + token, mask=real & (is_b == 0), other=-1)
    moves = own_into >= 0
    target = tl.where(is_b, half, own_into)
    # Among the members of a new token the B comes first, then the A in their order.
    rank = tl.where(is_b, -1, half)
    unmerged_before = tl.zeros([TILE], tl.int32)
    members_before = tl.zeros([TILE], tl.int32)
    joined = tl.zeros([TILE], tl.int32)
    for at in range(0, a_count, OTHERS):
        a = at + tl.arange(0, OTHERS)
        goes = tl.load(into + first + 2 * a, mask=a < a_count, other=-2)[None, :]
        a = a[None, :]
        stays = (goes == -1) & (a < half[:, None])
        unmerged_before += tl.sum(stays.to(tl.int32), axis=1)
        earlier = (goes < target[:, None]) | ((goes == target[:, None]) & (a < rank[:, None]))
        members_before += tl.sum(((goes >= 0) & earlier).to(tl.int32), axis=1)
        joined += tl.sum((goes == half[:, None]).to(tl.int32), axis=1)
    unmerged = a_count - merged
    in_b = is_b | moves
    new = tl.where(in_b, unmerged + target, unmerged_before)
    place = tl.where(in_b, new + members_before + moves.to(tl.int32), new)
    # An image in which nothing merges keeps its order.
    new = tl.where(merged > 0, new, token)
    place = tl.where(merged > 0, place, token)
    tl.store(index + first + token, new, mask=real)
    tl.store(order + first + place, first + token, mask=real)
    row = new_first + new
    heads_members = real & (moves == 0) & (row < capacity)
    tl.store(member_start + row, first + place, mask=heads_members)
    tl.store(member_count + row, 1 + tl.where(is_b, joined, 0), mask=heads_members)


@triton.jit(do_not_specialize_on_alignment=["total"])
def _join(
    hidden, added, size, order, member_start, member_count, total, out, out_size, channels, stride,
    added_stride,
    CHANNELS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    acc = tl.zeros([CHANNELS], tl.float32)
    weight = 1.0
    if row < tl.load(total):
        start = tl.load(member_start + row)
        count = tl.load(member_count + row)
        weight = 0.0
        for at in range(0, count, MEMBERS):
            member = at + tl.arange(0, MEMBERS)
            source = tl.load(order + start + member, mask=member < count, other=0)
            weight += tl.sum(tl.load(size + source, mask=member < count, other=0.0), axis=0)
        for at in range(0, count, MEMBERS):
            member = at + tl.arange(0, MEMBERS)
            source = tl.load(order + start + member, mask=member < count, other=0)
            share = tl.load(size + source, mask=member < count, other=0.0) / weight
            mask = (member < count)[:, None] & inside[None, :]
            source = source.to(tl.int64)[:, None]
            x = tl.load(hidden + source * stride + channel[None, :], mask=mask, other=0.0)
            y = tl.load(added + source * added_stride + channel[None, :], mask=mask, other=0.0)
            # As an addition of its own would round it.
            x = (x.to(tl.float32) + y.to(tl.float32)).to(hidden.dtype.element_ty).to(tl.float32)
            acc += tl.sum(share[:, None] * x, axis=0)
    to = out + row.to(tl.int64) * channels + channel
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(out_size + row, weight, mask=tl.program_id(1) == 0)


@dataclass
class MergePlan:
    """Where a merge's new tokens come from.

    Attributes:
        order: int32 [rows], rows before the merge, those that become one token side by side.
        member_start: int32 [capacity], where in ``order`` the members of a new row begin.
        member_count: int32 [capacity], how many they are; both unwritten at padding.

    """

    order: torch.Tensor
    member_start: torch.Tensor
    member_count: torch.Tensor


def plan_merge(
    metric: torch.Tensor,
    threshold: torch.Tensor,
    starts: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor,
    capacity: int,
) -> MergePlan:
    """Decide a layer's merges: cosine strictly above the image's threshold, the earlier B of equals.

    Args:
        metric: float32 [rows, D], contiguous; normalised here.
        threshold: float32 [images], infinity where nothing merges.
        starts: int32 [images + 2], stretches of rows: of every image and of the padding.
        bounds: int32 [images + 3], written: ``starts`` after the merge, cut at the capacity, and the rows
            that are needed.
        index: int32 [rows], written: the number inside its image that each token then has.
        capacity: rows there are after the merge.

    """
    rows, size = metric.shape
    stretches = starts.shape[0] - 1
    tiles = tile_count(rows, stretches, _TILE)
    new = partial(torch.empty, dtype=torch.int32, device=metric.device)
    into, order, merging = new(rows), new(rows), new(tiles)
    member_start, member_count = new(capacity), new(capacity)
    _match[(tiles,)](
        metric, starts, threshold, into, merging, stretches,
        SIZE=size, STEP=_STEP, TILE=_TILE, OTHERS=_OTHERS,
    )  # fmt: skip
    _plan[(tiles,)](
        into, merging, starts, bounds, index, order, member_start, member_count, stretches, capacity,
        TILE=_TILE, OTHERS=_OTHERS, COUNTS=_COUNTS,
    )  # fmt: skip
    return MergePlan(order, member_start, member_count)


def join_rows(
    hidden: torch.Tensor, added: torch.Tensor, size: torch.Tensor, plan: MergePlan, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Size-weighted means in float32 of ``hidden + added``, members in their order.

    Args:
        hidden: [rows, C], channels contiguous.
        added: [rows, C], of the same dtype.
        size: float32 [rows].
        plan: of :func:`plan_merge`.
        total: int32 [1], rows that hold tokens after the merge.

    Returns:
        [capacity, C], zeros at padding, and float32 [capacity], sizes, 1 at padding. What receives nothing
        keeps its features to the bit.

    """
    capacity, channels = plan.member_start.shape[0], hidden.shape[1]
    out, out_size = hidden.new_empty(capacity, channels), size.new_empty(capacity)
    _join[(capacity, triton.cdiv(channels, _CHANNELS))](
        hidden, added, size, plan.order, plan.member_start, plan.member_count, total, out, out_size, channels,
        hidden.stride(0), added.stride(0), CHANNELS=_CHANNELS, MEMBERS=_MEMBERS,
    )  # fmt: skip
    return out, out_size


@triton.jit(do_not_specialize=["merges", "bounds_stride", "index_stride"])
def _owners(bounds, index, owner, patches, merges, bounds_stride, index_stride, PATCHES: tl.constexpr):
    image = tl.program_id(0)
    patch = tl.program_id(1) * PATCHES + tl.arange(0, PATCHES)
    number = patch + 1
    for merge in range(merges):
        first = tl.load(bounds + merge * bounds_stride + image)
        end = tl.load(bounds + merge * bounds_stride + image + 1)
        # Images that were cut short know nothing of some tokens.
        known = (patch < patches) & (number < end - first)
        number = tl.load(index + merge * index_stride + first + number, mask=known, other=0)
    tl.store(owner + image.to(tl.int64) * patches + patch, (number - 1).to(tl.int64), mask=patch < patches)


def owners(bounds: torch.Tensor, index: torch.Tensor, images: int, patches: int) -> torch.Tensor:
    """int64 [images, patches]: the token, class token not counted, that holds each patch after all merges.

    Args:
        bounds: int32 [merges + 1, images + 3], of which the columns up to ``images`` bound the images.
        index: int32 [merges, rows], numbers after each merge.
        images: how many images.
        patches: patches of an image.

    """
    owner = torch.empty(images, patches, dtype=torch.int64, device=bounds.device)
    _owners[(images, triton.cdiv(patches, _PATCHES))](
        bounds, index, owner, patches, index.shape[0], bounds.stride(0), index.stride(0), PATCHES=_PATCHES
    )
    return owner
