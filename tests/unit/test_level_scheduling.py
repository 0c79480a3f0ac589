"""Images of several levels in the scheduler: each is computed, kept and found again as its own level says."""

from __future__ import annotations

import random

import pytest

from tests.support.configurations import LEVELS, MERGES
from tests.support.scheduler_bench import HEADER, LIVE, PATCHES, Bench, Prompt

# Both servers may compute as much in a step: one that prunes raises a lower limit.
STEP = {"max_num_batched_tokens": 4096}
BY_TURNS = LEVELS | {"fastv_rank": "turn_end", "assistant_header": HEADER}


def schedule_of(bench: Bench, prompts: list[Prompt]) -> list[dict[str, int]]:
    """What each step computes of each request, where they all come at once."""
    for prompt in prompts:
        bench.ask(prompt, 5)
    steps = []
    while bench.scheduler.has_unfinished_requests():
        steps.append(dict(bench.step().num_scheduled_tokens))
    return steps


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one step ahead"])
def test_images_that_lose_nothing_are_scheduled_as_where_nothing_is_pruned(
    draw: random.Random, ahead: bool
) -> None:
    """Text and images in any order, cut over steps where text may be: step for step the same."""
    prompts = []
    for number in range(1, 13):
        # All begin in their own way: with blocks of other sizes more or less is shared inside a step.
        prompt = Prompt().text(draw.choice([1, 40, 900]), 10_000 * number)
        for _ in range(draw.randrange(3)):
            prompt = prompt.image(draw.choice(list(LIVE))).text(draw.choice([1, 60, 200]), draw.randrange(90))
        prompts.append(prompt.text(1))
    at_mid = [Prompt(p.ids, [(start, f"{name}@mid") for start, name in p.images]) for p in prompts]
    pruning = schedule_of(Bench(LEVELS, ahead, max_model_len=2600, **STEP), at_mid)
    assert pruning == schedule_of(Bench(MERGES, ahead, max_model_len=2600, **STEP), prompts)


@pytest.mark.parametrize("level", ["mid", "full"])
def test_another_question_about_an_image_that_loses_nothing_finds_it(level: str) -> None:
    bench = Bench(LEVELS)
    before = Prompt().text(20).image(f"cat@{level}")
    assert bench.answered(before.text(30)) == 0
    assert bench.answered(before.text(30, 500)) >= 20 + PATCHES


@pytest.mark.parametrize("level", ["low", "high"])
def test_another_question_about_a_pruned_image_does_not(level: str) -> None:
    bench = Bench(LEVELS)
    before = Prompt().text(20).image(f"cat@{level}")
    bench.answered(before.text(30))
    assert bench.answered(before.text(30, 500)) < 20
    assert bench.answered(before.text(30)) >= 20 + PATCHES


@pytest.mark.parametrize(
    ("first", "then"), [("low", "mid"), ("mid", "low"), ("full", "high"), ("mid", "full")]
)
def test_one_image_at_two_levels_is_two_images(first: str, then: str) -> None:
    bench = Bench(LEVELS)
    prompts = [Prompt().text(20).image(f"street@{level}").text(30) for level in (first, then)]
    assert bench.answered(prompts[0]) == 0
    assert bench.answered(prompts[1]) < 20 + 16
    assert bench.worker.encodings == {f"street@{first}": 1, f"street@{then}": 1}


def test_turns_go_on_behind_images_of_both_kinds() -> None:
    bench = Bench(BY_TURNS)
    talk = Prompt().text(10).image("cat@low").text(9, 300).header()
    for image in ("street@full", "cat@mid"):
        found = len(talk.ids)
        bench.answered(talk, 6)
        talk = talk.answer(6).text(5, 400).image(image).text(7, 500).header()
        assert bench.answered(talk, 1) >= found // 16 * 16


def test_what_is_given_back_follows_each_image_s_own_ratio() -> None:
    """The upper tier keeps a quarter, half or all of what is left of the same picture."""
    bench = Bench(LEVELS)
    upper = bench.managers[1]
    held = {}
    for level in ("low", "mid", "high", "full"):
        name = bench.ask(Prompt().image(f"street@{level}").text(16), 4)
        bench.step()
        bench.step()
        held[level] = sum(not block.is_null for block in upper.req_to_blocks[name])
        bench.finish()
    size, live = upper.block_size, LIVE["street"]
    text = 2
    expected = {"low": (live + 1) // 2, "mid": live, "high": -(-live // 4), "full": PATCHES}
    for level, kept in expected.items():
        assert 0 <= held[level] - (-(-kept // size) + text - 1) <= 1, level
