"""DToMe on packed images against a loop over tokens in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from vllm_hybrid.method.token_merging import (
    Layout,
    PackedTokens,
    live_rows,
    log_size_bias,
    merge,
    pad,
    unpad,
)

# ---- one image, token by token ---------------------------------------------------------------------


@dataclass
class Slow:
    """An image's tokens: features, sizes and the patches of each; the class token is number 0."""

    hidden: list[np.ndarray]
    size: list[int]
    patches: list[set[int]]


def slow_start(hidden: torch.Tensor) -> Slow:
    rows = [row.numpy() for row in hidden.double()]
    return Slow(rows, [1] * len(rows), [set(), *({p} for p in range(len(rows) - 1))])


def slow_merge(image: Slow, metric: torch.Tensor, threshold: float) -> Slow:
    count = len(image.hidden)
    unit = [m / np.sqrt((m * m).sum()) for m in metric.double().numpy()]
    candidates = []
    for a in range(2, count, 2):
        scores = {b: float(unit[a] @ unit[b]) for b in range(1, count, 2)}
        top = max(scores.values())
        if top > threshold:
            candidates.append((top, a, min(b for b in scores if scores[b] == top)))
    candidates.sort(key=lambda c: (-c[0], c[1]))
    into = {a: b for _, a, b in candidates[: (count - 1) // 2]}
    if not into:
        return image
    order = [i for i in range(0, count, 2) if i not in into] + list(range(1, count, 2))
    groups = [[i, *(a for a, b in into.items() if b == i)] for i in order]
    sizes = [sum(image.size[m] for m in group) for group in groups]
    totals = [np.stack([image.hidden[m] * image.size[m] for m in group]).sum(0) for group in groups]
    return Slow(
        [total / size for total, size in zip(totals, sizes, strict=True)],
        sizes,
        [set().union(*(image.patches[m] for m in g)) for g in groups],
    )


def check(tokens: PackedTokens, slow: list[Slow], tolerance: float = 1e-5) -> None:
    assert tokens.lengths.tolist() == [len(s.hidden) for s in slow] == list(tokens.layout.lengths)
    assert tokens.size.dtype == torch.float32
    assert tokens.size.tolist() == [size for s in slow for size in s.size]
    expected = torch.tensor(np.concatenate([np.stack(s.hidden) for s in slow]))
    torch.testing.assert_close(tokens.hidden.double(), expected, atol=tolerance, rtol=tolerance)
    for owner, image in zip(tokens.owner.tolist(), slow, strict=True):
        assert image.patches[0] == set()
        for number, patches in enumerate(image.patches[1:]):
            assert {p for p, o in enumerate(owner) if o == number} == patches


def random_metric(tokens: PackedTokens, spread: float, channels: int = 6) -> torch.Tensor:
    """Random vectors around one direction: the smaller the spread, the closer to 1 all cosines are."""
    return torch.randn(channels) + spread * torch.randn(tokens.hidden.shape[0], channels)


# One for all images, or one for each.
Threshold = float | Sequence[float]


def each(threshold: Threshold, images: int) -> Sequence[float]:
    """The threshold of every image."""
    return [threshold] * images if isinstance(threshold, float) else threshold


def decided_metric(
    tokens: PackedTokens, spread: float, threshold: Threshold, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A random metric of whose decisions none is a matter of float32 rounding."""
    return decided(lambda: random_metric(tokens, spread).to(dtype), tokens, threshold)


def decided(draw: Callable[[], torch.Tensor], tokens: PackedTokens, threshold: Threshold) -> torch.Tensor:
    """The first metric drawn of whose decisions none is a matter of float32 rounding."""
    lengths = tokens.lengths.tolist()
    thresholds = each(threshold, len(lengths))
    for _ in range(1000):
        metric = draw()
        if all(margin(*image) > 3e-6 for image in zip(metric.split(lengths), thresholds, strict=True)):
            return metric
    raise AssertionError("no metric is clear of rounding")


def opposed(tokens: PackedTokens, threshold: float) -> torch.Tensor:
    """Odd tokens point one way and even tokens the other; but where threshold > 0, i even tokens of image i
    point with the odd ones.
    """
    numbers = torch.cat([torch.arange(length) for length in tokens.lengths.tolist()])
    image = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.lengths)
    across = numbers % 2 == 0
    if threshold > 0:
        across &= (numbers == 0) | (numbers > 2 * image)
    metric = torch.stack([torch.where(across, -1.0, 1.0), torch.full(image.shape, 0.2)], dim=1)
    return metric + 0.1 * torch.randn(metric.shape)


def partly_still(tokens: PackedTokens, still: torch.Tensor) -> torch.Tensor:
    """Metrics in which some images, those of bool [images] ``still``, have no positive cosine, and all
    others a cosine close to 1.
    """
    metric = random_metric(tokens, 0.4)
    first = tokens.lengths.cumsum(0) - tokens.lengths
    number = torch.arange(len(metric)) - first.repeat_interleave(tokens.lengths)
    direction = torch.randn(metric.shape[1])
    across = 0.02 * torch.randn(metric.shape) + torch.where(number % 2 == 0, 1.0, -1.0)[:, None] * direction
    metric[first + 2] = metric[first + 1] + 0.01 * torch.randn(len(still), metric.shape[1])
    return torch.where(still.repeat_interleave(tokens.lengths)[:, None], across, metric)


def margin(metric: torch.Tensor, threshold: float) -> float:
    """Distance of the closest decision of an image from falling the other way, as a cosine."""
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True)
    least = math.inf
    for row in (unit[2::2] @ unit[1::2].T).tolist():
        ranked = sorted(row, reverse=True)
        least = min(least, abs(ranked[0] - threshold))
        if len(ranked) > 1 and ranked[0] > threshold:
            least = min(least, ranked[0] - ranked[1])
    return least


def both(
    tokens: PackedTokens, slow: list[Slow], metric: torch.Tensor, threshold: Threshold
) -> tuple[PackedTokens, list[Slow]]:
    parts, thresholds = metric.split(tokens.lengths.tolist()), each(threshold, len(slow))
    loop = [slow_merge(*image) for image in zip(slow, parts, thresholds, strict=True)]
    given = threshold if isinstance(threshold, float) else torch.tensor(threshold)
    return merge(tokens, metric, given), loop


# ---- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patches", [9, 24, 49])
def test_layers_of_merging_are_those_of_a_loop(seed: int, patches: int, dtype: torch.dtype) -> None:
    """Several images, counts drifting apart from layer to layer, features changing between the merges."""
    hidden = torch.randn(4, 1 + patches, 5).to(dtype)
    tokens, slow = PackedTokens.start(hidden), [slow_start(h) for h in hidden]
    ragged = False
    for _ in range(5):
        tokens, slow = both(tokens, slow, decided_metric(tokens, 0.7, 0.9, dtype), 0.9)
        check(tokens, slow, {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
        tokens.hidden = torch.randn(tokens.hidden.shape).to(dtype)
        for image, part in zip(slow, tokens.hidden.double().split(tokens.lengths.tolist()), strict=True):
            image.hidden = list(part.numpy())
        ragged |= len(set(tokens.lengths.tolist())) > 1
    assert ragged or patches < 49


def test_padding_is_nobodys_match(seed: int) -> None:
    """Negative cosines and thresholds: the zeros behind a short image must not look similar to anything."""
    hidden = torch.randn(5, 1 + 11, 3)
    tokens, slow = PackedTokens.start(hidden), [slow_start(h) for h in hidden]
    # In the first merge image i loses i tokens; then all A tokens point away from the B tokens.
    tokens, slow = both(tokens, slow, decided(lambda: opposed(tokens, 0.5), tokens, 0.5), 0.5)
    assert tokens.lengths.tolist() == [12, 11, 10, 9, 8]
    for threshold in (-0.99, -2.0):
        metric = decided(partial(opposed, tokens, threshold), tokens, threshold)
        tokens, slow = both(tokens, slow, metric, threshold)
        check(tokens, slow)
    assert len(set(tokens.lengths.tolist())) > 1


def test_features_are_weighted_by_size(seed: int) -> None:
    """Two merges without anything between them: a merged token is the mean of its patches."""
    hidden = torch.randn(3, 1 + 24, 5)
    tokens = PackedTokens.start(hidden)
    for _ in range(3):
        tokens = merge(tokens, random_metric(tokens, 0.5), 0.85)
    rows, image, number = live_rows(tokens)
    for row, i, n in zip(rows.tolist(), image.tolist(), number.tolist(), strict=True):
        own = hidden[i, 1:][tokens.owner[i] == n]
        assert tokens.size[row] == len(own)
        torch.testing.assert_close(tokens.hidden[row], own.mean(0), atol=1e-5, rtol=1e-5)


def test_everything_merges_down_to_one_live_token(seed: int) -> None:
    hidden = torch.randn(3, 1 + 20, 4)
    tokens, slow = PackedTokens.start(hidden), [slow_start(h) for h in hidden]
    counts = []
    for _ in range(8):
        tokens, slow = both(tokens, slow, decided_metric(tokens, 1.0, -2.0), -2.0)
        check(tokens, slow)
        counts.append(tokens.lengths.tolist())
    # ceil(T / 2) - 1 of T tokens merge in every layer, which is the cap (T - 1) // 2.
    assert counts == [[n] * 3 for n in (11, 6, 4, 3, 2, 2, 2, 2)]
    assert tokens.size.tolist() == [1, 20] * 3 and int(tokens.owner.max()) == 0


@pytest.mark.parametrize("threshold", [None, math.inf])
def test_no_threshold_changes_nothing(seed: int, threshold: float | None) -> None:
    tokens = PackedTokens.start(torch.randn(2, 10, 4))
    assert merge(tokens, random_metric(tokens, 1.0), threshold) is tokens


def test_a_threshold_nobody_reaches_changes_nothing(seed: int) -> None:
    hidden = torch.randn(2, 1 + 6, 4)
    tokens = merge(PackedTokens.start(hidden), torch.randn(14, 4), 1.5)
    assert torch.equal(tokens.hidden, hidden.flatten(0, 1))
    assert tokens.owner.tolist() == [list(range(6))] * 2
    assert tokens.size.tolist() == [1] * 14 and tokens.lengths.tolist() == [7, 7]
    assert tokens.unmerged


@pytest.mark.parametrize("patches", [15, 24, 49])
def test_each_image_of_a_batch_decides_for_itself_whether_its_order_changes(seed: int, patches: int) -> None:
    """Layers in which some of the images, most of them, all of them merge nothing; which, is random."""
    hidden = torch.randn(6, 1 + patches, 5)
    tokens, slow = PackedTokens.start(hidden), [slow_start(h) for h in hidden]
    parts = [torch.arange(6) < count for count in (2, 4, 6)]
    for still in [part[torch.randperm(6)] for part in parts]:
        before = tokens
        metric = decided(partial(partly_still, tokens, still), tokens, 0.95)
        tokens, slow = both(tokens, slow, metric, 0.95)
        check(tokens, slow)
        assert torch.equal(tokens.lengths == before.lengths, still)
        for image in still.nonzero()[:, 0].tolist():
            own, was = (t.hidden.split(t.lengths.tolist())[image] for t in (tokens, before))
            assert torch.equal(own, was) and torch.equal(tokens.owner[image], before.owner[image])


def test_the_threshold_itself_is_not_above_it() -> None:
    metric = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    tokens = PackedTokens.start(torch.randn(1, 5, 3))
    assert merge(tokens, metric, 1.0).lengths.tolist() == [5]
    assert merge(tokens, metric, math.nextafter(1.0, 0.0) - 1e-6).lengths.tolist() == [3]


def test_equal_scores_go_to_the_earlier_token() -> None:
    """Tokens 2, 4 and 6 see 1, 3 and 5 as equals; all choose token 1."""
    hidden = torch.arange(7.0).view(1, 7, 1)
    tokens = merge(PackedTokens.start(hidden), torch.ones(7, 4), 0.5)
    assert tokens.hidden.flatten().tolist() == [0, (1 + 2 + 4 + 6) / 4, 3, 5]
    assert tokens.owner.tolist() == [[0, 0, 1, 0, 2, 0]]


def test_the_class_token_neither_merges_nor_is_merged_into(seed: int) -> None:
    hidden = torch.randn(2, 1 + 30, 4)
    tokens = PackedTokens.start(hidden)
    for _ in range(4):
        metric = random_metric(tokens, 0.1)
        first = tokens.lengths.cumsum(0) - tokens.lengths
        metric[first + 1] = metric[first]
        tokens = merge(tokens, metric, -2.0)
        first = tokens.lengths.cumsum(0) - tokens.lengths
        assert torch.equal(tokens.hidden[first], hidden[:, 0])
        assert tokens.size[first].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_receive_nothing_keep_every_bit(seed: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 1 + 40, 8).to(dtype)
    tokens = PackedTokens.start(hidden)
    tokens.size = torch.randint(1, 500, tokens.size.shape).float()
    merged = merge(tokens, random_metric(tokens, 1.0), 0.9)
    receives = torch.zeros(82, dtype=torch.bool)
    rows, image, number = live_rows(merged)
    before = torch.arange(82).view(2, 41)
    for row, i, n in zip(rows.tolist(), image.tolist(), number.tolist(), strict=True):
        own = before[i, 1:][merged.owner[i] == n]
        receives[own] = len(own) > 1
        if len(own) == 1:
            assert torch.equal(merged.hidden[row], tokens.hidden[own[0]])
    assert 0 < int(receives.sum()) < 80


def test_images_do_not_influence_each_other(seed: int) -> None:
    """A batch of images of different lengths gives what each gives alone."""
    hidden = torch.randn(3, 1 + 24, 5)
    spreads = (0.05, 0.5, 2.0)
    single = PackedTokens.start(hidden[:1])
    metrics = [decided_metric(single, spread, 0.8) for spread in spreads]
    tokens = merge(PackedTokens.start(hidden), torch.cat(metrics), 0.8)
    assert len(set(tokens.lengths.tolist())) > 1
    second = decided_metric(tokens, 0.6, 0.8)
    together = merge(tokens, second, 0.8)
    for i, part in enumerate(second.split(tokens.lengths.tolist())):
        alone = merge(merge(PackedTokens.start(hidden[i : i + 1]), metrics[i], 0.8), part, 0.8)
        torch.testing.assert_close(alone.hidden, together.hidden.split(together.lengths.tolist())[i])
        assert torch.equal(alone.owner[0], together.owner[i])


# Of images that merge all they can, some of it or nothing.
EACH = (-2.0, 0.5, 0.8, 0.9, 0.95, math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patches", [9, 24, 49])
def test_each_image_merges_at_its_own_threshold(
    draw: random.Random, seed: int, patches: int, dtype: torch.dtype
) -> None:
    hidden = torch.randn(6, 1 + patches, 5).to(dtype)
    tokens, slow = PackedTokens.start(hidden), [slow_start(h) for h in hidden]
    for _ in range(4):
        thresholds = [draw.choice(EACH) for _ in slow]
        metric = decided_metric(tokens, 0.7, thresholds, dtype)
        tokens, slow = both(tokens, slow, metric, thresholds)
        check(tokens, slow, {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype])
        tokens.hidden = torch.randn(tokens.hidden.shape).to(dtype)
        for image, part in zip(slow, tokens.hidden.double().split(tokens.lengths.tolist()), strict=True):
            image.hidden = list(part.numpy())


@pytest.mark.parametrize("patches", [9, 24, 49])
def test_images_with_thresholds_of_their_own_give_what_each_gives_alone(
    draw: random.Random, seed: int, patches: int
) -> None:
    """Each image has one threshold in each of several layers, as levels have, and none in some of them."""
    hidden = torch.randn(5, 1 + patches, 5)
    tokens, alone = PackedTokens.start(hidden), [PackedTokens.start(h[None]) for h in hidden]
    for _ in range(4):
        thresholds = [draw.choice(EACH) for _ in alone]
        metric = decided_metric(tokens, 0.7, thresholds)
        parts = metric.split(tokens.lengths.tolist())
        tokens = merge(tokens, metric, torch.tensor(thresholds))
        alone = [merge(*image) for image in zip(alone, parts, thresholds, strict=True)]
        lengths = tokens.lengths.tolist()
        assert lengths == [int(own.lengths) for own in alone]
        assert torch.equal(tokens.owner, torch.cat([own.owner for own in alone]))
        assert torch.equal(tokens.size, torch.cat([own.size for own in alone]))
        torch.testing.assert_close(tokens.hidden, torch.cat([own.hidden for own in alone]))


def test_an_image_without_a_threshold_keeps_every_bit_beside_others_that_merge(seed: int) -> None:
    hidden = torch.randn(4, 1 + 24, 5).bfloat16()
    before = PackedTokens.start(hidden)
    tokens = merge(before, random_metric(before, 0.2), torch.tensor([0.5, math.inf, -2.0, math.inf]))
    parts = tokens.hidden.split(tokens.lengths.tolist())
    for image in (1, 3):
        assert torch.equal(parts[image], hidden[image])
        assert torch.equal(tokens.owner[image], before.owner[image])
    assert max(len(parts[0]), len(parts[2])) < 25


@pytest.mark.parametrize("threshold", [-2.0, 0.8, 0.9])
def test_the_same_threshold_for_each_image_is_one_for_all(seed: int, threshold: float) -> None:
    tokens = PackedTokens.start(torch.randn(3, 1 + 24, 5))
    metric = random_metric(tokens, 0.7)
    single, several = merge(tokens, metric, threshold), merge(tokens, metric, torch.full((3,), threshold))
    assert torch.equal(single.hidden, several.hidden) and torch.equal(single.owner, several.owner)


def test_runs_agree_to_the_bit(seed: int) -> None:
    tokens = PackedTokens.start(torch.randn(4, 577, 64))
    metric = random_metric(tokens, 0.5, 16)
    first, second = merge(tokens, metric, 0.8), merge(tokens, metric, 0.8)
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.owner, second.owner)


def test_bf16_features_are_averaged_in_float32(seed: int) -> None:
    """The mean of many bf16 rows is off by one rounding, not by one per addition."""
    hidden = (1 + torch.rand(1, 1 + 256, 16)).bfloat16()
    tokens = merge(PackedTokens.start(hidden), torch.ones(257, 4), 0.5)
    own = hidden[0, 1:].double()[tokens.owner[0] == 0]
    assert len(own) == 129
    rounding = 2.0**-8  # half a step of bf16 between 1 and 2
    assert (tokens.hidden[1].double() - own.mean(0)).abs().max() <= rounding + 1e-5


def test_metric_of_any_length_counts_by_its_angle(seed: int) -> None:
    tokens = PackedTokens.start(torch.randn(2, 20, 4))
    metric = random_metric(tokens, 0.7)
    scaled = metric * torch.tensor(2.0) ** torch.randint(-8, 8, (40, 1))
    assert torch.equal(merge(tokens, metric, 0.85).owner, merge(tokens, scaled, 0.85).owner)


# ---- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4, 2, 7], [5, 5], [3], [1, 1, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_pad_and_unpad(seed: int, lengths: list[int], dtype: torch.dtype) -> None:
    packed = torch.randint(1, 100, (sum(lengths), 2, 3)).to(dtype)
    size, owner = torch.ones(len(packed)), torch.zeros(len(lengths), 8)
    tokens = PackedTokens(packed, size, torch.tensor(lengths), owner)
    padded = pad(packed, tokens)
    assert padded.shape == (len(lengths), max(lengths), 2, 3)
    for row, part in zip(padded, packed.split(lengths), strict=True):
        assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()
    assert torch.equal(unpad(padded, tokens), packed)


def test_equal_lengths_are_not_copied() -> None:
    packed = torch.randn(12, 3)
    tokens = PackedTokens(packed, torch.ones(12), torch.tensor([4, 4, 4]), torch.zeros(3, 8))
    assert pad(packed, tokens).data_ptr() == packed.data_ptr()
    assert unpad(pad(packed, tokens), tokens).data_ptr() == packed.data_ptr()


def test_layout_after_a_merge_is_that_of_its_lengths(seed: int) -> None:
    tokens = merge(PackedTokens.start(torch.randn(3, 21, 4)), torch.randn(63, 3), 0.7)
    again = Layout.of(tokens.lengths)
    assert again.lengths == tokens.layout.lengths
    if again.place is None or tokens.layout.place is None:
        assert again.place is tokens.layout.place
    else:
        assert torch.equal(again.place, tokens.layout.place)


def test_log_size_bias(seed: int) -> None:
    sizes = torch.tensor([1.0, 3, 2, 1, 5])
    tokens = PackedTokens(torch.randn(5, 2), sizes, torch.tensor([3, 2]), torch.zeros(2, 6))
    bias = log_size_bias(tokens)
    assert bias is not None and bias.dtype == torch.float32
    expected = [[0, math.log(3), math.log(2)], [0, math.log(5), -math.inf]]
    torch.testing.assert_close(bias, torch.tensor(expected)[:, None, None, :])


def test_no_bias_before_the_first_merge(seed: int) -> None:
    tokens = PackedTokens.start(torch.randn(2, 9, 4))
    assert log_size_bias(tokens) is None
    assert log_size_bias(merge(tokens, torch.randn(18, 3), 2.0)) is None
    assert log_size_bias(merge(tokens, torch.randn(18, 3), -2.0)) is not None


def test_live_rows() -> None:
    tokens = PackedTokens(torch.randn(8, 2), torch.ones(8), torch.tensor([3, 1, 4]), torch.zeros(3, 6))
    rows, image, number = live_rows(tokens)
    assert rows.tolist() == [1, 2, 5, 6, 7]
    assert image.tolist() == [0, 0, 2, 2, 2]
    assert number.tolist() == [0, 1, 0, 1, 2]
