"""An engine that schedules and answers every step at once, and runs no model.

`vllm serve --distributed-executor-backend benchmarks.stub_engine.StubExecutor` is then limited by what is in
front of the model: API server processes and the engine core with its scheduler and KV blocks.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput

from vllm_hybrid.engine.scheduler import LIVE_COUNTS
from vllm_hybrid.startup.settings import reduces

# What every step answers; a piece of text in all tokenizers that end their bytes before it.
TOKEN = 400
# Live tokens of every picture, as in the benchmark of speed.
LIVE_TOKENS = 90


@dataclass
class Steps:
    """What a worker without a model answers to a scheduler.

    Args:
        token: answered to whoever has caught up with its prompt.
        live_tokens: told of every picture that is encoded; None tells nothing.

    """

    token: int
    live_tokens: int | None
    _prompts: dict[str, int] = field(default_factory=dict)
    _lengths: dict[str, int] = field(default_factory=dict)
    _pictures: dict[str, list[str]] = field(default_factory=dict)

    def answer(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """One token for every request whose known tokens the step computes to the last one."""
        for name in step.finished_req_ids:
            for known in (self._prompts, self._lengths, self._pictures):
                known.pop(name, None)
        ends = self._take_in(step)
        names = list(step.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[[self.token] if ends[name] >= self._lengths[name] else [] for name in names],
        )
        if self.live_tokens is not None and step.scheduled_encoder_inputs:
            setattr(output, LIVE_COUNTS, self._live_counts(step, self.live_tokens))
        return output

    def _take_in(self, step: SchedulerOutput) -> dict[str, int]:
        """Learn the lengths of requests; returns up to where the step computes each."""
        begins: dict[str, int] = {}
        for new in step.scheduled_new_reqs:
            self._prompts[new.req_id] = self._lengths[new.req_id] = len(new.prompt_token_ids or ())
            self._pictures[new.req_id] = [feature.identifier for feature in new.mm_features]
            begins[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for place, name in enumerate(cached.req_ids):
            begins[name] = cached.num_computed_tokens[place]
            if name in cached.resumed_req_ids:
                # A preempted request computes its answer so far as a part of its prompt.
                self._lengths[name] = self._prompts[name] + cached.num_output_tokens[place]
        return {name: begins[name] + number for name, number in step.num_scheduled_tokens.items()}

    def _live_counts(self, step: SchedulerOutput, live_tokens: int) -> dict[str, int]:
        return {
            self._pictures[name][place]: live_tokens
            for name, places in step.scheduled_encoder_inputs.items()
            for place in places
        }


class StubExecutor(UniProcExecutor):
    """vLLM's executor in the engine's own process, whose worker never runs its model.

    The worker loads it, so that KV caches, tiers and limits are the server's own.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        self.steps = Steps(TOKEN, LIVE_TOKENS if reduces(self.vllm_config) else None)

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """A step's tokens; pictures in shared memory are taken out of it, as a worker does."""
        self.driver_worker._apply_mm_cache(scheduler_output)
        output = self.steps.answer(scheduler_output)
        if not non_block:
            return output
        done: Future[ModelRunnerOutput] = Future()
        done.set_result(output)
        return done

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Every step's tokens are there when it is carried out."""
        return False
