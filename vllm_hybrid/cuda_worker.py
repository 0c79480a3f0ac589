"""vLLM's CUDA worker, which also tells the scheduler how many live tokens each new image has."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from .worker import LiveCounts


class HybridCUDAWorker(LiveCounts, Worker):
    """The CUDA worker with live counts."""
