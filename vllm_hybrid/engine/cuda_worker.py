"""vLLM's CUDA worker, which also reports what :mod:`vllm_hybrid.engine.worker` collects."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_hybrid.engine.worker import StepReports
from vllm_hybrid.environment.waits import announced_wait

COMPILING_TOWER = "profiling, in which Triton compiles the vision tower's kernels"


class HybridCUDAWorker(StepReports, Worker):
    """The CUDA worker with step reports; it has vLLM's encoder runner capture the tower's graphs."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        graphs = self.model_runner.get_model().tower_graphs
        if graphs is not None:
            self.model_runner.model_state.encoder_runner.cudagraph_manager = graphs

    def determine_available_memory(self) -> int:
        """As vLLM does; its run with pictures is the first that launches the tower's kernels."""
        merges = self.model_runner.get_model().hybrid.merges
        with announced_wait(COMPILING_TOWER) if merges else nullcontext():
            return super().determine_available_memory()

    def _maybe_activate_jit_monitor(self) -> None:
        """From here on vLLM reports whatever is compiled, and ends where it is told to."""
        self._warm_up()
        super()._maybe_activate_jit_monitor()
