"""Holes of images go back to the block pool, exactly and at once, and nothing leaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.engines import TIGHT, Ask, Served, at_rest, hybrid_section, images, serve, serve_stock
from tests.support.reference import keep_count
from tests.support.tiny_checkpoints import PATCHES, prompt


def steps(served: Served, asks: list[Ask], max_tokens: int, look: Callable[[], Any]) -> list[Any]:
    """Run requests to their end and look at the engine after every step."""
    from vllm import SamplingParams

    engine = served.llm.llm_engine
    for number, ask in enumerate(asks):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(f"request-{number}", ask.request(), params)
    seen = []
    while engine.has_unfinished_requests():
        engine.step()
        seen.append(look())
    return seen


def expected_blocks(served: Served, ask: Ask, length: int) -> dict[str, int]:
    """Blocks of each tier that hold any slot in use, from the reference's counts alone."""
    ids = served.reference.prompt_ids(ask.text)
    placeholder = served.reference.config.image_token_index
    starts = [i for i, t in enumerate(ids) if t == placeholder and (i == 0 or ids[i - 1] != placeholder)]
    live = [served.reference.live(image) for image in ask.images]
    ratio = served.hybrid.get("fastv_ratio", 0)
    slots = {"lower": live, "upper": [keep_count(n, ratio) for n in live]}
    blocks = {}
    for tier, manager in served.scheduler.tier_managers.items():
        used = set(range(length))
        for start, count in zip(starts, slots[str(tier)], strict=True):
            used -= set(range(start + count, start + PATCHES))
        blocks[str(tier)] = len({slot // manager.block_size for slot in used})
    return blocks


@pytest.mark.parametrize("mode", ["dymu", "fastv", "both"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_request_holds_exactly_the_blocks_it_needs(mode: str, count: int) -> None:
    served = serve(hybrid_section(mode))
    ask = Ask(prompt("What is here?", count), images(8)[:count])
    length = len(served.reference.prompt_ids(ask.text))

    def held() -> tuple[dict[str, int], int, int]:
        scheduler = served.scheduler
        request = next(iter(scheduler.running), None)
        if request is None:
            return {}, 0, 0
        blocks = {
            str(tier): sum(not b.is_null for b in manager.req_to_blocks[request.request_id])
            for tier, manager in scheduler.tier_managers.items()
        }
        return blocks, request.num_computed_tokens, served.pool.get_num_free_blocks()

    seen = [entry for entry in steps(served, [ask], 40, held) if entry[1] > length]
    assert len(seen) > 20
    for blocks, computed, free in seen:
        assert blocks == expected_blocks(served, ask, computed)
        assert free == served.pool.num_gpu_blocks - 1 - sum(blocks.values())
    assert sum(seen[0][0].values()) < sum(
        math.ceil(length / m.block_size) for m in served.scheduler.tier_managers.values()
    )
    assert at_rest(served)


def test_freed_blocks_serve_others_while_their_first_owner_decodes() -> None:
    """In a pool of the same bytes ours runs at least twice as many requests together as stock."""
    asks = [Ask(prompt("What is here?"), (image,)) for image in images(8)]
    most = {}
    for name, served in {"stock": serve_stock(), "ours": serve(hybrid_section("both"), **TIGHT)}.items():
        preempted: list[int] = []

        def look(served: Served = served, preempted: list[int] = preempted) -> int:
            preempted.append(sum(r.num_preemptions for r in served.scheduler.requests.values()))
            return len(served.scheduler.running)

        most[name] = max(steps(served, asks, 24, look))
        assert max(preempted) == 0 or name == "stock"
        assert at_rest(served)
    assert most["ours"] >= 2 * most["stock"]


def test_nothing_leaks_over_rounds_and_aborts() -> None:
    from vllm import SamplingParams

    served = serve(hybrid_section("both"))
    engine = served.llm.llm_engine
    for round_ in range(6):
        names = [f"round-{round_}-{i}" for i in range(4)]
        for i, name in enumerate(names):
            ask = Ask(prompt("What is here?", 1 + i % 2), images(8)[i : i + 1 + i % 2])
            engine.add_request(name, ask.request(), SamplingParams(max_tokens=8, ignore_eos=True))
        for _ in range(round_):
            engine.step()
        engine.abort_request(names[: 1 + round_ % 4])
        while engine.has_unfinished_requests():
            engine.step()
        engine.step()
        assert at_rest(served)
        assert not served.scheduler.given_back
        assert not served.scheduler.requests


def test_blocks_are_counted() -> None:
    """The running totals are the reference's counts."""
    served = serve(hybrid_section("both"))
    ask = Ask(prompt("What is here?"), (images(8)[5],))
    assert served.scheduler.reset_prefix_cache()
    before = dict(served.scheduler.totals)
    served.generate([ask], 4)
    grown = {name: total - before.get(name, 0) for name, total in served.scheduler.totals.items()}
    live = served.reference.live(ask.images[0])
    expected = expected_blocks(served, ask, len(served.reference.prompt_ids(ask.text)))
    length = len(served.reference.prompt_ids(ask.text))
    whole = sum(math.ceil(length / m.block_size) for m in served.scheduler.tier_managers.values())
    assert grown == {
        "images:default": 1,
        "patches:default": PATCHES,
        "live_tokens:default": live,
        "kept_tokens:default": keep_count(live, 0.5),
        "blocks_given_back:default": whole - sum(expected.values()),
    }
