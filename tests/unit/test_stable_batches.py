"""Batches of named things: random by seed, full, and nearly the same when a thing comes or goes."""

from __future__ import annotations

import random
import string

import pytest

from vllm_hybrid.tools.stable_batches import stable_batches


def random_names(draw: random.Random, number: int) -> list[str]:
    letters = string.ascii_letters + "/_.\udcff"
    return list({"".join(draw.choices(letters, k=12)) for _ in range(number)})


def named(names: list[str], batch_size: int, seed: int = 0) -> list[list[str]]:
    return [[names[number] for number in batch] for batch in stable_batches(names, batch_size, seed)]


@pytest.mark.parametrize(
    ("things", "batch_size", "sizes"),
    [
        (48, 16, [16, 16, 16]),
        (49, 16, [16, 16, 9, 8]),
        (17, 16, [9, 8]),
        (16, 16, [16]),
        (3, 16, [3]),
        (5, 2, [2, 2, 1]),
        (4, 1, [1, 1, 1, 1]),
    ],
)
def test_batches_are_full_and_the_last_two_alike(
    draw: random.Random, things: int, batch_size: int, sizes: list[int]
) -> None:
    batches = stable_batches(random_names(draw, things), batch_size, 0)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(number for batch in batches for number in batch) == list(range(things))


def test_batches_depend_on_the_names_and_the_seed_alone(draw: random.Random) -> None:
    names = random_names(draw, 200)
    mixed = draw.sample(names, len(names))
    assert named(names, 16) == named(mixed, 16) != named(names, 16, seed=1)


def test_few_batches_change_when_a_thing_goes_or_comes(draw: random.Random) -> None:
    """About as many as the logarithm of the number of batches, and the two that share what is left."""
    names = random_names(draw, 800)
    before = set(map(frozenset, named(names, 8)))
    changed = []
    for gone in draw.sample(names, 40):
        after = set(map(frozenset, named([name for name in names if name != gone], 8)))
        changed.append(len(before - after))
        assert changed[-1] >= 1
    assert len(before) >= 95 and sum(changed) / len(changed) < 15


def test_neighbours_by_name_are_dealt_out_at_random() -> None:
    """As of a shuffled list: of 30 things in a row, few come to lie in one of 30 batches."""
    names = [f"picture-{number:04}.jpg" for number in range(300)]
    for batch in stable_batches(names, 10, 0):
        assert len({number // 30 for number in batch}) >= 3
