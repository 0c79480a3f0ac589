"""What workers also do in a step: tell the model images' levels, the scheduler live tokens and lost pages.

Page facts are copied with the blocks they belong to. Before the first step every kernel is compiled.

Every platform loads this file, so it imports no platform's worker; `cpu_worker` and `cuda_worker` bind it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from vllm_hybrid.engine.scheduler import FOREIGN_PAGES, LIVE_COUNTS
from vllm_hybrid.engine.warm_up import warm_up
from vllm_hybrid.environment.waits import announced_wait
from vllm_hybrid.frontend.picture_levels import tell_level
from vllm_hybrid.levels import Levels
from vllm_hybrid.startup.settings import hybrid_config

COMPILING_ATTENTION = (
    "having Triton compile the attention's kernels, on requests that are made up; they are kept in its cache"
)


class ForeignPages:
    """Flags of a step that say whose pages held another request's data, on their way from the device.

    Args:
        flags: bool [tiers, requests], whether a page held another request's data.

    """

    def __init__(self, flags: torch.Tensor) -> None:
        # Into memory of its own: the next step writes its flags before this one's are read.
        self.host = flags.to("cpu", non_blocking=True, copy=True)
        self.arrived: torch.cuda.Event | None = None
        if flags.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def requests(self, request_ids: list[str]) -> list[str]:
        """Which of the step's requests, in their order in the batch, lost a page."""
        if self.arrived is not None:
            self.arrived.synchronize()
        lost = self.host.numpy().any(axis=0)[: len(request_ids)]
        return [name for name, flag in zip(request_ids, lost, strict=True) if flag]


@dataclass
class StepReport:
    """What is reported beside a step's tokens.

    Attributes:
        live_counts: live tokens by image identifier, of the images the step encoded.
        foreign: flags of requests whose pages held another's data, where the attention reports them.

    """

    live_counts: dict[str, int] = field(default_factory=dict)
    foreign: ForeignPages | None = None

    def attached(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """The output with this report, or as it is where there is nothing to report."""
        lost = self.foreign.requests(output.req_ids) if self.foreign is not None and output.req_ids else []
        if not self.live_counts and not lost:
            return output
        # vLLM shares one empty output between steps, so it is never written to.
        output = copy.copy(output)
        setattr(output, LIVE_COUNTS, self.live_counts)
        setattr(output, FOREIGN_PAGES, lost)
        return output


class ReportedOutput(AsyncModelRunnerOutput):
    """A step's output that is still on its way, with its report.

    The report is read where the sampled tokens are, which left the device later: it waits for nothing.
    """

    def __init__(self, output: AsyncModelRunnerOutput, report: StepReport) -> None:
        self.output = output
        self.report = report

    def get_output(self) -> ModelRunnerOutput:
        return self.report.attached(self.output.get_output())

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """Asked for from vLLM 0.33 on, where every output has it."""
        return self.output.get_kv_connector_output()


class StepReports:
    """Mixed into vLLM's workers, before them."""

    model_runner: Any
    _report: StepReport
    _warmed_up = False

    @cached_property
    def _levels(self) -> Levels:
        return hybrid_config(self.model_runner.vllm_config.model_config.hf_config).levels

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._warm_up()
        return times

    def _warm_up(self) -> None:
        """Have every kernel compiled, unless that is done."""
        if self._warmed_up:
            return
        self._warmed_up = True
        hybrid = hybrid_config(self.model_runner.vllm_config.model_config.hf_config)
        model = self.model_runner.get_model()
        if hybrid.active and model.language_model.model.attention_ops.compiles_on_launch:
            with announced_wait(COMPILING_ATTENTION):
                warm_up(self, hybrid.levels, model.patches)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        for request in scheduler_output.scheduled_new_reqs:
            for feature in request.mm_features:
                tell_level(feature, self._levels)
        if scheduler_output.kv_cache_block_copies:
            # The runner copies keys and values first thing, for prefixes that end inside a block.
            self.model_runner.get_model().copy_page_facts(scheduler_output.kv_cache_block_copies)
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        self._report = StepReport(self._count_encoded(scheduler_output))
        if scheduler_output.total_num_scheduled_tokens:
            flags = self.model_runner.get_model().foreign_pages()
            self._report.foreign = None if flags is None else ForeignPages(flags)
        return result if result is None else self._reported(result)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        result = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        return result if result is None else self._reported(result)

    def _reported(self, result: Any) -> Any:
        report, self._report = self._report, StepReport()
        if isinstance(result, AsyncModelRunnerOutput):
            return ReportedOutput(result, report)
        return report.attached(result) if isinstance(result, ModelRunnerOutput) else result

    def _count_encoded(self, scheduler_output: SchedulerOutput) -> dict[str, int]:
        """Live tokens by image identifier, of the images this step encoded."""
        if not scheduler_output.scheduled_encoder_inputs:
            return {}
        features, outputs = self._encoder_state()
        images = {
            features[request][i].identifier
            for request, indices in scheduler_output.scheduled_encoder_inputs.items()
            for i in indices
        }
        cached = {image: outputs[image] for image in sorted(images) if image in outputs}
        model = self.model_runner.get_model()
        return dict(zip(cached, model.live_counts(list(cached.values())), strict=True))

    def _encoder_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Each request's image features and the cached encodings, of either model runner."""
        runner = self.model_runner
        if hasattr(runner.encoder_cache, "encoder_outputs"):
            return runner.encoder_cache.mm_features, runner.encoder_cache.encoder_outputs
        return {name: state.mm_features for name, state in runner.requests.items()}, runner.encoder_cache
