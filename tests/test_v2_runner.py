"""The V2 model runner, through Triton's interpreter, gives the reference's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reference import Reference
from tests.tiny_checkpoints import decided_images, make_images, pick_thresholds, prompt, write_checkpoint

TOKENS = 8


@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_v2_runner_answers_like_the_reference(tmp_path: Path, attention: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=3)
    thresholds = pick_thresholds(checkpoint, list(make_images().values()), [0.5, 0.5, 0.5])
    hybrid = {"thresholds": thresholds, "fastv_layer": 2, "fastv_ratio": 0.5}
    reference = Reference(checkpoint, hybrid)
    pictures = decided_images(reference, 3)
    files = []
    for number, picture in enumerate(pictures):
        files.append(str(tmp_path / f"{number}.png"))
        picture.save(files[-1])
    cases = [
        ([0], "What is here?"),
        ([1, 2], "Compare them."),
        ([], "Hello there."),
        ([0, 1, 2], "All of it?"),
    ]
    work = {
        "checkpoint": str(checkpoint),
        "hybrid": hybrid,
        "tokens": TOKENS,
        "requests": [
            {"prompt": prompt(question, len(images)), "images": [files[i] for i in images]}
            for images, question in cases
        ],
    }
    result = _answers(work, attention)
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    for (images, question), answer in zip(cases, result["answers"], strict=True):
        ids = reference.prompt_ids(prompt(question, len(images)))
        score = reference.score(ids, [pictures[i] for i in images], answer["tokens"])
        assert score.distributions.argmax(-1).tolist() == answer["tokens"]
        for step, logprobs in enumerate(answer["logprobs"]):
            for token, logprob in logprobs.items():
                assert abs(logprob - float(score.distributions[step, int(token)])) <= 1e-3


def _answers(work: dict[str, Any], attention: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.v2_answers"],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "VLLM_HYBRID_ATTENTION": attention},
        check=False,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ANSWERS "))
