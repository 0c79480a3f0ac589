"""Everything vLLM has to know about this package, registered once per process by its plugin."""

from __future__ import annotations

import os

from vllm_hybrid.checkpoint.llava import ARCHITECTURE
from vllm_hybrid.environment.faults import ADVICE
from vllm_hybrid.startup import refusal, versions

# Unless it is 0 or empty, it switches off this plugin and no other, which VLLM_PLUGINS cannot.
DISABLED = "VLLM_HYBRID_DISABLED"


def register() -> None:
    """Register the package with vLLM, or else a refusal of its own architecture.

    vLLM calls this for every model of the environment, so nothing that is wrong here may end another's start.
    """
    disabled = os.environ.get(DISABLED, "0")
    if disabled not in ("", "0"):
        refusal.register(f"vllm-hybrid is switched off ({DISABLED}={disabled}); unset the variable")
        return
    try:
        versions.check()
        _register()
    except versions.UntestedVersion as error:
        refusal.register(str(error))
    except Exception as error:
        refusal.register(
            f"vllm-hybrid cannot be loaded beside the installed vLLM ({type(error).__name__}: {error}); "
            f"install both anew, or {ADVICE}"
        )


def _register() -> None:
    """The model and its configuration hook, the KV tiers, and the checks of requests."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    # Importing tiers registers the cache specs.
    from vllm_hybrid.frontend import beam_steps, details, input_processor, picture_levels, request_cost
    from vllm_hybrid.kv import tiers  # noqa: F401
    from vllm_hybrid.startup.settings import HybridSettings

    beam_steps.install()
    details.install()
    picture_levels.install()
    request_cost.install()
    input_processor.install()
    ModelRegistry.register_model(ARCHITECTURE, "vllm_hybrid.models.llava:LlavaHybridForConditionalGeneration")
    MODELS_CONFIG_MAP[ARCHITECTURE] = HybridSettings
