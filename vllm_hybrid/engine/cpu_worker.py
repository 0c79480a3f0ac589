"""vLLM's CPU worker, which also reports what :mod:`vllm_hybrid.engine.worker` collects.

Importing vLLM's CPU worker turns CUDA streams, events and pinned memory of the whole process into no-ops, so
nothing that a CUDA process loads may import this file.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_hybrid.engine.worker import StepReports


class HybridCPUWorker(StepReports, CPUWorker):
    """The CPU worker with step reports."""
