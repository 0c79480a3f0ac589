"""vLLM engines for tests, started once per configuration and shared, each with its reference beside it.

Engines live in the test's own process, so that a test can look at the scheduler and at the block pool. They
all stay up until the process ends: vLLM's process groups are global, and taking one engine down would pull
them from under the others.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from tests.support.reference import Asked, AtLevel, Choice, Reference
from tests.support.tiny_checkpoints import (
    decided_images,
    make_images,
    pick_thresholds,
    prompt,
    write_checkpoint,
)
from vllm_hybrid.frontend.details import DETAILS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

# Below these, float32 rounding may merge or prune otherwise than the reference (see `decided_images`).
MERGE_MARGIN, CHOICE_MARGIN = 4e-6, 3e-4
TOLERANCE = 1e-3
STOCK = "LlavaForConditionalGeneration"
# Options of engines whose pool is too small for a crowd; stock's and ours hold the same bytes.
TIGHT: dict[str, Any] = {
    "max_model_len": 1280,
    "kv_cache_memory_bytes": 12 << 20,
    "enable_prefix_caching": False,
}
_QUESTIONS = (
    "What is here?",
    "Describe it in one sentence.",
    "How many shapes can you see?",
    "Which colour is it?",
    "Is there a dog?",
    "Read the text on the sign.",
    "Compare, and explain what has changed.",
    "Answer with yes or no: is it bright?",
)


class Ask(NamedTuple):
    """One request: its prompt text and its images, which may be asked for at levels."""

    text: str
    images: tuple[Asked, ...] = ()

    def request(self) -> dict[str, Any]:
        """As vLLM's `generate` takes it; levels travel as a message's details do."""
        if not self.images:
            return {"prompt": self.text}
        request = {"prompt": self.text, "multi_modal_data": {"image": [*map(picture_of, self.images)]}}
        levels = [image.level if isinstance(image, AtLevel) else None for image in self.images]
        return request | ({"multi_modal_uuids": {DETAILS: levels}} if any(levels) else {})


def picture_of(image: Asked) -> Image.Image:
    """The picture, whatever the level."""
    return image.image if isinstance(image, AtLevel) else image


def image_key(image: Asked) -> bytes:
    """What tells an image at a level from others."""
    picture, level = picture_of(image), image.level if isinstance(image, AtLevel) else None
    return hashlib.sha256(repr((picture.size, level)).encode() + picture.tobytes()).digest()


class ServingReference(Reference):
    """The reference with two things a server needs.

    Images are encoded once. And a prompt may end in an image: the row at its last position then survives
    pruning, because the first answer token is read from it.
    """

    def __init__(self, checkpoint: str | Path, hybrid: Mapping[str, Any]) -> None:
        super().__init__(checkpoint, hybrid)
        self._encoded: dict[bytes, tuple[torch.Tensor, list[list[int]]]] = {}
        self._last = 0

    def encode(self, image: Asked) -> tuple[torch.Tensor, list[list[int]]]:
        key = image_key(image)
        if key not in self._encoded:
            self._encoded[key] = super().encode(image)
        return self._encoded[key]

    def _decode(
        self, prompt: Any, generated_ids: Sequence[int], last_prompt_position: int
    ) -> tuple[torch.Tensor, list[Choice]]:
        self._last = last_prompt_position
        return super()._decode(prompt, generated_ids, last_prompt_position)

    def _prune(self, rows: Any, importance: torch.Tensor) -> tuple[Any, list[Choice]]:
        importance = importance.clone()
        importance[self._row_at(rows, self._last)] = float("inf")
        return super()._prune(rows, importance)

    def live(self, image: Asked) -> int:
        """Live tokens of an image."""
        return len(self.encode(image)[1])


@dataclass
class Served:
    """An engine and what it should answer."""

    llm: Any
    reference: ServingReference
    hybrid: dict[str, Any]
    questions: dict[tuple[bytes, ...], str] = field(default_factory=dict)

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def generate(self, asks: Sequence[Ask], max_tokens: int = 6, **sampling: Any) -> list[Any]:
        """Answer all requests at once; greedy, with five log probabilities a token, unless told otherwise."""
        from vllm import SamplingParams

        options: dict[str, Any] = {"temperature": 0, "logprobs": 5, "ignore_eos": True} | sampling
        params = SamplingParams(max_tokens=max_tokens, **options)
        return self.llm.generate([ask.request() for ask in asks], params, use_tqdm=False)

    def decided(self, *images: Asked) -> Ask:
        """A prompt with these images whose prunes are no matter of rounding.

        Raises:
            RuntimeError: no question at hand makes one.

        """
        key = tuple(map(image_key, images))
        questions = (self.questions[key],) if key in self.questions else _QUESTIONS
        for question in questions:
            ask = Ask(prompt(question, len(images)), images)
            if self.is_decided(ask):
                self.questions[key] = question
                return ask
        raise RuntimeError(f"no question decides the prunes of {len(images)} images; use other images")

    def is_decided(self, ask: Ask) -> bool:
        """Whether the reference's merges and prunes of a request are clear of rounding."""
        if any(self.reference.merge_margin(image) < MERGE_MARGIN for image in ask.images):
            return False
        if not any(self.reference.setting(image).ratio for image in ask.images):
            return True
        choices = self.reference.choices(self.reference.prompt_ids(ask.text), ask.images)
        # A surviving last row has infinite importance, and no margin of its own.
        return all(choice.margin > CHOICE_MARGIN for choice in choices)

    def check(self, asks: Sequence[Ask], outputs: Sequence[Any], tolerance: float = TOLERANCE) -> float:
        """Assert that prompts, tokens and log probabilities are right; return the worst difference."""
        worst = 0.0
        for ask, output in zip(asks, outputs, strict=True):
            ids = self.reference.prompt_ids(ask.text)
            assert list(output.prompt_token_ids) == ids
            for answer in output.outputs:
                tokens = list(answer.token_ids)
                score = self.reference.score(ids, ask.images, tokens)
                for row, reported in zip(score.distributions, answer.logprobs, strict=True):
                    for token, entry in reported.items():
                        worst = max(worst, abs(entry.logprob - float(row[token])))
        assert worst <= tolerance, f"log probabilities differ by up to {worst}"
        return worst


def fingerprint(outputs: Sequence[Any]) -> list[list[list[int]]]:
    """Tokens of every answer of every request."""
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def logprob_gap(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Largest difference of the chosen tokens' log probabilities between two runs with equal tokens."""
    assert fingerprint(first) == fingerprint(second)
    gap = 0.0
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            for token, p, q in zip(x.token_ids, x.logprobs, y.logprobs, strict=True):
                gap = max(gap, abs(p[token].logprob - q[token].logprob))
    return gap


# --------------------------------------------------------------------------------------------------
# Checkpoints, images, thresholds
# --------------------------------------------------------------------------------------------------


@cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="hybrid-engines-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def checkpoint(**options: Any) -> Path:
    """A tiny checkpoint (see `write_checkpoint`), written once per set of options."""
    name = "-".join(f"{key}={value}" for key, value in sorted(options.items())) or "plain"
    return write_checkpoint(_scratch() / name, **{"seed": 1, **options})


@cache
def thresholds() -> tuple[float, ...]:
    """Thresholds that merge about 60 % of the even tokens in each layer of the plain checkpoint."""
    return tuple(pick_thresholds(checkpoint(), list(make_images(1).values()), [0.6, 0.6, 0.6]))


def hybrid_section(mode: str, layer: int = 2, ratio: float = 0.5) -> dict[str, Any]:
    """The `hybrid` section of a mode: off, dymu, fastv or both."""
    merging = {"thresholds": list(thresholds())} if mode in ("dymu", "both") else {}
    pruning = {"fastv_layer": layer, "fastv_ratio": ratio} if mode in ("fastv", "both") else {}
    return merging | pruning


@cache
def images(count: int = 8) -> tuple[Image.Image, ...]:
    """Images, kinds mixed, whose merges and single-image prunes are no matter of rounding."""
    return tuple(decided_images(ServingReference(checkpoint(), hybrid_section("both")), count))


# --------------------------------------------------------------------------------------------------
# Engines
# --------------------------------------------------------------------------------------------------

_engines: dict[str, Served] = {}


def serve(
    hybrid: dict[str, Any], path: Path | None = None, *, meaning: Path | None = None, **options: Any
) -> Served:
    """The engine of a configuration, started on first use.

    Args:
        hybrid: the hybrid section; {} switches everything off.
        path: the checkpoint; the plain tiny one if left out.
        meaning: the checkpoint that the reference reads, where it cannot read the engine's.
        options: arguments of vLLM's `LLM` that differ from the tests' usual ones.

    Returns:
        The engine with its reference.

    """
    path = path or checkpoint()
    key = json.dumps([hybrid, str(path), options], sort_keys=True, default=str)
    if key not in _engines:
        reference = ServingReference(meaning or path, hybrid)
        _engines[key] = Served(_start(hybrid, path, options), reference, hybrid)
    return _engines[key]


def serve_stock() -> Served:
    """vLLM's own LLaVA, with a pool of the size that `TIGHT` gives ours, in blocks of about ours."""
    return serve({}, checkpoint(architecture=STOCK), block_size=32, **TIGHT)


def _start(hybrid: dict[str, Any], path: Path, options: dict[str, Any]) -> Any:
    from vllm import LLM

    usual: dict[str, Any] = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 1 << 27,
        "limit_mm_per_prompt": {"image": 3},
        "max_logprobs": 8,
        "disable_log_stats": False,
        "hf_overrides": {"hybrid": hybrid or None},
    }
    variable = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(variable)
    os.environ[variable] = "0"
    try:
        return LLM(str(path), **(usual | options))
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


@atexit.register
def _stop() -> None:
    for served in _engines.values():
        served.llm.llm_engine.engine_core.shutdown()
    _engines.clear()


def at_rest(served: Served) -> bool:
    """Whether every block but the null block is free."""
    return served.pool.get_num_free_blocks() == served.pool.num_gpu_blocks - 1
