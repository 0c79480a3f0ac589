"""Two ranks, each with half of the heads, answer like the reference and choose alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.engines import Ask, Served, ServingReference, checkpoint, hybrid_section, images
from tests.support.two_ranks import RANKS, Found, ImageChoice, Work, answer_in_own_process

pytestmark = pytest.mark.engine
TOKENS = 6


@dataclass
class Case:
    """What two ranks were asked and found. `served` knows the right answers, `expected` the choices."""

    served: Served
    asks: list[Ask]
    expected: list[ImageChoice]
    found: Found


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
    """A section whose first layer merges in half of the images, while the others keep their order."""
    reference = ServingReference(path, hybrid)
    tops = sorted(float(reference.match_scores(picture)[0].max()) for picture in pictures)
    half = len(tops) // 2
    assert tops[half] - tops[half - 1] > 1e-3
    return {**hybrid, "thresholds": [(tops[half - 1] + tops[half]) / 2, *hybrid["thresholds"][1:]]}


@pytest.fixture(scope="module", params=[2, 1], ids=["a key head per rank", "one key head for both ranks"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = checkpoint(layers=4, heads=4, kv_heads=request.param, vision_heads=2)
    a, b, c, d = images(8)[:4]
    hybrid = _parted(path, hybrid_section("both"), (a, b, c, d))
    served = Served(None, ServingReference(path, hybrid), hybrid)
    asks = [
        served.decided(a),
        Ask("USER: Hello there ASSISTANT:"),
        served.decided(b, c),
        served.decided(d),
        served.decided(a, d),
    ]
    expected = [choice for ask in asks for choice in _expected(served.reference, ask)]
    found = answer_in_own_process(Work(path, hybrid, asks, TOKENS), tmp_path_factory.mktemp("ranks"))
    # Requests may be batched in any order, so choices are compared sorted.
    return Case(served, asks, sorted(expected), found)


def test_answers_are_the_references(case: Case) -> None:
    outputs = case.found.outputs
    assert all(len(output.outputs[0].token_ids) == TOKENS for output in outputs)
    case.served.check(case.asks, outputs)


def test_all_ranks_merge_and_choose_like_the_reference(case: Case) -> None:
    assert len(case.expected) == sum(len(ask.images) for ask in case.asks)
    assert len(case.found.choices) == RANKS
    for choices in case.found.choices:
        assert sorted(choices) == case.expected


def test_no_ranks_own_heads_would_do(case: Case) -> None:
    """Importances that are not summed over ranks fail both tests above."""
    for choices in case.found.apart:
        assert [choice.owner for choice in sorted(choices)] == [choice.owner for choice in case.expected]
        assert sorted(choices) != case.expected
    first, second = case.found.apart
    assert first != second
    with pytest.raises(AssertionError, match="log probabilities differ"):
        case.served.check(case.asks[2:3], case.found.apart_outputs[2:3])
