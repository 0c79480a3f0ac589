"""Served answers against the independent reference, and against vLLM's own LLaVA."""

from __future__ import annotations

import itertools

import pytest
from PIL import Image

from tests.support.engines import (
    TOLERANCE,
    Ask,
    Served,
    checkpoint,
    fingerprint,
    hybrid_section,
    images,
    logprob_gap,
    serve,
    serve_stock,
)
from tests.support.tiny_checkpoints import conversation, make_images, prompt

MODES = ["off", "dymu", "fastv", "both"]


def mixed(served: Served) -> list[Ask]:
    """One to three images of different kinds and sizes, text in between, one image twice."""
    a, b, c, d = images(8)[:4]
    return [
        served.decided(a),
        Ask("USER: Hello there ASSISTANT:"),
        served.decided(b, c),
        served.decided(d),
        Ask("Numbers: 0 1 2 3"),
        served.decided(a, b, d),
        served.decided(c, c),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_references(mode: str) -> None:
    served = serve(hybrid_section(mode))
    asks = mixed(served)
    served.check(asks, served.generate(asks))


def test_the_modes_differ() -> None:
    """Merging and pruning change log probabilities by far more than the tolerance of the other tests."""
    asks = [Ask(prompt("What is here?"), (image,)) for image in images(8)[:4]]
    seen = {}
    for mode in MODES:
        answers = serve(hybrid_section(mode)).generate(asks, 1)
        seen[mode] = [max(e.logprob for e in answer.outputs[0].logprobs[0].values()) for answer in answers]
    for first, second in itertools.combinations(MODES, 2):
        assert max(abs(x - y) for x, y in zip(seen[first], seen[second], strict=True)) > 1e-2


@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_an_image_may_start_or_end_the_prompt(mode: str) -> None:
    served = serve(hybrid_section(mode))
    asks = [Ask("<image> What is here?", (image,)) for image in images(8)]
    asks += [Ask("What is here? <image>", (image,)) for image in images(8)]
    asks += [Ask("<image>", (image,)) for image in images(8)]
    asks = [ask for ask in asks if served.is_decided(ask)]
    by_shape = [
        [ask for ask in asks if ask.text.startswith("<image>") and ask.text != "<image>"],
        [ask for ask in asks if ask.text.endswith("<image>") and ask.text != "<image>"],
        [ask for ask in asks if ask.text == "<image>"],
    ]
    assert all(len(group) >= 2 for group in by_shape)
    asks = [ask for group in by_shape for ask in group[:2]]
    served.check(asks, served.generate(asks, 4))


def test_off_is_stock() -> None:
    """Token for token, sixteen requests at once."""
    pictures = images(8)
    asks = [Ask(prompt(f"Question {i}?"), (pictures[i % 8],)) for i in range(12)]
    asks += [Ask(prompt("Both?", 2), (pictures[i], pictures[i + 1])) for i in range(3)]
    asks += [Ask("Only text."), Ask("Numbers: 10 11 12")]
    assert logprob_gap(serve({}).generate(asks, 16), serve_stock().generate(asks, 16)) <= 1e-5


@pytest.mark.parametrize(
    ("layer", "heads", "kv_heads", "names"),
    [(1, 4, 4, "new"), (5, 4, 1, "new")],
    ids=[
        "after layer 1, one key head per head, new weight names",
        "after layer 5, one key head for all, new weight names",
    ],
)
def test_pruning_after_other_layers_other_head_counts_and_weight_names(
    layer: int, heads: int, kv_heads: int, names: str
) -> None:
    path = checkpoint(heads=heads, kv_heads=kv_heads, names=names)
    served = serve(hybrid_section("both", layer, 0.75), path)
    asks = [served.decided(image) for image in images(8)[:2]] + [Ask("Only text.")]
    served.check(asks, served.generate(asks))


def by_turns(served: Served, *turns: tuple[Image.Image, ...]) -> Ask:
    """A conversation with some images in each turn, whose prunes are no matter of rounding.

    Raises:
        RuntimeError: no wording at hand makes one.

    """
    for question, answer in itertools.product(
        ("What is here?", "Is it bright?", "Why is that?"), ("It is red.", "Yes.", "No, it is not.")
    ):
        text = conversation([(len(images), question) for images in turns], answer)
        ask = Ask(text, tuple(itertools.chain(*turns)))
        if served.is_decided(ask):
            return ask
    raise RuntimeError("no wording decides the prunes of these images; use other images")


@pytest.mark.parametrize("mode", ["fastv", "both"])
def test_images_are_ranked_at_the_end_of_their_turns(mode: str) -> None:
    """Several conversations at once: images in the first, the last, and in each turn, and none behind it."""
    by_end = serve(hybrid_section(mode))
    header = by_end.reference.tokenizer("ASSISTANT:")["input_ids"][1:]
    served = serve(hybrid_section(mode) | {"fastv_rank": "turn_end", "assistant_header": header})
    a, b, c, d = images(8)[:4]
    asks = [
        by_turns(served, (a,), (b,)),
        by_turns(served, (b, d), ()),
        Ask("USER: Hello there ASSISTANT:"),
        by_turns(served, (c,), (), (a, d)),
        by_turns(served, (d,), (a, b)),
        by_turns(served, (a,)),
    ]
    outputs = served.generate(asks)
    served.check(asks, outputs)
    # What the prompt's last position would have kept is something else, except where there is one turn.
    with pytest.raises(AssertionError, match="log probabilities differ"):
        by_end.check(asks[:1], outputs[:1], 10 * TOLERANCE)
    by_end.check(asks[-1:], outputs[-1:])


def test_an_image_behind_the_last_header_is_ranked_by_the_prompt_s_end() -> None:
    section = hybrid_section("both")
    header = serve(section).reference.tokenizer("ASSISTANT:")["input_ids"][1:]
    served = serve(section | {"fastv_rank": "turn_end", "assistant_header": header})
    pictures = images(8)
    texts = ("USER: <image> What? ASSISTANT: A dog. <image>", "USER: <image> What? ASSISTANT: <image> Why?")
    asks = []
    for text in texts:
        decided = (ask for pair in itertools.pairwise(pictures) if served.is_decided(ask := Ask(text, pair)))
        asks.append(next(decided))
    served.check(asks, served.generate(asks, 4))


def test_everything_merges_and_one_token_is_kept() -> None:
    """Thresholds that all pairs exceed leave few live tokens; a high ratio leaves one of them."""
    section = {"thresholds": [-1.1, -1.1, -1.1], "fastv_layer": 2, "fastv_ratio": 0.99}
    served = serve(section)
    asks = [served.decided(image) for image in images(8)[:3]]
    live = {served.reference.live(image) for ask in asks for image in ask.images}
    assert max(live) <= 576 // 2**3 + 2
    reference = served.reference
    choices = [c for ask in asks for c in reference.choices(reference.prompt_ids(ask.text), ask.images)]
    assert {len(choice.kept) for choice in choices} == {1}
    served.check(asks, served.generate(asks))


def test_bfloat16_answers_stay_close() -> None:
    served = serve(hybrid_section("both"), dtype="bfloat16")
    image: Image.Image = make_images(1)["shapes"]
    ask = Ask(prompt("What is here?"), (image,))
    answer = served.generate([ask, Ask("Only text.")])
    ids = served.reference.prompt_ids(ask.text)
    rows = served.reference.score(ids, [image], list(answer[0].outputs[0].token_ids)).distributions
    first = answer[0].outputs[0].logprobs[0]
    gaps = [abs(entry.logprob - float(rows[0][token])) for token, entry in first.items()]
    assert max(gaps) < 0.5
    assert len(fingerprint(answer)[1][0]) == 6
