"""vLLM's CUDA worker, which also reports what :mod:`vllm_hybrid.engine.worker` collects."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_hybrid.engine.worker import StepReports


class HybridCUDAWorker(StepReports, Worker):
    """The CUDA worker with step reports."""
