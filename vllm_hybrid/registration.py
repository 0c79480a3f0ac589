"""Everything vLLM has to know about this package, registered once per process by its plugin."""

from __future__ import annotations

from .checkpoint import ARCHITECTURE
from .settings import HybridSettings


def register() -> None:
    """Register the model and its configuration hook, the KV tiers and the attention backend."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(ARCHITECTURE, "vllm_hybrid.model:LlavaHybridForConditionalGeneration")
    MODELS_CONFIG_MAP[ARCHITECTURE] = HybridSettings
    from . import request_checks, tiers  # noqa: F401  (importing tiers registers the cache specs)

    request_checks.install()
