"""Batching, preemption, caching and sampling change no answer."""

from __future__ import annotations

import pytest

from tests.support.engines import (
    TIGHT,
    Ask,
    Served,
    at_rest,
    fingerprint,
    hybrid_section,
    images,
    logprob_gap,
    serve,
)
from tests.support.tiny_checkpoints import prompt

GAP = 1e-4


def crowd(served: Served) -> list[Ask]:
    """Sixteen different requests: one or two images, or none."""
    pictures = images(8)
    asks = [served.decided(picture) for picture in pictures]
    asks += [served.decided(pictures[i], pictures[i + 1]) for i in range(4)]
    return asks + [Ask(f"Numbers: {i} and {i + 1}") for i in range(4)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_alone_as_in_a_crowd(mode: str) -> None:
    served = serve(hybrid_section(mode))
    asks = crowd(served)
    together = served.generate(asks, 8)
    alone = [served.generate([ask], 8)[0] for ask in asks]
    assert logprob_gap(together, alone) <= GAP


def test_preempted_requests_answer_the_same() -> None:
    """A pool that holds the prompts, but not all their answers."""
    served = serve(hybrid_section("both"))
    asks = crowd(served)[:8]
    calm = served.generate(asks, 64)
    tight = serve(hybrid_section("both"), **TIGHT)
    preemptions = 0
    preempt = tight.scheduler._preempt_request

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(*args, **kwargs)

    tight.scheduler._preempt_request = counted
    try:
        crowded = tight.generate(asks * 2, 64)
    finally:
        tight.scheduler._preempt_request = preempt
    assert preemptions > 0
    assert logprob_gap(crowded, [*calm, *calm]) <= GAP
    assert at_rest(tight)


def test_chunked_text_leaves_images_whole() -> None:
    """With nothing pruned a prompt may take several steps; an image may not."""
    usual = serve(hybrid_section("dymu"))
    chunked = serve(hybrid_section("dymu"), max_num_batched_tokens=640, max_model_len=2048)
    text = "Numbers: 0 1 2 3 4 5 6 7 8 9. " * 8
    a, b = images(8)[:2]
    asks = [
        Ask(f"USER: {text} <image> {text} <image> What? ASSISTANT:", (a, b)),
        Ask(f"{text} Only text."),
        Ask(prompt("What is here?", 2), (b, a)),
    ]
    lengths: list[tuple[int, int, list[tuple[int, int]]]] = []
    schedule = chunked.scheduler.schedule

    def spied(*args: object, **kwargs: object) -> object:
        output = schedule(*args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            request = chunked.scheduler.requests[name]
            end = request.num_computed_tokens
            spans = [(f.mm_position.offset, f.mm_position.length) for f in request.mm_features]
            lengths.append((end - count, end, spans))
        return output

    chunked.scheduler.schedule = spied
    try:
        answers = chunked.generate(asks)
    finally:
        chunked.scheduler.schedule = schedule
    assert logprob_gap(answers, usual.generate(asks)) <= GAP
    chunked.check(asks, answers)
    assert sum(begin > 0 and end - begin > 1 for begin, end, _ in lengths) >= 2
    for begin, end, spans in lengths:
        assert not any(
            start < end < start + length or start < begin < start + length for start, length in spans
        )


@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_prefix_caching_changes_nothing(mode: str) -> None:
    served = serve(hybrid_section(mode))
    assert served.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    text = "Read this first, it is the same for everybody. Numbers: 0 1 2 3 4 5 6 7 8 9. " * 8
    pictures = images(8)
    asks = [Ask(f"{text}<image> {question}?", (pictures[i],)) for i, question in enumerate(["What", "Who"])]
    asks += [Ask(f"{text} Only text {i}.") for i in range(2)]
    asks = [ask for ask in asks if served.is_decided(ask)]
    assert sum(bool(ask.images) for ask in asks) >= 1
    first = served.generate(asks)
    again = [served.generate([ask])[0] for ask in asks * 2]
    assert any(output.num_cached_tokens for output in again)
    assert logprob_gap(again, [*first, *first]) <= GAP
    served.check(asks, first)


def test_sampling_options() -> None:
    served = serve(hybrid_section("both"))
    pictures = images(8)
    asks = [served.decided(pictures[i]) for i in range(3)] + [Ask("Only text.")]
    seeded = {"temperature": 1.0, "seed": 7, "top_p": 0.95}
    together = served.generate(asks, 8, **seeded)
    assert fingerprint(together) == fingerprint([served.generate([ask], 8, **seeded)[0] for ask in asks])
    assert fingerprint(together) != fingerprint(served.generate(asks, 8, **(seeded | {"seed": 8})))

    several = served.generate(asks[2:], 6, n=3, **seeded)
    assert all(len(output.outputs) == 3 for output in several)
    assert any(len({tuple(a.token_ids) for a in output.outputs}) > 1 for output in several)
    served_greedy = served.generate(asks, 6)
    served.check(asks, served.generate(asks, 1))
    assert [row[0][:1] for row in fingerprint(served_greedy)] == [
        row[0] for row in fingerprint(served.generate(asks, 1))
    ]

    for ask, output in zip(asks, served.generate(asks, 12), strict=True):
        full = output.outputs[0].text
        middle = next((c for c in full[1:] if c.isalnum()), None)
        if middle is None:
            continue
        stopped = served.generate([ask], 12, stop=[middle])[0].outputs[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == full[: full.index(middle)]
    assert at_rest(served)


def test_compiled_as_eager() -> None:
    eager = serve(hybrid_section("both"))
    asks = crowd(eager)[::3]
    compiled = serve(hybrid_section("both"), enforce_eager=False)
    answers = compiled.generate(asks)
    assert logprob_gap(answers, eager.generate(asks)) <= 1e-3
    compiled.check(asks, answers)
