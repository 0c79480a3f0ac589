"""No limit, and no order of requests, leaves one of them waiting for ever."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from tests.support.configurations import MERGES, PRUNES
from tests.support.scheduler_bench import LIVE, Bench, Prompt
from tests.support.scheduler_scenes import count, play
from tests.support.tiny_checkpoints import PATCHES

both_schedulers = pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one step ahead"])
SCENES, PARTS = 1000, 20
# The others are slow.
QUICK_PARTS = 4


def three(first: str, second: str, third: str) -> Prompt:
    """A prompt of three images."""
    return Prompt().text(5).image(first).image(second).image(third).text(20)


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_an_image_is_not_held_for_a_request_that_does_not_run(policy: str) -> None:
    """Three images nearly fill the encoder's cache of 2056, of which one would stay for another request."""
    bench = Bench(PRUNES, ahead=True, scheduling_policy=policy, enable_prefix_caching=False)
    encodings = bench.scheduler.encoder_cache_manager
    assert encodings.cache_size == 2056
    bench.ask(Prompt().text(5).image("cat").text(20))
    bench.finish()
    bench.ask(Prompt().text(5).image("sky").image("street").text(20), max_tokens=4)
    bench.step()
    blocked = bench.ask(three("cat", "crowd", "noise"), priority=1)
    assert blocked not in bench.step().num_scheduled_tokens
    assert not encodings.cached["cat"]
    urgent = bench.ask(three("blank", "sky", "street"))
    if policy == "fcfs":
        # As a preempted request would, it goes before the one that waits.
        bench.scheduler.waiting.remove_request(bench.requests[urgent])
        bench.scheduler.waiting.prepend_request(bench.requests[urgent])
    bench.finish()


@both_schedulers
@pytest.mark.parametrize(
    "options",
    [
        {"long_prefill_token_threshold": 256},
        {"long_prefill_token_threshold": 1, "long_prefill_token_threshold_adaptive": True},
        {"max_num_scheduled_tokens": 512},
        {"max_num_batched_tokens": 128},
        {"max_num_batched_tokens": PATCHES},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048, "max_num_scheduled_tokens": 600},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_limits_below_an_image_let_images_through(ahead: bool, options: dict[str, Any]) -> None:
    bench = Bench(MERGES, ahead, **options)
    for name in ("cat", "street", "noise", "cat"):
        bench.ask(Prompt().text(40).image(name).text(20))
    bench.finish()


@both_schedulers
def test_step_limits_below_a_pruned_prompt_let_it_through(ahead: bool) -> None:
    bench = Bench(PRUNES, ahead, max_num_scheduled_tokens=512, max_num_batched_tokens=256)
    for name in ("cat", "street", "noise", "cat"):
        bench.ask(Prompt().text(40).image(name).image("sky").text(20))
    bench.finish()


def test_a_running_request_gets_encodings_before_those_behind_it() -> None:
    """The cache holds one image, which others would ask for in every step."""
    bench = Bench(MERGES, ahead=True, max_num_batched_tokens=1400, enable_prefix_caching=False)
    encodings = bench.scheduler.encoder_cache_manager
    encodings.cache_size = encodings.num_free_slots = encodings.num_freeable_slots = PATCHES
    first = bench.ask(Prompt().text(5).image("cat").image("street").text(5), max_tokens=1)
    for _ in range(40):
        if first not in bench.scheduler.requests:
            break
        bench.ask(Prompt().text(5).image("cat").text(5), max_tokens=1)
        bench.step()
    else:
        raise AssertionError("others take the room each time")
    bench.finish()


@both_schedulers
def test_long_texts_do_not_overtake_an_image_for_ever(ahead: bool) -> None:
    """They leave each step less room than the image takes, and those behind it would fill that."""
    tokens = 700
    bench = Bench(MERGES, ahead, max_num_batched_tokens=tokens, enable_prefix_caching=False)
    for length in (tokens - 500, 2 * tokens):
        bench.ask(Prompt().text(length), max_tokens=1)
    bench.step()
    image = bench.ask(Prompt().image("cat").text(5), max_tokens=1)
    for _ in range(20):
        while len(bench.scheduler.requests) < 6:
            bench.ask(Prompt().text(2 * tokens), max_tokens=1)
        if image not in bench.scheduler.requests:
            break
        bench.step()
    else:
        raise AssertionError("others take the room each time")
    bench.finish()


def preempting_bench(*prompts: Prompt, tokens: int) -> Bench:
    """A pool that lacks one block when these and 96 tokens of text have been computed; an image a step."""
    blocks = sum(-(-len(prompt.ids) // 16) for prompt in [*prompts, Prompt().text(96)])
    bench = Bench(
        MERGES,
        num_blocks=1 + blocks,
        scheduling_policy="priority",
        enable_prefix_caching=False,
        max_model_len=1776,
        max_num_batched_tokens=tokens,
    )
    bench.scheduler.max_num_encoder_input_tokens = PATCHES
    # No count is told, so no hole is given back.
    bench.worker.silent = set(LIVE)
    return bench


def test_an_image_of_a_request_preempted_in_its_step_is_encoded_later() -> None:
    """vLLM counts it as encoded; nobody has."""
    prompt = three("crowd", "noise", "cat")
    bench = preempting_bench(prompt, tokens=800)
    first = bench.ask(prompt, priority=1)
    bench.step()
    bench.ask(Prompt().text(96), max_tokens=40)
    bench.step()
    assert first not in bench.step().num_scheduled_tokens
    assert bench.preemptions() == 1
    assert "cat" not in bench.scheduler.encoder_cache_manager.cached
    bench.finish()


def test_an_image_of_a_request_preempted_in_its_step_is_encoded_for_another() -> None:
    """The other counted on it in the same step."""
    prompt, other = three("crowd", "street", "noise"), Prompt().text(5).image("crowd").image("noise").text(5)
    bench = preempting_bench(prompt, other, tokens=1400)
    first = bench.ask(prompt, priority=2)
    bench.step()
    second = bench.ask(other, priority=1)
    bench.ask(Prompt().text(96), max_tokens=40)
    bench.step()
    output = bench.step()
    assert first not in output.num_scheduled_tokens
    assert output.scheduled_encoder_inputs == {second: [1]}
    bench.finish()


@both_schedulers
def test_an_identifier_used_again_for_a_plainer_picture_frees_nothing_in_use(ahead: bool) -> None:
    """Clients may name pictures as they like; a count is a request's own from when its image is filled."""
    bench = Bench(MERGES, ahead, max_num_batched_tokens=1200, enable_prefix_caching=False)
    # The second image waits for a step of its own.
    name = bench.ask(Prompt().text(5).image("street").text(600).image("cat").text(5), max_tokens=30)
    bench.step()
    if ahead:
        bench.step()
    held = bench.held(name)
    assert 311 // 16 in held[0]
    bench.scheduler.live_counts["street"] = 17
    bench.step()
    assert 311 // 16 in bench.held(name)[0]
    bench.finish()


@pytest.mark.parametrize(
    "part",
    [*range(QUICK_PARTS), *(pytest.param(n, marks=pytest.mark.slow) for n in range(QUICK_PARTS, PARTS))],
)
def test_random_limits_and_traffic(part: int) -> None:
    """Fresh scenes each run; a failing one names its seed (see ``scheduler_scenes``)."""
    ends: Counter[str] = Counter()
    first = random.randrange(1 << 32)
    for seed in range(first, first + SCENES // PARTS):
        count(ends, play(seed))
    assert ends["answered"] > SCENES // PARTS // 4, ends
