"""Batching, preemption, caching and sampling change no answer."""

from __future__ import annotations

import pytest

from tests.engines import Ask, Served, hybrid_section, images, logprob_gap, serve

GAP = 1e-4


def crowd(served: Served) -> list[Ask]:
    """Sixteen different requests: one or two images, or none."""
    pictures = images(8)
    asks = [served.decided(picture) for picture in pictures]
    asks += [served.decided(pictures[i], pictures[i + 1]) for i in range(4)]
    return asks + [Ask(f"Numbers: {i} and {i + 1}") for i in range(4)]


@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_alone_as_in_a_crowd(mode: str) -> None:
    served = serve(hybrid_section(mode))
    asks = crowd(served)
    together = served.generate(asks, 8)
    alone = [served.generate([ask], 8)[0] for ask in asks]
    assert logprob_gap(together, alone) <= GAP


@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_prefix_caching_changes_nothing(mode: str) -> None:
    served = serve(hybrid_section(mode), enable_prefix_caching=True)
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
