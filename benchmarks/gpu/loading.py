"""Weights without a checkpoint: vLLM's dummy ones, and the benchmark's tower in place of a dummy tower."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from benchmarks.gpu.model import seeded_tower, tower_weights

LOAD_FORMAT = "dummy_with_tower"
WORKER_EXTENSION = "benchmarks.gpu.loading.InWorker"


@register_model_loader(LOAD_FORMAT)
class TowerLoader(DummyModelLoader):
    """Dummy weights everywhere but in the vision tower, which stock and hybrid share."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill a model before vLLM packs its weights for the device."""
        super().load_weights(model, model_config)
        model.load_weights(tower_weights(seeded_tower(model_config.hf_config.vision_config)))


class InWorker:
    """An empty worker extension: every worker process imports this file for it and so knows the loader."""
