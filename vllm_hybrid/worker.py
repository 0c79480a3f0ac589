"""vLLM's workers, which also tell the scheduler how many live tokens each new image has."""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from .scheduler import LIVE_COUNTS


class CountedOutput(AsyncModelRunnerOutput):
    """A step's output that is still on its way, with the live counts of the images it encoded."""

    def __init__(self, output: AsyncModelRunnerOutput, counts: dict[str, int]) -> None:
        self.output = output
        self.counts = counts

    def get_output(self) -> ModelRunnerOutput:
        return _attach(self.output.get_output(), self.counts)


def _attach(output: ModelRunnerOutput, counts: dict[str, int]) -> ModelRunnerOutput:
    # vLLM shares one empty output between steps, so it is never written to.
    output = copy.copy(output)
    setattr(output, LIVE_COUNTS, counts)
    return output


class LiveCounts:
    """Mixed into vLLM's workers, before them."""

    model_runner: Any
    _counts: dict[str, int]

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        self._counts = self._count_encoded(scheduler_output)
        return result if result is None else self._counted(result)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        result = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        return result if result is None else self._counted(result)

    def _counted(self, result: Any) -> Any:
        counts, self._counts = self._counts, {}
        if not counts:
            return result
        if isinstance(result, AsyncModelRunnerOutput):
            return CountedOutput(result, counts)
        return _attach(result, counts) if isinstance(result, ModelRunnerOutput) else result

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


class HybridCPUWorker(LiveCounts, CPUWorker):
    """The CPU worker with live counts."""
