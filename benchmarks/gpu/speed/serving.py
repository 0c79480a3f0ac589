"""One vLLM engine, measured: started by bench.py in a process of its own, an answer for each cell.

The engine is vLLM's ``AsyncLLM``, what ``vllm serve`` runs behind its HTTP server: scheduler and model live
in a process of their own, so that preparing requests and reading answers overlaps with steps as it does for
a user. Requests are tokenised and their pictures preprocessed before the clock starts, in stock and hybrid
alike: what is timed is the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.gpu.running.answering import Answers, questions  # noqa: E402
from benchmarks.gpu.speed.cells import REPEAT_WITHIN_S  # noqa: E402
from benchmarks.gpu.speed.measuring import Timed, summary  # noqa: E402

ARRIVALS_SEED = 7
WARM_UP_TOKENS = 3
# Share of the pool kept free when a request is let in: what stock lets in on its prompt alone grows by its
# new tokens, and without it outgrows the pool, so that requests are preempted and done again.
WATERMARK = 0.06
# Stock's second column: the attention family that the hybrid's kernels belong to.
ON_TRITON = {"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}


def engine_options(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's engine: what a user gets who sets nothing but the sizes of the run.

    Args:
        folder: of ``model.write_folder``.
        plan: ``kind`` (``stock``, ``stock_triton``, ``off`` or ``hybrid``), ``cuda``, ``eager``,
            ``overrides`` (``--hf-overrides``), ``max_model_len``, ``step_tokens``, ``max_num_seqs`` and
            ``pool_bytes``; where they are given, ``graph_sizes`` to capture, ``tower_graphs``, whether the
            tower is captured as well, and ``memory_share``, the share of the device that has to be free.

    Returns:
        The arguments. Attention backends, block sizes, graphs and prefix caching are vLLM's and the plugin's
        own choice, but for ``stock_triton``.

    """
    from benchmarks.gpu.speed.loading import LOAD_FORMAT, WORKER_EXTENSION

    options: dict[str, Any] = {
        "model": str(folder),
        "load_format": LOAD_FORMAT,
        "worker_extension_cls": WORKER_EXTENSION,
        "dtype": "bfloat16",
        "max_model_len": plan["max_model_len"],
        "max_num_batched_tokens": plan["step_tokens"],
        "max_num_seqs": plan["max_num_seqs"],
        "kv_cache_memory_bytes": plan["pool_bytes"],
        "limit_mm_per_prompt": {"image": 1},
        "mm_processor_cache_gb": 0,
        "watermark": WATERMARK,
        "disable_log_stats": False,
        "hf_overrides": plan["overrides"],
    }
    if plan["eager"]:
        options["enforce_eager"] = True
    elif graphs := _graphs(plan):
        options["compilation_config"] = graphs
    if plan.get("memory_share"):
        options["gpu_memory_utilization"] = plan["memory_share"]
    if plan["kind"] == "stock_triton" and plan["cuda"]:
        options |= ON_TRITON
    return options


def _graphs(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of graphs, as vLLM's compilation config."""
    said: dict[str, Any] = {}
    if plan.get("graph_sizes"):
        said["cudagraph_capture_sizes"] = plan["graph_sizes"]
    if plan.get("tower_graphs"):
        said["cudagraph_mm_encoder"] = True
    return said


def set_environment(kind: str | None = None) -> None:
    """What every process with an engine needs before vLLM is imported.

    Args:
        kind: of the engine; ``stock_triton`` has more of its own.

    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM's sampler imports it unless told not to; greedy sampling does not use it.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if kind == "stock_triton":
        # On sm_90 torch 2.11 tries cuDNN's attention first, which builds a plan for every shape.
        os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"


class Bench:
    """An engine, its counters, and a supply of requests whose pictures never repeat.

    Args:
        engine: vLLM's ``AsyncLLM``.
        counted: the engine's stat logger.
        driver: sends requests.
        plan: as bench.py made it.

    """

    def __init__(self, engine: Any, counted: Any, driver: Any, plan: dict[str, Any]) -> None:
        self.engine = engine
        self.counted = counted
        self.driver = driver
        self.plan = plan
        self._level: int | None = None

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of ``in_worker.InWorker`` in the one worker."""
        (answer,) = await self.engine.collective_rpc(method, args=args)
        return answer

    async def measure(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Run one cell.

        Returns:
            Rates and times of ``measuring.summary``, or what fitted into the pool; with them preemptions,
            encoded pictures, live counts of the hybrid, and seconds the cell took.

        """
        began = time.perf_counter()
        await self._set_level(cell["live"])
        await self.call("bench_take")
        self.counted.reset()
        if cell["load"] == "capacity":
            result = await self._capacity(cell)
        else:
            result = summary(await self._runs(cell))
        result |= self.counted.found() | await self._pictures()
        return result | {"cell_s": time.perf_counter() - began}

    async def _set_level(self, live: int) -> None:
        """Thresholds for a number of live tokens, and a warm-up where they are others than before."""
        if live == self._level:
            return
        self._level = live
        if self.plan["kind"] == "hybrid" and self.plan["merges"]:
            await self.call("bench_set_thresholds", self.plan["thresholds"][str(live)])
        for wave in self.plan["warm_up"]:
            await self.driver.in_flight(wave, wave, WARM_UP_TOKENS)

    async def _runs(self, cell: dict[str, Any]) -> list[Timed]:
        """As many repeats as are wanted, fewer where they take long."""
        runs: list[Timed] = []
        while not runs or (
            len(runs) < self.plan["repeats"] and sum(run.seconds for run in runs) < REPEAT_WITHIN_S
        ):
            if cell["rate"] is None:
                run = self.driver.in_flight(cell["requests"], cell["concurrency"], cell["tokens"])
            else:
                run = self.driver.arriving(cell["requests"], cell["rate"], cell["tokens"], ARRIVALS_SEED)
            runs.append(await run)
            if cell["rate"] is not None:
                break
        return runs

    async def _capacity(self, cell: dict[str, Any]) -> dict[str, Any]:
        """How many requests run at once in the pool before one has to go, and what each holds."""
        await self.driver.abandon_when(cell["requests"], cell["tokens"], lambda: self.counted.preemptions > 0)
        most = max(self.counted.most_running, 1)
        return {
            "running_at_once": most,
            "sent": cell["requests"],
            "limited_by_sent": most == cell["requests"],
            "kv_bytes_a_request": self.counted.held_share * self.plan["pool_bytes"] / most,
            "pool_bytes": self.plan["pool_bytes"],
        }

    async def _pictures(self) -> dict[str, Any]:
        """Encoded pictures, and the live tokens that the hybrid left of them."""
        taken = await self.call("bench_take")
        found: dict[str, Any] = {"pictures_encoded": taken["pictures"]}
        if counts := taken["counts"]:
            found["live_counts"] = {
                "images": len(counts),
                "mean": statistics.fmean(counts),
                "least": min(counts),
                "most": max(counts),
            }
        return found


async def start(folder: Path, plan: dict[str, Any]) -> Bench:
    """Start the engine of a plan."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.v1.engine.async_llm import AsyncLLM

    from benchmarks.gpu.speed.counting import Counted
    from benchmarks.gpu.speed.driving import Driver
    from benchmarks.gpu.speed.prepared import Supply

    made: list[Counted] = []

    def counting(vllm_config: Any, engine_index: int = 0) -> Counted:
        made.append(Counted(vllm_config, engine_index))
        return made[-1]

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**engine_options(folder, plan)), stat_loggers=[counting]
    )

    def render(request: dict[str, Any]) -> dict[str, Any]:
        parsed = parse_model_prompt(engine.model_config, request)
        (rendered,) = engine.renderer.render_cmpl([parsed], engine.renderer.default_cmpl_tok_params)
        return rendered

    image_token = json.loads((folder / "config.json").read_text())["image_token_index"]
    supply = Supply.of(render, folder, image_token, pictures=plan["pictures"], seed=plan["seed"])
    bench = Bench(engine, made[0], Driver(engine, supply), plan)
    await bench.call("bench_watch")
    return bench


async def serve(folder: Path, plan: dict[str, Any], answers: Answers) -> None:
    """Start the engine, then answer every cell that is asked for."""
    began = time.perf_counter()
    bench = await start(folder, plan)
    facts = await bench.call("bench_facts")
    answers.tell({"engine_s": time.perf_counter() - began, "facts": facts})
    for cell in questions():
        answers.tell({"result": await bench.measure(cell)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("plan", help="JSON: what to serve, made by bench.py; cells come by standard input")
    args = parser.parse_args()
    answers = Answers()
    plan = json.loads(args.plan)
    set_environment(plan["kind"])
    asyncio.run(serve(args.folder, plan, answers))


if __name__ == "__main__":
    main()
