"""What is found in the prefix cache changes no answer: turns, shared pictures, evictions, preemptions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from PIL import Image
from vllm import SamplingParams

from tests.support.engines import CHOICE_MARGIN, Served, at_rest, hybrid_section, images, serve
from tests.support.tiny_checkpoints import PATCHES

SMALL_POOL: dict[str, Any] = {"max_model_len": 1280, "kv_cache_memory_bytes": 12 << 20}
QUESTIONS = ("What is here?", "Is it bright?", "Why is that?", "Name a colour.", "And the other one?")


class Talk(NamedTuple):
    """A conversation so far: token ids, with a placeholder for every position of an image, and the images."""

    ids: tuple[int, ...]
    images: tuple[Image.Image, ...]

    def request(self, placeholder: int) -> dict[str, Any]:
        """As vLLM's `generate` takes it: one placeholder for each image."""
        runs = ((token, len(list(run))) for token, run in itertools.groupby(self.ids))
        ids = [[token] * (n // PATCHES if token == placeholder else n) for token, n in runs]
        pictures = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt_token_ids": list(itertools.chain(*ids)), **pictures}


class Talking:
    """Conversations with an engine, whose answers are compared with the reference's."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.placeholder = served.reference.config.image_token_index

    def tokens(self, text: str, pictures: int = 0) -> tuple[int, ...]:
        """Token ids of a stretch of a prompt."""
        ids = self.served.reference.prompt_ids("<image> " * pictures + text)
        return tuple(ids[1:] if ids[0] == self.served.reference.tokenizer.bos_token_id else ids)

    def begin(self, *pictures: Image.Image) -> Talk:
        """A first turn whose prunes are no matter of rounding."""
        return self.decided(Talk((self.served.reference.tokenizer.bos_token_id,), ()), *pictures)

    def decided(self, before: Talk, *pictures: Image.Image, first: int = 0) -> Talk:
        """A conversation with another question, whose prunes are no matter of rounding.

        Raises:
            RuntimeError: no question at hand makes one.

        """
        for number in range(len(QUESTIONS)):
            question = QUESTIONS[(first + number) % len(QUESTIONS)]
            ids = before.ids + self.tokens("USER:", 0) + self.tokens(f"{question} ASSISTANT:", len(pictures))
            talk = Talk(ids, before.images + pictures)
            if self.is_decided(talk):
                return talk
        raise RuntimeError("no question decides the prunes; use other images")

    def is_decided(self, talk: Talk) -> bool:
        """Whether the reference's prunes are clear of rounding."""
        if not self.served.hybrid.get("fastv_ratio"):
            return True
        choices = self.served.reference.choices(list(talk.ids), talk.images)
        return all(choice.margin > CHOICE_MARGIN for choice in choices)

    def answer(self, talks: Sequence[Talk], tokens: int = 6) -> tuple[list[Talk], list[int]]:
        """Answer conversations at once; returns them with their answers, and what each found in the cache.

        Raises:
            AssertionError: an answer is not the reference's.

        """
        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True)
        requests = [talk.request(self.placeholder) for talk in talks]
        outputs = self.served.llm.generate(requests, params, use_tqdm=False)
        for talk, output in zip(talks, outputs, strict=True):
            assert tuple(output.prompt_token_ids) == talk.ids
            said = list(output.outputs[0].token_ids)
            score = self.served.reference.score(list(talk.ids), talk.images, said)
            for row, reported in zip(score.distributions, output.outputs[0].logprobs, strict=True):
                for token, entry in reported.items():
                    assert abs(entry.logprob - float(row[token])) <= 1e-3
        answered = [
            Talk(talk.ids + tuple(output.outputs[0].token_ids), talk.images)
            for talk, output in zip(talks, outputs, strict=True)
        ]
        return answered, [output.num_cached_tokens for output in outputs]


def section(mode: str, rank: str) -> dict[str, Any]:
    """The hybrid section of a mode, with the header of these conversations where turns rank."""
    if mode == "dymu" or rank == "prompt_end":
        return hybrid_section(mode)
    header = serve(hybrid_section(mode)).reference.tokenizer("ASSISTANT:")["input_ids"][1:]
    return hybrid_section(mode) | {"fastv_rank": "turn_end", "assistant_header": header}


MODES = [
    ("dymu", "prompt_end"),
    ("fastv", "prompt_end"),
    ("both", "prompt_end"),
    ("fastv", "turn_end"),
    ("both", "turn_end"),
]
all_modes = pytest.mark.parametrize(("mode", "rank"), MODES, ids=["-".join(mode) for mode in MODES])


@pytest.fixture
def talking(mode: str, rank: str) -> Iterator[Talking]:
    served = serve(section(mode, rank))
    assert served.scheduler.reset_prefix_cache()
    yield Talking(served)
    assert at_rest(served)


@all_modes
def test_turns_and_shared_pictures(talking: Talking, mode: str, rank: str) -> None:
    a, b = images(8)[:2]
    first = talking.begin(a)
    (answered,), found = talking.answer([first], 24)
    assert found == [0]
    # Where the prompt's end ranks, the picture's tokens may be others in the next turn.
    shares_turns = mode == "dymu" or rank == "turn_end"
    second = talking.decided(answered)
    (answered,), found = talking.answer([second], 24)
    assert (found[0] > len(first.ids)) == shares_turns
    third = talking.decided(answered, b)
    (answered,), found = talking.answer([third], 24)
    assert (found[0] > len(second.ids)) == shares_turns
    # The same prompts again, another last question, and the second picture in the first one's place, at once.
    again = [third, second, talking.decided(answered, first=2), talking.begin(b), first]
    _, found = talking.answer(again)
    assert min(found[0], found[1], found[4]) > PATCHES and found[3] < PATCHES


@all_modes
def test_evictions_and_other_encodings(talking: Talking, seed: int, mode: str, rank: str) -> None:
    """Any blocks of a conversation are lost, those of its pictures or of its text, and it goes on."""
    rng = random.Random(seed)
    a, b = images(8)[2:4]
    talk = talking.begin(a)
    for turn in range(4):
        (answered,), _ = talking.answer([talk], 12)
        cached = [block.block_id for block in talking.served.pool.blocks if block.block_hash is not None]
        talking.served.pool.evict_blocks(set(rng.sample(cached, len(cached) // 3)))
        if turn % 2:
            talking.served.llm.llm_engine.reset_encoder_cache()
        talk = talking.decided(answered, *((b,) if turn == 1 else ()), first=turn)
    talking.answer([talk, talk], 12)


@pytest.mark.parametrize(("mode", "rank"), [MODES[0], MODES[4]], ids=["dymu", "both-turn_end"])
@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one step ahead"])
def test_preempted_conversations_in_a_small_pool(mode: str, rank: str, ahead: bool) -> None:
    """Requests are preempted every few steps, in a pool that does not keep all conversations."""
    served = serve(section(mode, rank), async_scheduling=ahead, **SMALL_POOL)
    talking, scheduler = Talking(served), served.scheduler
    talks = [talking.begin(picture) for picture in images(8)[:6]]
    schedule, steps, preempted = scheduler.schedule, itertools.count(1), list[str]()

    def preempting(*args: Any, **kwargs: Any) -> Any:
        if next(steps) % 9 == 0 and len(scheduler.running) > 1:
            request = scheduler.running.pop()
            preempted.append(request.request_id)
            scheduler._preempt_request(request, 0.0)
        return schedule(*args, **kwargs)

    scheduler.schedule = preempting
    try:
        found: list[int] = []
        for turn in range(2):
            answered, hits = talking.answer([*talks, *talks[:2]], 24)
            found += hits
            talks = [talking.decided(talk, first=turn) for talk in answered[:6]]
    finally:
        scheduler.schedule = schedule
    assert preempted and max(found) > PATCHES
    assert at_rest(served)
