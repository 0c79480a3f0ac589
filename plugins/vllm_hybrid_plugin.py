"""Entry point of ``vllm.general_plugins``, which vLLM calls in each of its processes before a model loads."""

from vllm_hybrid.registration import register

__all__ = ["register"]
