"""Configurations as a server makes them, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.support.engines import checkpoint

MERGES = {"thresholds": [0.9, 0.9, 0.9]}
PRUNES = {"fastv_layer": 2, "fastv_ratio": 0.5}
# One level that does both, one that does either, and the full one.
LEVELS = {
    "levels": {
        "low": {**MERGES, "fastv_ratio": 0.5},
        "mid": MERGES,
        "high": {"fastv_ratio": 0.75},
        "full": {},
    },
    "default_level": "low",
    "fastv_layer": 2,
}


def configure(
    hybrid: Any, architecture: str | None = None, path: Path | None = None, **options: Any
) -> VllmConfig:
    """The configuration `vllm serve` would start with, of the plain tiny checkpoint or another one."""
    path = path or (checkpoint(architecture=architecture) if architecture else checkpoint())
    usual: dict[str, Any] = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True}
    overrides = {} if architecture else {"hf_overrides": {"hybrid": hybrid}}
    return EngineArgs(model=str(path), **(usual | overrides | options)).create_engine_config()
