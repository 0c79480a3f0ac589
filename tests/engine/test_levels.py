"""Pictures of several levels on one engine answer as on engines that have only theirs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.support.engines import (
    TIGHT,
    Ask,
    Served,
    at_rest,
    fingerprint,
    hybrid_section,
    images,
    logprob_gap,
    picture_of,
    serve,
    thresholds,
)
from tests.support.reference import AtLevel
from tests.support.tiny_checkpoints import conversation, prompt

TOLERANCE = 1e-3
# The section of a server that has only the level.
ALONE = {"low": "both", "mid": "dymu", "high": "fastv", "full": "off"}


def section() -> dict[str, Any]:
    """One level that merges and prunes, one that does either, and the full one."""
    merging = {"thresholds": list(thresholds())}
    levels = {"low": {**merging, "fastv_ratio": 0.5}, "mid": merging, "high": {"fastv_ratio": 0.5}}
    return {"levels": levels, "default_level": "mid", "fastv_layer": 2}


def decided(served: Served, pictures: Sequence[Image.Image], level: str, count: int = 1) -> list[Ask]:
    """Requests for so many pictures each, all at one level, whose prunes are no matter of rounding."""
    several = (pictures[i : i + count] for i in range(0, len(pictures), count))
    return [served.decided(*(AtLevel(picture, level) for picture in few)) for few in several]


@pytest.fixture
def served() -> Iterator[Served]:
    served = serve(section())
    assert served.scheduler.reset_prefix_cache()
    yield served
    assert at_rest(served)


def in_turn(asks: dict[str, list[Ask]]) -> list[tuple[str, Ask]]:
    """Requests of all levels, one of each level after the other."""
    return [
        pair for each in zip(*([(k, a) for a in v] for k, v in asks.items()), strict=True) for pair in each
    ]


def test_every_level_of_a_mixed_batch_answers_as_on_a_server_of_its_own(served: Served) -> None:
    pictures = images(8)[:4]
    mixed = in_turn({level: decided(served, pictures, level) for level in ALONE})
    together = served.generate([ask for _, ask in mixed])
    served.check([ask for _, ask in mixed], together, TOLERANCE)
    # Every picture comes from the encoder cache or the prefix cache now.
    cached = served.generate([ask for _, ask in mixed])
    assert all(output.num_cached_tokens for output in cached)
    for level, mode in ALONE.items():
        own = serve(hybrid_section(mode))
        plain = [Ask(ask.text, tuple(map(picture_of, ask.images))) for name, ask in mixed if name == level]
        expected = own.generate(plain)
        for outputs in (together, cached):
            found = [output for (name, _), output in zip(mixed, outputs, strict=True) if name == level]
            assert logprob_gap(found, expected) <= TOLERANCE
    alone = [served.generate([ask])[0] for _, ask in mixed[:4]]
    assert logprob_gap(alone, together[:4]) <= TOLERANCE


def test_levels_differ_and_nothing_of_one_picture_is_shared_between_them(served: Served) -> None:
    picture = images(8)[4]
    text = prompt("What is here?")
    seen = {}
    for level in ALONE:
        (output,) = served.generate([Ask(text, (AtLevel(picture, level),))], 1)
        # No block behind the beginning of the picture may be another level's.
        assert output.num_cached_tokens < 16
        seen[level] = max(entry.logprob for entry in output.outputs[0].logprobs[0].values())
    for first, second in itertools.combinations(seen.values(), 2):
        assert abs(first - second) > 1e-4


def test_one_picture_at_several_levels_in_one_prompt(served: Served) -> None:
    a, b = images(8)[:2]
    orders = [("low", "full"), ("full", "low"), ("mid", "high"), ("high", "mid"), ("low", "mid", "full")]
    asks = [served.decided(*(AtLevel(a, level) for level in order)) for order in orders]
    asks.append(served.decided(AtLevel(a, "low"), AtLevel(b, "full"), AtLevel(a, "high")))
    for _ in range(2):
        served.check(asks, served.generate(asks), TOLERANCE)


def test_a_picture_that_ends_a_prompt(served: Served) -> None:
    """Its last row answers, whatever else of the prompt is pruned."""
    a, b = images(8)[:2]
    shown = [(AtLevel(a, first), AtLevel(b, last)) for first, last in (("low", "full"), ("full", "low"))]
    asks = [Ask("USER: <image> What? <image>", pair) for pair in shown]
    asks = [ask for ask in asks if served.is_decided(ask)]
    assert asks
    served.check(asks, served.generate(asks), TOLERANCE)


def test_preempted_requests_of_all_levels_answer_the_same() -> None:
    tight = serve(section(), **TIGHT)
    pictures = images(8)[:4]
    asks = [ask for _, ask in in_turn({level: decided(tight, pictures, level) for level in ALONE})]
    scheduler = tight.scheduler
    schedule, steps, preempted = scheduler.schedule, itertools.count(1), set[str]()

    def preempting(*args: Any, **kwargs: Any) -> Any:
        step = next(steps)
        if step % 2 == 0 and len(scheduler.running) > 1:
            request = scheduler.running.pop(step // 2 % len(scheduler.running))
            preempted.add(request.mm_features[0].identifier.rpartition("@")[2])
            scheduler._preempt_request(request, 0.0)
        return schedule(*args, **kwargs)

    scheduler.schedule = preempting
    try:
        outputs = tight.generate(asks, 12)
    finally:
        scheduler.schedule = schedule
    assert preempted == set(ALONE)
    tight.check(asks, outputs, TOLERANCE)
    assert at_rest(tight)


def test_turns_of_several_levels_are_ranked_and_found_again() -> None:
    """A pruned picture in one turn, a full one in another: each turn finds what the one before it left."""
    header = serve(section()).reference.tokenizer("ASSISTANT:")["input_ids"][1:]
    served = serve(section() | {"fastv_rank": "turn_end", "assistant_header": header})
    a, b = images(8)[:2]
    for first, second in (("low", "full"), ("full", "high")):
        shown = (AtLevel(a, first), AtLevel(b, second))
        asks = (
            Ask(conversation([(1, question), (1, "And here?")], "Yes."), shown)
            for question in ("What is here?", "Is it bright?", "Why is that?", "Name a colour.")
        )
        ask = next(ask for ask in asks if served.is_decided(ask))
        turn = Ask(ask.text[: ask.text.index("ASSISTANT:")] + "ASSISTANT:", shown[:1])
        served.check([turn], served.generate([turn]), TOLERANCE)
        outputs = served.generate([ask])
        served.check([ask], outputs, TOLERANCE)
        assert outputs[0].num_cached_tokens > 576


def test_chat_messages_say_details(served: Served) -> None:
    """Each picture's own, in OpenAI's two places, and one that says nothing."""
    a, b, c = images(8)[:3]
    details = [{"detail": "low"}, {"detail": "auto"}, {}]
    parts = [
        {"type": "image_pil", "image_pil": each} | more for each, more in zip((a, b, c), details, strict=True)
    ]
    message: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is here?"}]}]
    before = dict(served.scheduler.totals)
    served.llm.chat(message, SamplingParams(max_tokens=1), use_tqdm=False)
    assert _new_images(served, before) == {"low": 1, "mid": 2}
    # What a request asks for goes for all of its pictures.
    before = dict(served.scheduler.totals)
    everything = SamplingParams(max_tokens=1, extra_args={"hybrid_level": "full"})
    served.llm.chat(message, everything, use_tqdm=False)
    assert _new_images(served, before) == {"full": 3}


def _new_images(served: Served, before: dict[str, int]) -> dict[str, int]:
    grown = {name: total - before.get(name, 0) for name, total in served.scheduler.totals.items()}
    counts = {name.partition(":")[2]: n for name, n in grown.items() if name.startswith("images:")}
    return {level: n for level, n in counts.items() if n}


@pytest.mark.parametrize("said", ["best", "", "LOW", 3, ["low"], True])
def test_unknown_levels_are_refused_with_a_list_of_all(served: Served, said: Any) -> None:
    picture = images(8)[0]
    params = SamplingParams(max_tokens=1, extra_args={"hybrid_level": said})
    with pytest.raises(VLLMValidationError, match=r"hybrid_level is .*use low, mid, high or full"):
        served.llm.generate([Ask(prompt("What?"), (picture,)).request()], params, use_tqdm=False)
    part = {"type": "image_pil", "image_pil": picture, "detail": said}
    message: Any = [{"role": "user", "content": [part, {"type": "text", "text": "What is here?"}]}]
    with pytest.raises(VLLMValidationError, match=r"detail is .*use auto, original, low, mid, high or full"):
        served.llm.chat(message, SamplingParams(max_tokens=1), use_tqdm=False)
    # Text has no pictures, so there is nothing to refuse.
    assert served.llm.generate(["Only text."], params, use_tqdm=False)[0].outputs[0].token_ids
    # The picture was not noted as sent.
    ask = served.decided(AtLevel(picture, "mid"))
    served.check([ask], served.generate([ask]), TOLERANCE)


def test_a_client_s_name_for_a_picture_stays_apart_by_level(served: Served) -> None:
    """The second request sends no picture at all: its pixels are known, its level is another one."""
    picture, name = images(8)[5], f"picture-{random.random()}@low"
    text = prompt("What is here?")
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
    for level, sent in (("full", picture), ("low", None), ("mid", None)):
        request = Ask(text, (AtLevel(picture, level),)).request()
        request["multi_modal_data"] = {"image": [sent]}
        request["multi_modal_uuids"]["image"] = [name]
        outputs = served.llm.generate([request], params, use_tqdm=False)
        served.check([Ask(text, (AtLevel(picture, level),))], outputs, TOLERANCE)


def test_beams_keep_the_levels_of_their_prompt(served: Served) -> None:
    """Greedy search is a beam of one."""
    from vllm.sampling_params import BeamSearchParams

    for level in ("low", "full"):
        ask = served.decided(AtLevel(images(8)[6], level))
        (greedy,) = fingerprint(served.generate([ask], 4))
        before = dict(served.scheduler.totals)
        found = served.llm.beam_search([ask.request()], BeamSearchParams(1, 4, ignore_eos=True))
        assert found[0].sequences[0].tokens[-4:] == greedy[0]
        assert _new_images(served, before).keys() == {level}
