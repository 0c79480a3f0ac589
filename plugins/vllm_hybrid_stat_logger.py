"""Entry point of ``vllm.stat_logger_plugins``, which vLLM loads in the process of its API server."""

from vllm_hybrid.frontend.metrics import HybridStatLogger

__all__ = ["HybridStatLogger"]
