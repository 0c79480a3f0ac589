"""Engines that merge and prune on quantised weights, against the reference with the weights that they mean.

Kernels for four bits do not compute in float32, so near ties may fall otherwise than in the reference, and no
answer is the reference's to the last digit. But it is near, and far from what the weights before they were
quantised, or all tokens, would give.
"""

from __future__ import annotations

import json
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
    images,
    serve,
)
from tests.support.quantised_checkpoints import (
    FLOAT8,
    IGNORED,
    KINDS,
    float8_channels,
    write_meaning,
    write_quantised,
)
from tests.support.tiny_checkpoints import prompt
from vllm_hybrid.tools.prepare import prepare

DTYPE = torch.float16
# Mean distance of log probabilities. On a CPU it was 0.004 at most with inputs in float16 and 0.03 in int8,
# in stock vLLM too; with other weights or all tokens it was 0.34 and more.
NEAR = {"W8A8": 0.1, "W4A16": 0.03, "GPTQ": 0.03, "AWQ": 0.03}
FAR = 2
NAMES: dict[str, Literal["old", "new"]] = {"W8A8": "new", "W4A16": "old", "GPTQ": "new", "AWQ": "old"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def asks() -> list[Ask]:
    """Pictures whose merges and prunes are clear in float32, of few tokens: the reference takes its time."""
    return [Ask(prompt("What is here?"), (images()[number],)) for number in (0, 2)]


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


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_weights_that_are_meant(kind: str, folder: Path) -> None:
    served, source = serve_prepared(kind, folder)
    asked = asks()
    answers = served.generate(asked, 4)
    near = distance(served.reference, asked, answers)
    assert near < NEAR[kind], f"{near} from the reference"
    others = {
        "all tokens": ServingReference(source, {}),
        "other weights": ServingReference(source, served.hybrid),
    }
    far = {name: distance(other, asked[:1], answers[:1]) for name, other in others.items()}
    assert min(far.values()) > FAR * NEAR[kind], f"{far}, while the reference is at {near}"


def test_vllm_may_quantise_the_language_model_itself(folder: Path) -> None:
    meaning = write_meaning(checkpoint(), folder / "float8", float8_channels, DTYPE)
    options: dict[str, Any] = {
        "quantization": "fp8_per_channel",
        "quantization_config": {"ignore": ["vision_tower.*", "multi_modal_projector.*"]},
    }
    served = serve(hybrid_section("both"), meaning=meaning, dtype="float16", **options)
    asked = asks()
    # Inputs of three bits are near no more than this: 0.1 was seen.
    assert distance(served.reference, asked, served.generate(asked, 4)) < 0.2
    worker = served.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    for part, dtype in (
        ("language_model.model.layers.0.self_attn.qkv_proj", FLOAT8),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", DTYPE),
        ("multi_modal_projector.linear_1", DTYPE),
    ):
        assert worker.get_model().get_submodule(part).weight.dtype == dtype


def test_weights_that_a_quantised_checkpoint_lacks_are_missed(folder: Path) -> None:
    """The configuration leaves the tower out by a name that vLLM's model does not have."""
    misnamed = [name.replace("re:", "re:model.") for name in IGNORED]
    path = write_quantised(checkpoint(), folder / "misnamed", KINDS["W8A8"], DTYPE, misnamed)
    before, _ = serve_prepared("W8A8", folder)
    with pytest.raises(ValueError, match=r"not initialized from checkpoint.*vision_tower.*weight_scale"):
        serve(hybrid_section("both"), path, meaning=checkpoint(), dtype="float16")
    # Engines that were there go on.
    assert before.generate([Ask("Numbers: 0 1 2 3")], 2)
