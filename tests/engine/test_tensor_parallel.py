"""Two ranks, each with half of the language model's heads, answer like the reference and choose alike.

Of the vision tower each has half of the heads, or all of it and a share of the pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.engines import (
    MERGE_MARGIN,
    Ask,
    Served,
    ServingReference,
    checkpoint,
    hybrid_section,
    images,
)
from tests.support.reference import AtLevel
from tests.support.tiny_checkpoints import pick_thresholds, prompt
from tests.support.two_ranks import RANKS, Found, ImageChoice, Work, answer_in_own_process

pytestmark = pytest.mark.engine
TOKENS = 6


# Two ranks cannot divide such a tower's heads, so each has all of it and encodes its share of a batch.
WHOLE_TOWER = {"vision_heads": 3, "vision_hidden": 96}


@dataclass
class Case:
    """What two ranks were asked and found. `served` knows the right answers, `expected` the choices."""

    served: Served
    asks: list[Ask]
    expected: list[ImageChoice]
    found: Found
    vision_heads: int


def _expected(reference: ServingReference, ask: Ask) -> list[ImageChoice]:
    """The reference's choice for each image of a request."""
    expected = []
    choices = reference.choices(reference.prompt_ids(ask.text), ask.images)
    for image, choice in zip(ask.images, choices, strict=True):
        members = reference.encode(image)[1]
        owner = {patch: token for token, patches in enumerate(members) for patch in patches}
        expected.append(ImageChoice(tuple(owner[patch] for patch in sorted(owner)), tuple(choice.kept)))
    return expected


def _parted(path: Path, hybrid: dict[str, Any], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """A section whose first layer merges in some of the images, while the others keep their order."""
    reference = ServingReference(path, hybrid)
    tops = sorted(float(reference.match_scores(picture)[0].max()) for picture in pictures)
    gap, middle = max((high - low, (high + low) / 2) for low, high in itertools.pairwise(tops))
    assert gap > 1e-3
    return {**hybrid, "thresholds": [middle, *hybrid["thresholds"][1:]]}


@pytest.fixture(
    scope="module",
    params=[{"kv_heads": 2, "vision_heads": 2}, {"kv_heads": 1, **WHOLE_TOWER}],
    ids=["a key head per rank, half a tower", "one key head for both ranks, whole towers"],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = checkpoint(layers=4, heads=4, **request.param)
    a, b, c, d, *others = images(8)
    thresholds = pick_thresholds(path, [a, b, c, d, others[0]], [0.6, 0.6, 0.6])
    hybrid = _parted(path, {**hybrid_section("fastv"), "thresholds": thresholds}, (a, b, c, d))
    served = Served(None, ServingReference(path, hybrid), hybrid)
    e = next(image for image in others if served.reference.merge_margin(image) > MERGE_MARGIN)
    rounds = [
        [served.decided(a), Ask("USER: Hello there ASSISTANT:"), served.decided(b, c)],
        [served.decided(d)],
        # One merges nothing, the other does.
        [served.decided(AtLevel(b, "full"), e)],
        # Of these some are known by now.
        [served.decided(a, d)],
    ]
    work = Work(path, hybrid, rounds, TOKENS, apart=True)
    expected = [choice for ask in work.asks for choice in _expected(served.reference, ask)]
    found = answer_in_own_process(work, tmp_path_factory.mktemp("ranks"))
    # Requests may be batched in any order, so choices are compared sorted.
    return Case(served, work.asks, sorted(expected), found, request.param["vision_heads"])


def test_answers_are_the_references(case: Case) -> None:
    outputs = case.found.outputs
    assert all(len(output.outputs[0].token_ids) == TOKENS for output in outputs)
    case.served.check(case.asks, outputs)


def test_all_ranks_merge_and_choose_like_the_reference(case: Case) -> None:
    assert len(case.expected) == sum(len(ask.images) for ask in case.asks)
    assert len(case.found.choices) == RANKS
    for choices in case.found.choices:
        assert sorted(choices) == case.expected


def test_all_ranks_have_the_same_encoder_outputs(case: Case) -> None:
    """To the last bit; a rank encodes every picture with its heads, or its share with all heads."""
    first, second = case.found.batches
    assert [batch.outputs for batch in first] == [batch.outputs for batch in second]
    batches = [batch.images for batch in first]
    assert batches[:3] == [3, 1, 2]
    own = [[batch.own for batch in rank] for rank in (first, second)]
    if case.vision_heads % RANKS:
        assert case.found.tower_heads == [case.vision_heads] * RANKS
        assert own == [[-(-images // 2) for images in batches], [images // 2 for images in batches]]
    else:
        assert case.found.tower_heads == [case.vision_heads // RANKS] * RANKS
        assert own == [batches] * RANKS


def test_whole_towers_with_nothing_switched_on_answer_like_the_reference(tmp_path: Path) -> None:
    path = checkpoint(layers=4, heads=4, kv_heads=2, **WHOLE_TOWER)
    a, b, c, d = images(8)[:4]
    rounds = [
        [Ask(prompt("What is here?"), (a,)), Ask(prompt("Compare them.", 2), (b, c))],
        [Ask(prompt("What is here?"), (d,))],
    ]
    work = Work(path, {}, rounds, TOKENS)
    found = answer_in_own_process(work, tmp_path)
    Served(None, ServingReference(path, {}), {}).check(work.asks, found.outputs)
    first, second = found.batches
    assert [batch.outputs for batch in first] == [batch.outputs for batch in second]
    assert found.tower_heads == [WHOLE_TOWER["vision_heads"]] * RANKS
    # vLLM fills shares up with blank pictures.
    assert [(batch.images, batch.own) for batch in first] == [(3, 2), (1, 1)]


def test_no_ranks_own_heads_would_do(case: Case) -> None:
    """Importances that are not summed over ranks fail the first two tests above."""
    for choices in case.found.apart:
        assert [choice.owner for choice in sorted(choices)] == [choice.owner for choice in case.expected]
        assert sorted(choices) != case.expected
    first, second = case.found.apart
    assert first != second
    with pytest.raises(AssertionError, match="log probabilities differ"):
        case.served.check(case.asks[2:3], case.found.apart_outputs[2:3])
