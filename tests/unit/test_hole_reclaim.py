"""The scheduler and its blocks without a model: images whole, holes exact, nothing lost, nothing leaked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason

from tests.support.configurations import LEVELS, MERGES, PRUNES
from tests.support.scheduler_bench import LIVE, Bench, Prompt, block_sizes
from tests.support.tiny_checkpoints import PATCHES

both_schedulers = pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one step ahead"])
both_methods = pytest.mark.parametrize("hybrid", [PRUNES, MERGES], ids=["pruning", "merging"])


# With 48 and 16 tokens per block in the two tiers: the 311 live tokens end at 316, the 156 kept ones at 161
# and the hole at 581, which leaves 5 and 25 whole blocks inside it.
QUESTION = Prompt().text(5).image("street").text(20)
WHOLE = [set(range(13)), set(range(38))]
LEFT = [{*range(7), 12}, {*range(11), 36, 37}]
FREED = 30
TWO_IMAGES = Prompt().text(100).image("cat").text(100).image("street").text(5)


def total(bench: Bench, name: str, level: str | None = None) -> int:
    """What a scheduler counted of the images of one level, or of all."""
    counts = {tuple(key.split(":")): count for key, count in bench.scheduler.totals.items()}
    return sum(n for (counted, at), n in counts.items() if counted == name and level in (None, at))


@both_schedulers
def test_holes_go_back_when_the_step_that_filled_them_has_been_processed(ahead: bool) -> None:
    bench = Bench(ahead=ahead)
    name = bench.ask(QUESTION)
    bench.step()
    if ahead:
        assert bench.held(name) == WHOLE
        bench.step()
    assert bench.held(name) == LEFT
    assert total(bench, "blocks_given_back") == FREED
    bench.finish()


@pytest.mark.parametrize(
    ("before", "image", "first", "end"),
    [
        # A hole from slot 16 to 591, from 15 to 590, and from 17 to 592.
        (15, "blank", 1, 36),
        (14, "blank", 1, 36),
        (16, "blank", 2, 37),
        # From 90 to 576, with the next text in a block of its own.
        (0, "cat", 6, 36),
        # One slot, and none.
        (0, "crowd", 0, 0),
        (0, "noise", 0, 0),
    ],
)
@pytest.mark.parametrize("after", [0, 10])
def test_only_blocks_wholly_inside_a_hole_go_back(
    before: int, image: str, first: int, end: int, after: int
) -> None:
    bench = Bench(MERGES)
    prompt = Prompt().text(before).image(image).text(after)
    name = bench.ask(prompt)
    bench.step()
    everything = set(range(-(-len(prompt.ids) // 16)))
    assert bench.held(name) == [everything - set(range(first, end))]
    bench.finish()


def test_an_unknown_count_gives_nothing_back() -> None:
    bench = Bench()
    bench.worker.silent = {"street"}
    first = bench.ask(QUESTION)
    bench.step()
    assert bench.held(first) == WHOLE
    # A prompt that begins otherwise brings the count of another encoding.
    bench.scheduler.reset_encoder_cache()
    bench.worker.silent.clear()
    second = bench.ask(Prompt().text(5, first=500).image("street").text(20))
    bench.step()
    assert bench.held(first) == WHOLE and bench.held(second) == LEFT
    bench.finish()


def test_freed_blocks_serve_another_request_while_their_owner_decodes() -> None:
    """A pool that holds one whole prompt beside what is left of another."""
    bench = Bench(num_blocks=1 + sum(map(len, WHOLE)) + sum(map(len, LEFT)), max_model_len=640)
    other = Prompt().text(5, first=500).image("street").text(20)
    first, second = bench.ask(QUESTION), bench.ask(other)
    ids = [set(itertools.chain(*bench.step().scheduled_new_reqs[0].block_ids)) for _ in range(2)]
    assert [request.request_id for request in bench.scheduler.running] == [first, second]
    assert len(ids[0] & ids[1]) == FREED
    assert bench.pool.get_num_free_blocks() == FREED
    bench.finish()
    assert bench.preemptions() == 0


@both_schedulers
def test_a_preempted_request_starts_over(ahead: bool) -> None:
    bench = Bench(ahead=ahead)
    name = bench.ask(QUESTION)
    for _ in range(5):
        bench.step()
    bench.preempt_all()
    assert bench.all_free()
    # Up to the prompt's end, although the answer has begun, and then what was known of the answer.
    assert bench.step().num_scheduled_tokens == {name: len(QUESTION.ids)}
    assert bench.step().num_scheduled_tokens == {name: 5 - ahead}
    assert bench.held(name) == LEFT
    bench.finish()
    assert total(bench, "images") == 1
    assert total(bench, "blocks_given_back") == 2 * FREED


@both_schedulers
def test_images_of_a_request_preempted_between_them_are_counted(ahead: bool) -> None:
    bench = Bench(MERGES, ahead, max_num_batched_tokens=800)
    bench.ask(TWO_IMAGES)
    bench.step()
    bench.preempt_all()
    bench.finish()
    assert total(bench, "images") == 2


@both_schedulers
@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_request_that_lost_a_page_ends_with_an_error_and_alone(ahead: bool, after: int) -> None:
    """Also when the very step that found it would have been its last."""
    bench = Bench(PRUNES, ahead)
    lost, other, text = bench.ask(QUESTION), bench.ask(TWO_IMAGES), bench.ask(Prompt().text(30))
    # Another API server's, which nobody else tells anything.
    bench.requests[lost].client_index = 1
    for _ in range(after):
        bench.step()
    bench.worker.lost = {lost}
    answered = len(bench.requests[lost].output_token_ids)
    bench.finish()
    assert bench.reasons[lost] is FinishReason.ERROR
    assert len(bench.requests[lost].output_token_ids) <= answered + ahead
    assert bench.reasons[other] is bench.reasons[text] is FinishReason.LENGTH


@both_schedulers
def test_no_prompt_finds_a_lost_request_s_pages_in_the_prefix_cache(ahead: bool) -> None:
    bench = Bench(PRUNES, ahead)
    prompt = Prompt().text(700)
    lost, twin = bench.ask(prompt), bench.ask(Prompt().text(650, first=5000))
    for _ in range(3):
        bench.step()
    bench.worker.lost = {lost}
    while lost not in bench.reasons:
        bench.step()
    again, shared = bench.ask(prompt), bench.ask(Prompt().text(650, first=5000))
    found = {new.req_id: new.num_computed_tokens for new in bench.step().scheduled_new_reqs}
    assert found[again] == 0 < found[shared]
    bench.finish()
    assert bench.reasons[again] is bench.reasons[twin] is bench.reasons[shared] is FinishReason.LENGTH


def test_a_known_count_frees_nothing_that_a_step_under_way_fills() -> None:
    """Both counts are known, but only the step with the first image has been processed."""
    # One image fits in a step, both in the encoder's cache.
    bench = Bench(MERGES, ahead=True, max_num_batched_tokens=1200, enable_prefix_caching=False)
    bench.ask(TWO_IMAGES)
    bench.finish()
    name = bench.ask(TWO_IMAGES)
    for _ in range(2):
        bench.step()
    # Holes from 190 to 676 and, later, from 1087 to 1352.
    assert bench.held(name) == [set(range(85)) - set(range(12, 42))]
    bench.step()
    assert bench.held(name) == [set(range(85)) - set(range(12, 42)) - set(range(68, 84))]
    bench.finish()


@both_methods
@both_schedulers
def test_a_small_pool_loses_nothing(hybrid: dict[str, Any], ahead: bool) -> None:
    """The prompts fit, their answers do not."""
    bench = Bench(hybrid, ahead, num_blocks=87 if hybrid is PRUNES else 65, max_model_len=1024)
    for _ in range(4):
        bench.ask(QUESTION, max_tokens=400)
    bench.finish()
    assert bench.preemptions() > 0
    assert total(bench, "images") == 4


@both_schedulers
@pytest.mark.parametrize("steps", range(6))
def test_an_aborted_request_returns_everything(steps: int, ahead: bool) -> None:
    """Waiting, between its images, with a step under way, decoding."""
    bench = Bench(MERGES, ahead, max_num_batched_tokens=800)
    name = bench.ask(TWO_IMAGES, max_tokens=20)
    for _ in range(steps):
        bench.step()
    bench.abort(name)
    assert bench.all_free()
    bench.finish()


def test_an_image_that_does_not_fit_waits() -> None:
    """Of 800 positions in a step the second image gets a step of its own."""
    bench = Bench(MERGES, max_num_batched_tokens=800)
    name = bench.ask(TWO_IMAGES)
    assert [bench.step().num_scheduled_tokens[name] for _ in range(3)] == [776, 581, 1]
    bench.finish()


def test_a_pruned_prompt_waits_for_room_for_all_its_images() -> None:
    bench = Bench()
    bench.scheduler.max_num_encoder_input_tokens = 2 * PATCHES
    first, second = bench.ask(Prompt().image("crowd").text(20)), bench.ask(TWO_IMAGES)
    assert bench.step().num_scheduled_tokens == {first: 596}
    assert bench.step().num_scheduled_tokens == {first: 1, second: len(TWO_IMAGES.ids)}
    bench.finish()


@both_methods
def test_running_ahead_changes_no_result(hybrid: dict[str, Any]) -> None:
    totals = []
    for ahead in (False, True):
        bench = Bench(hybrid, ahead)
        for number, image in enumerate(LIVE):
            bench.ask(Prompt().text(number).image(image).text(10 * number), max_tokens=3 + number)
            bench.step()
        bench.finish()
        totals.append(bench.scheduler.totals)
        assert total(bench, "live_tokens") == sum(LIVE.values())
    assert totals[0] == totals[1]


# ---- levels ---------------------------------------------------------------------------------------


@both_schedulers
def test_images_are_counted_at_their_levels(ahead: bool) -> None:
    """Which of them share a prompt does not matter."""
    bench = Bench(LEVELS, ahead)
    bench.ask(Prompt().text(5).image("street").text(3).image("cat@mid").text(9))
    bench.ask(Prompt().text(7).image("cat@high").text(3).image("cat@full").text(9))
    bench.ask(Prompt().text(9).image("blank@mid").text(3))
    bench.finish()
    levels = ("low", "mid", "high", "full")
    assert [total(bench, "images", level) for level in levels] == [1, 2, 1, 1]
    assert [total(bench, "patches", level) for level in levels] == [PATCHES, 2 * PATCHES, PATCHES, PATCHES]
    merged = LIVE["cat"] + LIVE["blank"]
    assert [total(bench, "live_tokens", level) for level in levels] == [
        LIVE["street"],
        merged,
        LIVE["cat"],
        PATCHES,
    ]
    assert [total(bench, "kept_tokens", level) for level in levels] == [
        -(-LIVE["street"] // 2),
        merged,
        -(-LIVE["cat"] // 4),
        PATCHES,
    ]


@both_schedulers
def test_a_picture_at_two_levels_is_two_pictures(ahead: bool) -> None:
    bench = Bench(LEVELS, ahead)
    for level in ("low", "mid", "low", "full", "mid"):
        bench.ask(Prompt().text(5).image(f"cat@{level}").text(20))
        while bench.scheduler.has_unfinished_requests():
            bench.step()
    bench.finish()
    assert [total(bench, "images", level) for level in ("low", "mid", "full")] == [2, 2, 1]
    # Once at each level.
    assert sorted(bench.worker.encodings.values()) == [1, 1, 1]


def test_only_pruned_images_wait_for_room_up_to_the_end_of_their_prompts() -> None:
    bench = Bench(LEVELS)
    bench.scheduler.max_num_scheduled_tokens = 1000
    first = bench.ask(Prompt().text(300))
    pruned = bench.ask(Prompt().image("cat@high").text(300))
    assert bench.step().num_scheduled_tokens == {first: 300}
    assert bench.step().num_scheduled_tokens == {first: 1, pruned: PATCHES + 300}
    for level in ("mid", "full"):
        bench = Bench(LEVELS)
        bench.scheduler.max_num_scheduled_tokens = 1000
        first, whole = bench.ask(Prompt().text(300)), bench.ask(Prompt().image(f"cat@{level}").text(300))
        assert bench.step().num_scheduled_tokens == {first: 300, whole: 700}
        bench.finish()


@pytest.mark.parametrize(("level", "freed"), [("low", FREED), ("mid", 5 + 16), ("full", 0)])
def test_blocks_go_back_as_a_level_leaves_holes(level: str, freed: int) -> None:
    """At "mid" both tiers keep all live tokens: the upper one has 16 blocks in the hole."""
    bench = Bench(LEVELS)
    bench.ask(Prompt().text(5).image(f"street@{level}").text(20))
    bench.finish()
    assert total(bench, "blocks_given_back") == total(bench, "blocks_given_back", level) == freed


@both_schedulers
def test_nothing_switched_on_is_vllms_own_scheduler(ahead: bool) -> None:
    """Ours decides the same where no token is merged and no image would be cut."""
    stock, ours = Bench({}, ahead), Bench(MERGES, ahead)
    assert type(stock.scheduler) is (AsyncScheduler if ahead else Scheduler)
    assert isinstance(ours.scheduler, type(stock.scheduler))
    for prompt in [Prompt().text(300), Prompt().text(5).image("noise").text(9), Prompt().text(70)]:
        stock.ask(prompt)
        ours.ask(prompt)
        assert stock.step().num_scheduled_tokens == ours.step().num_scheduled_tokens
    while stock.scheduler.has_unfinished_requests():
        assert stock.step().num_scheduled_tokens == ours.step().num_scheduled_tokens
    for bench in (stock, ours):
        bench.finish()


def random_prompt(rng: random.Random, longest: int, images: Sequence[str]) -> Prompt:
    """Up to three images with texts around them, of which some begin like others."""
    prompt = Prompt().text(rng.choice([0, 5, 5, 96, 200]))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        prompt = prompt.image(rng.choice(images)).text(rng.choice([0, 1, 3, 60]), rng.randrange(9))
    return prompt if 1 < len(prompt.ids) <= longest else random_prompt(rng, longest, images)


def images_of(bench: Bench) -> list[str]:
    """Identifiers of all images: few pictures, at each level where there are several."""
    levels = [f"@{name}" for name in bench.asked.levels if name != "default"]
    return [*LIVE, *(name + level for name in LIVE for level in levels)]


def random_bench(rng: random.Random, method: str, ahead: bool) -> Bench:
    """Blocks of any size in a pool that holds one or two of the longest requests."""
    length = rng.choice([1000, 2048])
    options: dict[str, Any] = {"max_num_seqs": rng.choice([2, 4, 8]), "max_model_len": length}
    hybrid: dict[str, Any] = MERGES
    if method != "merging":
        hybrid = LEVELS if method == "levels" else {"fastv_ratio": rng.choice([0.25, 0.5, 0.9])}
        hybrid = hybrid | {"fastv_layer": rng.choice([1, 2, 3, 5, 7])}
    else:
        options["max_num_batched_tokens"] = rng.choice([600, 800, 1500])
    block_size = rng.choice([4, 8, 16, 32])
    tokens = length * rng.choice([1, 1.2, 2])
    bench = Bench(
        hybrid,
        ahead,
        num_blocks=sum(int(tokens / size) + 2 for size in block_sizes(hybrid, block_size).values()),
        block_size=block_size,
        scheduling_policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.7,
        **options,
    )
    bench.worker.silent = {name for name in images_of(bench) if rng.random() < 0.05}
    return bench


@both_schedulers
@pytest.mark.parametrize("method", ["pruning", "merging", "levels"])
@pytest.mark.parametrize(
    "run", [*range(10), *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 30))]
)
def test_random_traffic(method: str, ahead: bool, run: int, seed: int) -> None:
    rng = random.Random(seed)
    bench = random_bench(rng, method, ahead)
    images = images_of(bench)
    answer = rng.choice([5, 50, 200])
    while len(bench.requests) < 12:
        if rng.random() < 0.3:
            prompt = random_prompt(rng, bench.length - answer, images)
            bench.ask(prompt, max_tokens=rng.randint(1, answer), priority=rng.randrange(3))
        if rng.random() < 0.03 and bench.scheduler.requests:
            bench.abort(rng.choice(list(bench.scheduler.requests)))
        if rng.random() < 0.02:
            bench.preempt_all()
        bench.step()
    bench.finish()
