"""What the host does before and between the layers of a step on a GPU, timed on a CPU.

    python benchmarks/plan_host_time.py

A prefill step of prompts with one picture each is planned as on CUDA: images read, rows chosen, page facts
written, queries and keys listed, both tiers. Pictures are tiny, so that torch's operations compute next to
nothing, and Triton's launches do nothing: what is left is the host's own work, Python and torch's dispatch.
What a device's driver adds to each launch is not in it, so the launches are counted too; nor are the layers,
whose launches run ahead of the device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from tests.support.step_trace import trace_step  # noqa: E402
from vllm_hybrid.attention.gpu import GpuAttention  # noqa: E402
from vllm_hybrid.kv.page_facts import new_page_facts  # noqa: E402
from vllm_hybrid.method.row_plan import StepImages, plan_text_rows  # noqa: E402
from vllm_hybrid.models import step as planning  # noqa: E402
from vllm_hybrid.models.llama import _rope_positions  # noqa: E402

PATCHES, LIVE, TEXT, BLOCK = 24, 6, 8, 16
BEFORE = 5


class Prompts:
    """A step that brings some prompts, each with one picture."""

    def __init__(self, prompts: int) -> None:
        length = PATCHES + TEXT
        per_prompt = -(-length // BLOCK)
        self.starts = [number * length for number in range(prompts + 1)]
        self.owner = torch.arange(PATCHES).remainder(LIVE).repeat(prompts, 1)
        self.level = torch.zeros(prompts, dtype=torch.int64)
        self.positions = torch.arange(length).repeat(prompts)
        self.token_ids = torch.zeros(prompts * length, dtype=torch.int32)
        self.hidden = torch.zeros(prompts * length, 8)
        blocks = 1 + torch.arange(prompts * per_prompt).view(prompts, per_prompt)
        slots = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)[:, :length].flatten()
        lengths = torch.full((prompts,), length, dtype=torch.int32)
        self.common: Any = SimpleNamespace(
            query_start_loc=torch.tensor(self.starts, dtype=torch.int32),
            block_table_tensor=blocks.int(),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            slot_mapping=slots,
        )
        facts = [new_page_facts(1 + blocks.numel(), BLOCK, PATCHES, torch.device("cpu")) for _ in range(2)]
        self.pages = [planning.TierPages(PATCHES, one, BLOCK, BLOCK) for one in facts]
        self.foreign = torch.zeros(2, prompts, dtype=torch.bool)
        self.text_rows = plan_text_rows(len(self.positions))
        self.ops: Any = GpuAttention()

    def plan(self) -> None:
        """All that a step does outside its layers."""
        first_rows = [start + BEFORE for start in self.starts[:-1]]
        images = StepImages.of(first_rows, self.owner, self.level, [0.5], self.token_ids)
        step = planning.Step(self.positions, self.starts, images, self.text_rows)
        live = step.lower_rows()
        self._plan_tier(0, step, live)
        hidden = self.hidden[live.rows]
        _rope_positions(live, step, live.rows.shape[0])
        kept = step.upper_rows(live, torch.rand(live.rows.shape[0]), heads=32)
        places = torch.searchsorted(live.rows, kept.rows)
        hidden[places], hidden[places]
        _rope_positions(kept, step, kept.rows.shape[0])
        self._plan_tier(1, step, kept)

    def _plan_tier(self, tier: int, step: planning.Step, rows: Any) -> None:
        planning.store_facts_and_plan(step, rows, self.common, self.pages[tier], self.foreign[tier], self.ops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # There is one rank, and no group of processes.
    planning.sum_over_ranks = lambda part: part
    launched = []
    InterpretedFunction.run = lambda self, *_, **__: launched.append(self.__name__)
    prompts = Prompts(args.prompts)
    with trace_step([prompts.common.seq_lens_cpu_upper_bound]) as trace:
        prompts.plan()
    launched.clear()
    times = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        prompts.plan()
        times.append(time.perf_counter() - began)
    kernels = len(launched) // args.repeats
    low, *_, high = statistics.quantiles(times, n=20)
    launches, waits = len(trace.launches), len(trace.waits)
    print(f"{args.prompts} prompts: {launches} launches, {kernels} of them Triton's, {waits} wait")
    print(f"host: {statistics.median(times) * 1e3:.2f} ms (5% to 95%: {low * 1e3:.2f} to {high * 1e3:.2f})")


if __name__ == "__main__":
    main()
