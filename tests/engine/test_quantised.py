"""Engines that merge and prune on quantised weights, against the reference with the weights that they mean.

The tower runs in float16 here, as CPU kernels for four bits ask for, so near ties may fall otherwise than in the
float32 reference; an answer's mean distance forgives that. What it must not be is as far as that of the weights before
they were quantised, or of all tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.support.engines import (
    STOCK,
    Ask,
    Served,
    ServingReference,
    checkpoint,
    hybrid_section,
    serve,
)
from tests.support.quantised_checkpoints import (
    IGNORED,
    KINDS,
    float8_channels,
    write_meaning,
    write_quantised,
)
from tests.support.tiny_checkpoints import make_images, prompt
from vllm_hybrid.tools.prepare import prepare

DTYPE = torch.float16
# Mean distance of log probabilities. Inputs in float16 move them by 0.01 at most, in 8 bits by 0.06, in stock
# vLLM as here; other weights or tokens by 0.25 and more.
NEAR = {"W8A8": 0.1, "W4A16": 0.03, "GPTQ": 0.03, "AWQ": 0.03, "fp8_per_channel": 0.1}
FAR = 2
NAMES: dict[str, Literal["old", "new"]] = {"W8A8": "new", "W4A16": "old", "GPTQ": "new", "AWQ": "old"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def asks() -> list[Ask]:
    pictures = make_images(1)
    return [Ask(prompt("What is here?"), (pictures[kind],)) for kind in ("flat", "text")]


def distance(reference: ServingReference, asked: Sequence[Ask], answers: Sequence[Any]) -> float:
    """Mean distance of the reported log probabilities from a reference's, along the same answers."""
    gaps = []
    for ask, answer in zip(asked, answers, strict=True):
        output = answer.outputs[0]
        score = reference.score(reference.prompt_ids(ask.text), ask.images, list(output.token_ids))
        for row, reported in zip(score.distributions, output.logprobs, strict=True):
            gaps += [abs(entry.logprob - float(row[token])) for token, entry in reported.items()]
    return sum(gaps) / len(gaps)


def serve_prepared(kind: str, folder: Path) -> tuple[Served, Path]:
    """A quantised checkpoint that `prepare` made servable, and the plain one it comes from."""
    source = checkpoint(architecture=STOCK, names=NAMES[kind])
    section, made = hybrid_section("both"), KINDS[kind]
    quantised, out, meaning = (folder / f"{kind}-{part}" for part in ("quantised", "prepared", "meaning"))
    if not out.exists():
        write_quantised(source, quantised, made, DTYPE)
        write_meaning(source, meaning, lambda weight: made.quantise(weight, DTYPE)[1], DTYPE)
        (folder / "thresholds.json").write_text(json.dumps(section["thresholds"]))
        ratio, layer = section["fastv_ratio"], section["fastv_layer"]
        thresholds = folder / "thresholds.json"
        prepare(quantised, out, thresholds=thresholds, fastv_layer=layer, fastv_ratio=ratio)
    # What is switched on is read from the prepared folder.
    return serve(section, out, meaning=meaning, dtype="float16", hf_overrides={}), source


def check_near(kind: str, served: Served, source: Path) -> None:
    """The answers are those of the reference, and neither of other weights nor of all tokens."""
    asked = asks()
    answers = served.generate(asked, 4)
    near = distance(served.reference, asked, answers)
    weights = distance(ServingReference(source, served.hybrid), asked, answers)
    everything = distance(ServingReference(source, {}), asked[:1], answers[:1])
    assert near < NEAR[kind], f"{near} from the reference, {weights} from the plain weights"
    assert weights > FAR * NEAR[kind] and everything > FAR * NEAR[kind], (near, weights, everything)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_weights_that_are_meant(kind: str, folder: Path) -> None:
    served, source = serve_prepared(kind, folder)
    check_near(kind, served, source)
