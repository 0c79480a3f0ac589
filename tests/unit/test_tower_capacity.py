"""Rows that the tower's layers are granted: learned from past batches, never trusted where they failed."""

from __future__ import annotations

import itertools
import random

import pytest

from vllm_hybrid.models.tower_capacity import (
    BUCKETS,
    FEWEST,
    LONGEST_PAUSE,
    SLACK,
    STEPS,
    TRUSTED_AFTER,
    WINDOW,
    TowerCapacity,
    row_buckets,
)

LENGTH, LAYERS = 577, 3


def batch(capacity: TowerCapacity, kinds: list[str], left: list[list[int]]) -> tuple[bool, bool]:
    """One batch as the tower takes it: whether fewer rows were granted, and whether it was run again."""
    granted = capacity.rows(kinds, LENGTH, LAYERS)
    failed = granted is not None and any(sum(layer) > rows for layer, rows in zip(left, granted, strict=True))
    if granted is not None:
        capacity.count(failed)
    capacity.learn(kinds, left)
    return granted is not None, failed


def learned(kinds: list[str], left: list[list[int]]) -> TowerCapacity:
    """One that has seen as many of a batch as it takes."""
    capacity = TowerCapacity()
    for _ in range(FEWEST):
        capacity.learn(kinds, left)
    return capacity


def alike(images: int, *tokens: int) -> list[list[int]]:
    return [[left] * images for left in tokens]


def test_a_kind_that_was_seldom_seen_gets_a_row_for_every_token() -> None:
    capacity = TowerCapacity()
    for _ in range(FEWEST):
        assert capacity.rows(["low"], LENGTH, LAYERS) is None
        capacity.learn(["low"], alike(1, 400, 200, 100))
    assert capacity.rows(["low"], LENGTH, LAYERS) is not None
    assert capacity.rows(["low", "high"], LENGTH, LAYERS) is None


def test_rows_are_a_little_more_than_was_needed_rounded_up_and_never_more_than_before() -> None:
    capacity = learned(["low"] * 2, [[500, 300], [100, 300], [90, 110]])
    granted = capacity.rows(["low"] * 10, LENGTH, LAYERS)
    step = -(-10 * LENGTH // STEPS)
    assert granted is not None and all(rows % step == 0 for rows in granted)
    for rows, needed in zip(granted, (4000, 2000, 1000), strict=True):
        assert needed * SLACK <= rows < needed * SLACK + step
    for _ in range(WINDOW):
        capacity.learn(["low"], alike(1, 300, 577, 577))
    assert len(set(capacity.rows(["low"] * 10, LENGTH, LAYERS) or [])) == 1
    for _ in range(WINDOW):
        capacity.learn(["low"], alike(1, 577, 577, 577))
    assert capacity.rows(["low"] * 10, LENGTH, LAYERS) == [10 * LENGTH] * LAYERS


def test_kinds_in_one_batch_are_granted_rows_each() -> None:
    capacity = learned(["low", "full"], [[100, 577], [64, 577], [32, 577]])
    (rows, *_) = capacity.rows(["low", "full", "full"], LENGTH, LAYERS) or []
    assert 2 * 577 + 100 < rows <= 3 * 577
    (rows, *_) = capacity.rows(["low"] * 3, LENGTH, LAYERS) or []
    assert 300 < rows < 577


def test_what_single_pictures_differ_by_counts_by_the_root_of_their_number() -> None:
    capacity = TowerCapacity()
    for tokens in (100, 200) * FEWEST:
        capacity.learn(["low"], alike(1, *[tokens] * LAYERS))
    for images in (1, 4, 16):
        (rows, *_) = capacity.rows(["low"] * images, LENGTH, LAYERS) or []
        wanted = SLACK * (images * 150 + images**0.5 * 50)
        assert wanted <= rows < wanted + -(-images * LENGTH // STEPS) + 1


def test_pictures_long_ago_are_forgotten() -> None:
    capacity = learned(["low"], alike(1, 500, 500, 500))
    for _ in range(WINDOW):
        capacity.learn(["low"], alike(1, 100, 100, 100))
    assert max(capacity.rows(["low"] * 4, LENGTH, LAYERS) or []) < 4 * 150


def test_pauses_grow_with_failures_and_shrink_with_trust() -> None:
    capacity = learned(["low"], alike(1, 1, 1, 1))
    for pause in [1, 2, 4, 8, 16, 32, 64, 64]:
        assert capacity.rows(["low"], LENGTH, LAYERS) is not None
        capacity.count(True)
        for _ in range(pause):
            assert capacity.rows(["low"], LENGTH, LAYERS) is None
    for _ in range(TRUSTED_AFTER):
        assert capacity.rows(["low"], LENGTH, LAYERS) is not None
        capacity.count(False)
    capacity.count(True)
    paused = [capacity.rows(["low"], LENGTH, LAYERS) is None for _ in range(LONGEST_PAUSE)]
    assert sum(paused) == LONGEST_PAUSE // 2


def spiteful(number: int) -> int:
    """Blank until what was busy is forgotten and the pause is over, then busy once."""
    return 577 if number % (WINDOW + 1) == WINDOW else 5


def alternating(number: int) -> int:
    return 577 if number % 2 else 5


@pytest.mark.parametrize("traffic", [alternating, spiteful])
def test_pictures_chosen_to_fail_cost_a_second_run_now_and_then(traffic: object) -> None:
    capacity = TowerCapacity()
    assert callable(traffic)
    for number in range(5000):
        batch(capacity, ["low"] * 8, alike(8, *[traffic(number)] * LAYERS))
    assert capacity.reruns <= 5000 // (LONGEST_PAUSE + 1) + 7


def test_pictures_at_random_seldom_fail_and_save_rows(seed: int) -> None:
    draw = random.Random(seed)
    capacity = TowerCapacity()
    guessed = 0
    for _ in range(2000):
        own = [draw.lognormvariate(4.5, 0.5) for _ in range(draw.randint(1, 25))]
        left = [[min(577, int(x * factor) + 1) for x in own] for factor in (4, 2, 1)]
        guessed += batch(capacity, ["low"] * len(own), left)[0]
    assert capacity.reruns < 50 and guessed > 1700


@pytest.mark.parametrize("images", [1, 3])
def test_buckets_have_room_for_what_batches_that_fall_on_their_lines_are_granted(images: int) -> None:
    layers = 23
    buckets = row_buckets(images, LENGTH, layers)
    assert buckets[0] == [images * LENGTH] * layers
    for left, rows in zip(BUCKETS, buckets, strict=True):
        assert rows == sorted(rows, reverse=True) and rows[0] <= images * LENGTH
        fall = [round(LENGTH * (1 - (1 - left) * layer / layers)) for layer in range(1, layers + 1)]
        kinds = ["kind"] * images
        granted = learned(kinds, [[tokens] * images for tokens in fall]).rows(kinds, LENGTH, layers)
        assert granted is not None
        assert all(own >= wanted for own, wanted in zip(rows, granted, strict=True))
    for more, less in itertools.pairwise(buckets):
        assert all(a >= b for a, b in zip(more, less, strict=True)) and more[-1] > less[-1]
