"""Weights without a checkpoint: vLLM's dummy ones, and the benchmark's tower in place of a dummy tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from benchmarks.gpu.speed.in_worker import InWorker as InWorker
from benchmarks.gpu.speed.model import tower_file

LOAD_FORMAT = "dummy_with_tower"
# Every worker process imports this file for the extension and so knows the loader.
WORKER_EXTENSION = "benchmarks.gpu.speed.loading.InWorker"


@register_model_loader(LOAD_FORMAT)
class TowerLoader(DummyModelLoader):
    """Dummy weights everywhere but in the vision tower, which stock and hybrid share."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill a model before vLLM packs its weights for the device."""
        super().load_weights(model, model_config)
        model.load_weights(iter(load_file(tower_file(Path(model_config.model))).items()))
