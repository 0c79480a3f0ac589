"""Engines in processes of their own, all up at once, that compute nothing until they are asked."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from benchmarks.engine import open_engine, peak_blocks, random_text, with_picture
from vllm_hybrid.demo.scenes import draw_scene

# Of scenes that neither training nor calibration draws from.
SERIES = 6
_POOL_BYTES = 2 << 30
_PATIENCE_S = 60

# A picture's seed, and the level that its request names; None where it names none.
Ask = tuple[int, str | None]


@dataclass(frozen=True)
class Served:
    """An engine to start.

    Attributes:
        checkpoint: its folder.
        override: for vLLM's ``hf_overrides``.
        scenes: whether its pictures are the demo model's; else those of the other benchmarks.

    """

    checkpoint: Path
    override: dict[str, Any]
    scenes: bool = False


class Engine:
    """An engine of this process, and what is measured of it."""

    def __init__(self, served: Served) -> None:
        self._image_token = json.loads((served.checkpoint / "config.json").read_text())["image_token_index"]
        # Without the cache of prepared pictures, or what is asked first would fill it for the others.
        options = {"mm_processor_cache_gb": 0}
        self._llm = open_engine(served.checkpoint, served.override, _POOL_BYTES, **options)
        _count_images(self._llm.llm_engine)
        self._scenes = served.scenes

    def seconds(self, asks: Sequence[Ask], tokens: int) -> float:
        """How long requests take that arrive together, each with so many new tokens."""
        from vllm import SamplingParams

        prompts = [self._prompt(seed) for seed, _ in asks]
        params = [
            SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=_naming(level)
            )
            for _, level in asks
        ]
        began = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - began
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return took

    def kv_bytes(self, seeds: Sequence[int], level: str | None) -> float:
        """KV of one of some requests that decode together."""
        used = peak_blocks(self._llm, [self._prompt(seed) for seed in seeds], _naming(level))
        return used["pool_share"] * _POOL_BYTES / len(seeds)

    def image_tokens(self, level: str) -> tuple[float, float]:
        """Live and kept tokens of a picture, on average over all that were asked about at a level."""
        from prometheus_client import generate_latest

        from benchmarks.vllm_server import reduced

        seen = reduced(generate_latest().decode(), level)
        return seen["live_tokens"] / seen["images"], seen["kept_tokens"] / seen["images"]

    def close(self) -> None:
        """End the engine's own process, which this one would else wait for at its end."""
        self._llm.llm_engine.engine_core.shutdown()

    def _prompt(self, seed: int) -> dict[str, Any]:
        return with_picture(random_text(random.Random(seed)), self._picture(seed), self._image_token)

    def _picture(self, seed: int) -> Image.Image:
        from benchmarks.checkpoint import picture

        return Image.fromarray(draw_scene([SERIES, seed]).pixels) if self._scenes else picture(seed)


def _naming(level: str | None) -> dict[str, Any] | None:
    from vllm_hybrid.frontend.picture_levels import REQUEST_LEVEL

    return None if level is None else {REQUEST_LEVEL: level}


def _count_images(engine: Any) -> None:
    """Have the plugin count what an engine reduces; vLLM loads it for a server only."""
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter

    from vllm_hybrid.frontend.metrics import HybridStatLogger

    counting = PerEngineStatLoggerAdapter(
        engine.vllm_config, [0], per_engine_stat_logger_factory=HybridStatLogger
    )
    engine.logger_manager.stat_loggers.append(counting)


class EngineProcess:
    """An engine in a process of its own. As a context it is up inside, and gone behind it.

    Args:
        served: which.
        log: file that takes what it prints.

    """

    def __init__(self, served: Served, log: Path) -> None:
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, served, log))
        self._process.start()
        assert self._process.pid is not None
        self._family = self._process.pid
        there.close()

    def ask(self, what: str, *args: Any) -> Any:
        """What a method of :class:`Engine` returns.

        Raises:
            RuntimeError: the engine ended; its log says why.

        """
        self._here.send((what, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._here.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"the engine ended; see {self._log}") from None

    def __enter__(self) -> Self:
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._here.close()
        self._process.join(_PATIENCE_S)
        # Whatever is left of its family: one that was still starting does not end its children itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._family, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _work(connection: Connection, served: Served, log: Path) -> None:
    """Start an engine, say so, and answer until nobody asks any more."""
    # A session of its own, so that its children can be ended with it.
    os.setsid()
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    with connection, contextlib.closing(Engine(served)) as engine:
        connection.send(None)
        while True:
            try:
                what, args = connection.recv()
            except EOFError:
                return
            try:
                connection.send(getattr(engine, what)(*args))
            except Exception:
                traceback.print_exc()
                return
