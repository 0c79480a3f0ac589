"""One engine answers the cases of the check, in a process of its own that run.py starts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The engine runs in this process, where its scheduler and model can be watched.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
# Products in full float32, so that merges and prunes fall as the reference's do.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402

from benchmarks.gpu.checks import asked  # noqa: E402
from benchmarks.gpu.checks.asked import CASES, CheckCase  # noqa: E402
from benchmarks.gpu.checks.compare import (  # noqa: E402
    TOLERANCES,
    Answer,
    Comparison,
    Look,
    NotingReference,
    same_answers,
)
from benchmarks.gpu.checks.watch import Pictures, Squeeze, Steps  # noqa: E402
from benchmarks.gpu.running.answering import Answers  # noqa: E402
from benchmarks.gpu.running.cases import Case, run_all  # noqa: E402
from tests.support.engines import Ask  # noqa: E402
from tests.support.tiny_checkpoints import make_images  # noqa: E402

GRAPH_SIZES = [1, 2, 4]
MAX_MODEL_LEN = 1536
POOL_BYTES = 1 << 27


def engine_options(checkpoint: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``: a user's defaults but for what the check is about.

    Args:
        checkpoint: the folder served.
        plan: ``dtype``, ``ratio``, ``eager`` and ``cuda``.

    """
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": plan["dtype"],
        "enforce_eager": plan["eager"],
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": POOL_BYTES,
        "limit_mm_per_prompt": {"image": 2},
        "max_logprobs": 8,
        "cudagraph_metrics": True,
        "hf_overrides": {"hybrid": asked.section(plan["ratio"])},
    }
    if plan["cuda"]:
        # Several engines of the check run side by side.
        options["gpu_memory_utilization"] = 0.1
        if plan["dtype"] == "float32":
            # FlashAttention has no float32.
            options["mm_encoder_attn_backend"] = "TORCH_SDPA"
    if not plan["eager"]:
        # With and without graphs of the tower, in two engines each of which prunes or does not.
        graphs = {"cudagraph_capture_sizes": GRAPH_SIZES, "cudagraph_mm_encoder": plan["ratio"] > 0}
        options["compilation_config"] = graphs
    return options


class Checked:
    """An engine that is watched, with the reference beside it.

    Args:
        llm: vLLM's ``LLM``, in this process.
        reference: of its checkpoint and section.
        dtype: it computes in.

    """

    def __init__(self, llm: Any, reference: NotingReference, dtype: str) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.reference = reference
        self.tolerance = TOLERANCES[dtype]
        images = make_images()
        pixels = [reference.pixel_values(images[name]) for name in asked.PICTURES]
        self.pictures = Pictures(torch.stack(pixels))
        llm.apply_model(self.pictures.attach)
        scheduler = self.engine.engine_core.engine_core.scheduler
        self.steps = Steps(scheduler)
        self.squeeze = Squeeze(scheduler.kv_cache_manager.block_pool)
        self.number = 0

    def check(self, name: str) -> dict[str, Any]:
        """Run a case twice and compare: with the reference, and with itself."""
        case = CASES[name]
        asks = case.asks()
        first, counts = self.answers(case, asks)
        second, _ = self.answers(case, asks)
        comparison = Comparison(self.reference, self.tolerance)
        for ask, answer in zip(asks, first, strict=True):
            comparison.add(ask, answer, case.tokens)
        found = comparison.result()
        found["agrees"]["second run"] = same_answers(first, second)
        found |= {"seen": counts}
        if case.condition is not None:
            found |= {"happened": counts[case.condition] > 0, "condition": case.says}
        return found

    def answers(self, case: CheckCase, asks: Sequence[Ask]) -> tuple[list[Answer], dict[str, int]]:
        """What the engine answers to the requests of a case, and what its steps were made of.

        Nothing is left from what it was asked before.
        """
        self.llm.reset_prefix_cache()
        self.engine.reset_encoder_cache()
        self.pictures.take()
        self.steps.take()
        outputs = self._run(case, asks)
        looks = self.pictures.take()
        return [
            _answer(output, [looks.get(picture, []) for picture in own])
            for output, own in zip(outputs, case.pictures, strict=True)
        ], self.steps.take()

    def _run(self, case: CheckCase, asks: Sequence[Ask]) -> list[Any]:
        """Final outputs of the requests, in their order."""
        waiting = self.llm._preprocess_cmpl([ask.request() for ask in asks])
        names: list[str] = []
        outputs: dict[str, Any] = {}
        squeezed, since = False, 0
        while waiting or self.engine.has_unfinished_requests():
            idle = not self.engine.has_unfinished_requests()
            if waiting and (idle or (case.gap is not None and (not names or since >= case.gap))):
                names.append(self._add(waiting.pop(0), case.tokens))
                since = 0
                continue
            for output in self.engine.step():
                outputs[output.request_id] = output
            since += 1
            if case.squeezed:
                if not squeezed and not waiting and _all_answering(names, outputs):
                    self.squeeze.hold()
                    squeezed = True
                elif self.squeeze.held and self.steps.counts["preempted"]:
                    self.squeeze.release()
        self.squeeze.release()
        return [outputs[name] for name in names]

    def _add(self, request: Any, tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, logprobs=5, ignore_eos=True, max_tokens=tokens)
        self.number += 1
        self.engine.add_request(str(self.number), request, params)
        return str(self.number)


def _all_answering(names: Sequence[str], outputs: dict[str, Any]) -> bool:
    return all(name in outputs and len(outputs[name].outputs[0].token_ids) >= 2 for name in names)


def _answer(output: Any, looks: list[list[Look]]) -> Answer:
    answer = output.outputs[0]
    return Answer(
        prompt_ids=list(output.prompt_token_ids),
        tokens=list(answer.token_ids),
        logprobs=[{token: entry.logprob for token, entry in step.items()} for step in answer.logprobs],
        looks=looks,
    )


def main() -> None:
    plan = json.loads(sys.argv[1])
    answers = Answers()
    from vllm import LLM

    began = time.perf_counter()
    checkpoint = asked.checkpoint(Path(plan["folder"]))
    llm = LLM(**engine_options(checkpoint, plan))
    reference = NotingReference(checkpoint, asked.section(plan["ratio"]))
    # The weights that are served: rounded to the engine's dtype.
    dtype = getattr(torch, plan["dtype"])
    reference.weights = {name: weight.to(dtype).float() for name, weight in reference.weights.items()}
    checked = Checked(llm, reference, plan["dtype"])
    answers.tell({"started_s": round(time.perf_counter() - began, 1), **_facts(llm)})
    cases = [Case(**case) for case in plan["cases"]]
    run_all(cases, lambda key: checked.check(key.partition(": ")[2]), plan["deadline"], answers)


def _facts(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return {
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "graph_mode": str(config.compilation_config.cudagraph_mode),
        "graph_sizes": config.compilation_config.cudagraph_capture_sizes,
        "block_size": config.cache_config.block_size,
        "async_scheduling": config.scheduler_config.async_scheduling,
    }


if __name__ == "__main__":
    main()
