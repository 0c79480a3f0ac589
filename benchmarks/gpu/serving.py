"""One vLLM engine, measured: started by bench.py in a process of its own, a line of JSON per finished cell.

Requests are tokenised and their pictures resized before the clock starts, in stock and hybrid alike: what is
timed is the engine. All requests of a load arrive together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.engine import REQUESTS as REQUESTS_A_SEED  # noqa: E402
from benchmarks.engine import requests as some_requests  # noqa: E402
from benchmarks.gpu.measuring import Timed, summary  # noqa: E402

GIB = 1 << 30


def engine_options(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``: the same for stock and hybrid but for the architecture and its section."""
    from benchmarks.gpu.loading import LOAD_FORMAT, WORKER_EXTENSION

    options: dict[str, Any] = {
        "model": str(folder),
        "load_format": LOAD_FORMAT,
        "worker_extension_cls": WORKER_EXTENSION,
        "dtype": "bfloat16",
        "max_model_len": plan["max_model_len"],
        "max_num_batched_tokens": plan["step_tokens"],
        "max_num_seqs": plan["max_num_seqs"],
        "kv_cache_memory_bytes": plan["pool_bytes"],
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 1},
        "mm_processor_cache_gb": 0,
        "disable_log_stats": False,
        "hf_overrides": plan["overrides"],
    }
    if plan["eager"]:
        options["enforce_eager"] = True
    else:
        options["compilation_config"] = {"cudagraph_capture_sizes": plan["graph_sizes"]}
    if plan["cuda"]:
        # The bundle leaves FlashAttention out; the hybrid attends in Triton too.
        options |= {"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}
        options["block_size"] = 16
    elif plan["kind"] == "hybrid":
        options["block_size"] = 16
    return options


class Bench:
    """An engine and a supply of requests whose pictures never repeat."""

    def __init__(self, llm: Any, image_token: int, first_seed: int) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.image_token = image_token
        self.seed = first_seed
        self.number = 0

    def prepare(self, count: int) -> list[Any]:
        """Rendered requests: TEXT_TOKENS text tokens and a picture each."""
        prompts: list[Any] = []
        while len(prompts) < count:
            self.seed += 1
            prompts += some_requests(self.seed, True, self.image_token)[:REQUESTS_A_SEED]
        return self.llm._preprocess_cmpl(prompts[:count])

    def add(self, request: Any, tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.number += 1
        self.engine.add_request(str(self.number), request, params)

    def together(self, count: int, tokens: int) -> Timed:
        """Time ``count`` requests that arrive together."""
        rendered = self.prepare(count)
        return self._run([rendered], tokens)

    def alone(self, count: int, tokens: int) -> Timed:
        """Time ``count`` requests, each sent when the one before is done."""
        return self._run([[request] for request in self.prepare(count)], tokens)

    def _run(self, waves: list[list[Any]], tokens: int) -> Timed:
        timed = Timed(tokens)
        began = time.perf_counter()
        for wave in waves:
            arrived = time.perf_counter()
            for request in wave:
                self.add(request, tokens)
            first: dict[str, float] = {}
            while self.engine.has_unfinished_requests():
                outputs = self.engine.step()
                clock = time.perf_counter()
                for output in outputs:
                    made = len(output.outputs[0].token_ids)
                    if made and output.request_id not in first:
                        first[output.request_id] = clock
                        timed.first.append(clock - arrived)
                    if output.finished:
                        if made != tokens:
                            raise RuntimeError(f"a request made {made} tokens instead of {tokens}")
                        timed.last.append(clock - first[output.request_id])
        timed.seconds = time.perf_counter() - began
        if len(timed.last) != sum(map(len, waves)):
            raise RuntimeError(f"{len(timed.last)} of {sum(map(len, waves))} requests finished")
        return timed

    def _gauges(self) -> dict[str, float]:
        names = {
            "vllm:num_requests_running": "running",
            "vllm:kv_cache_usage_perc": "usage",
            "vllm:num_preemptions": "preemptions",
        }
        return {names[m.name]: m.value for m in self.llm.get_metrics() if m.name in names}

    def capacity(self, count: int, tokens: int, pool_bytes: int) -> dict[str, Any]:
        """How many requests run at once in the pool before one has to go, and what each holds.

        Args:
            count: requests sent together, more than fit.
            tokens: new tokens of each, enough for the first to be still there when the last comes.
            pool_bytes: bytes of the pool.

        """
        before = self._gauges().get("preemptions", 0)
        for request in self.prepare(count):
            self.add(request, tokens)
        most, held = 0, 0.0
        preempted = False
        while self.engine.has_unfinished_requests():
            self.engine.step()
            gauges = self._gauges()
            preempted = preempted or gauges.get("preemptions", 0) > before
            if not preempted and gauges["running"] >= most:
                most = int(gauges["running"])
                held = gauges["usage"] * pool_bytes / max(most, 1)
        return {
            "running_at_once": most,
            "sent": count,
            "limited_by_sent": most == count,
            "kv_bytes_a_request": held,
            "pool_bytes": pool_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("plan", help="JSON: what to serve and to measure, made by bench.py")
    args = parser.parse_args()
    plan = json.loads(args.plan)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    # Functions for the worker travel pickled, between processes of this run.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM

    from benchmarks.gpu import in_worker

    began = time.perf_counter()
    llm = LLM(**engine_options(args.folder, plan))
    reduces = plan["kind"] == "hybrid"
    if reduces:
        llm.apply_model(in_worker.watch_counts)
    bench = Bench(
        llm, json.loads((args.folder / "config.json").read_text())["image_token_index"], plan["seed"]
    )
    tell({"started_s": time.perf_counter() - began})
    level = None
    for cell in plan["cells"]:
        if time.time() + cell["seconds"] > plan["deadline"]:
            tell({"skipped": cell["key"]})
            continue
        if reduces and cell["live"] != level:
            level = cell["live"]
            llm.apply_model(in_worker.SetThresholds(plan["thresholds"][str(level)]))
            bench.together(plan["warm_up"], 2)
        elif level is None and not reduces:
            level = 576
            bench.together(plan["warm_up"], 2)
        if reduces:
            llm.apply_model(in_worker.take_counts)
        began = time.perf_counter()
        result: dict[str, Any]
        if cell["load"] == "capacity":
            result = bench.capacity(cell["requests"], cell["tokens"], plan["pool_bytes"])
        else:
            run = bench.alone if cell["load"] == "alone" else bench.together
            result = summary([run(cell["requests"], cell["tokens"]) for _ in range(plan["repeats"])])
        if reduces:
            counts = llm.apply_model(in_worker.take_counts)[0]
            result["live_counts"] = {
                "images": len(counts),
                "mean": statistics.fmean(counts),
                "least": min(counts),
                "most": max(counts),
            }
        result["cell_s"] = time.perf_counter() - began
        tell({"key": cell["key"], "result": result})


def tell(message: dict[str, Any]) -> None:
    """One line for bench.py."""
    print("CELL " + json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
