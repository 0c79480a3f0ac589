"""One prefill step and some decode steps of one engine under torch's profiler, in a process of their own.

The engine runs in this very process, so that a step begins and ends where it is told to; the device's
timeline is that of a served engine, while the host's gaps between steps also hold what a server does in
another process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.gpu.running.answering import Answers  # noqa: E402
from benchmarks.gpu.speed.serving import engine_options, set_environment  # noqa: E402
from benchmarks.gpu.speed.trace_table import read_trace, summarise  # noqa: E402

DECODE_STEPS = 2
# Tokens that every request has made when the profiled decode steps begin, and tokens left behind them.
BEFORE, BEHIND = 3, 4


class Stepped:
    """An engine in this process that is asked step by step.

    Args:
        llm: vLLM's ``LLM``.
        supply: new requests.

    """

    def __init__(self, llm: Any, supply: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.supply = supply
        self.sent = 0
        self.made: dict[str, int] = {}

    def send(self, count: int, tokens: int) -> None:
        """Queue requests; nothing runs before the next step."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for request in self.supply.take(count):
            self.sent += 1
            self.made[str(self.sent)] = 0
            self.engine.add_request(str(self.sent), request, params)

    def step(self) -> None:
        """One step of the engine."""
        for output in self.engine.step():
            self.made[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                del self.made[output.request_id]

    def finish(self) -> None:
        """Steps until nothing is left."""
        while self.engine.has_unfinished_requests():
            self.step()

    def prefill(self, name: str, count: int) -> None:
        """Profile the step that prefills ``count`` prompts, with their pictures."""
        self.send(count, 1)
        settle()
        self.llm.start_profile(name)
        self.finish()
        self.llm.stop_profile()

    def decode(self, name: str, count: int) -> None:
        """Profile DECODE_STEPS steps in which ``count`` requests decode."""
        self.send(count, BEFORE + DECODE_STEPS + BEHIND)
        while min(self.made.values()) < BEFORE:
            self.step()
        settle()
        self.llm.start_profile(name)
        for _ in range(DECODE_STEPS):
            self.step()
        self.llm.stop_profile()
        self.finish()


def settle() -> None:
    """Wait for the device, so that kernels of earlier steps do not count as the profiled ones'."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trace_of(folder: Path, name: str) -> Path:
    """The trace that the worker's profiler wrote under a name, renamed to it alone.

    Raises:
        RuntimeError: there is none.

    """
    found = sorted(folder.glob(f"{name}_*.json.gz"))
    if not found:
        raise RuntimeError(f"the profiler wrote no trace of {name} to {folder}")
    return found[-1].replace(folder / f"{name}.json.gz")


def profile(folder: Path, plan: dict[str, Any], traces: Path, answers: Answers) -> None:
    """Start the engine of a plan and profile its steps; an answer for each trace."""
    from vllm import LLM
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    from benchmarks.gpu.speed.prepared import Supply

    traces.mkdir(parents=True, exist_ok=True)
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces.resolve()),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }
    llm = LLM(**engine_options(folder, plan), profiler_config=profiler)
    renderer = llm.llm_engine.renderer

    def render(request: dict[str, Any]) -> dict[str, Any]:
        parsed = parse_model_prompt(llm.llm_engine.model_config, request)
        (rendered,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)
        return rendered

    image_token = json.loads((folder / "config.json").read_text())["image_token_index"]
    supply = Supply.of(render, folder, image_token, pictures=plan["pictures"], seed=plan["seed"])
    stepped = Stepped(llm, supply)
    answers.tell({"started": True})
    for name, run, count in _steps(stepped, plan["prompts"], plan["requests"]):
        # The first time compiles kernels and starts the profiler.
        for attempt in ("warm-up", f"{plan['kind']}-{name}"):
            run(attempt, count)
        trace = trace_of(traces, f"{plan['kind']}-{name}")
        steps = 1 if name == "prefill" else DECODE_STEPS
        found = {"requests": count, "steps": steps, "trace_bytes": trace.stat().st_size}
        answers.tell({"step": name, "result": summarise(read_trace(trace)) | found})


def _steps(stepped: Stepped, prompts: int, requests: int) -> Sequence[tuple[str, Any, int]]:
    return (("prefill", stepped.prefill, prompts), ("decode", stepped.decode, requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("plan", help="JSON made by first_run.py")
    parser.add_argument("traces", type=Path, help="folder for the traces")
    args = parser.parse_args()
    answers = Answers()
    plan = json.loads(args.plan)
    set_environment(plan["kind"])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    profile(args.folder, plan, args.traces, answers)


if __name__ == "__main__":
    main()
