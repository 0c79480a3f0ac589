"""Check that vLLM loads this package, for which device, and serves its architecture."""

from __future__ import annotations

from vllm_hybrid.doctor import fresh
from vllm_hybrid.doctor.finding import Finding

_LOAD = """
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm_hybrid.checkpoint.llava import ARCHITECTURE
settings = MODELS_CONFIG_MAP.get(ARCHITECTURE)
found([current_platform.device_type, settings is not None, getattr(settings, "REASON", "")])
"""


def check_plugin() -> list[Finding]:
    """Whether vLLM can be imported, has a device, and finds and accepts this package."""
    part = "plugin"
    ran = fresh.run(_LOAD)
    if ran.result is None:
        return [Finding(part, "", f"vLLM cannot be imported ({ran.error})", "close the gaps above first")]
    device, registered, reason = ran.result
    if not registered:
        gap = "vLLM does not load it"
        return [
            Finding(part, "", gap, "install vllm-hybrid anew, and let VLLM_PLUGINS name hybrid or nothing")
        ]
    if reason:
        return [Finding(part, "", reason)]
    if not device:
        return [Finding(part, "", "vLLM finds no device to run on", "close the gaps above first")]
    return [Finding(part, f"vLLM loads it, for {device}")]
