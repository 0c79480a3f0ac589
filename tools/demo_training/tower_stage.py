"""First stages: the tower alone, from dense labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tools.demo_training.batches import Batch, dense_batch
from tools.demo_training.dense_loss import DenseHeads
from tools.demo_training.lessons import Pace
from tools.demo_training.network import GRID, TowerFeatures, normalised
from vllm_hybrid.demo.scenes import draw_scene

TRAIN, HELD_OUT = 1, 2
_EXAM_BATCHES = 3


def tower_parameters(features: TowerFeatures, heads: DenseHeads) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the features depend on, and those of the heads."""
    unused = (f".layers.{len(features.tower.encoder.layers) - 1}.", ".post_layernorm.")
    used = [(n, p) for n, p in features.named_parameters() if not any(part in n for part in unused)]
    return used + [(f"heads.{name}", p) for name, p in heads.named_parameters()]


class TowerLesson:
    """Dense labels of pictures of one size with up to nine things, more than the model is asked about later.

    Pictures smaller than the model's lie anywhere on its grid of positions.
    """

    def __init__(
        self, name: str, model: Any, heads: DenseHeads, pace: Pace, side: int, most: int = 9
    ) -> None:
        self.name, self.pace = name, pace
        self._features, self._heads = TowerFeatures(model), heads
        self._side, self._most = side, most

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The tower's and the heads'."""
        return tower_parameters(self._features, self._heads)

    def batch(self, seed: list[int]) -> Batch:
        """Pictures and dense labels, and where on the grid they lie."""
        scenes = [draw_scene([*seed, i], self._side, self._most) for i in range(self.pace.pictures)]
        spare = GRID - self._side // 14 + 1
        offset = torch.randint(spare, (2,), generator=torch.Generator().manual_seed(seed[-1]))
        return dense_batch(scenes) | {"offset": offset}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss of the heads."""
        pixels = normalised(batch["pixels"])
        row, column = batch["offset"].tolist()
        return self._heads(self._features(pixels, row, column), batch, pixels)

    def examine(self, rank: int) -> dict[str, tuple[float, int]]:
        """Share of patches of things whose kind and colour are read right, one question a batch."""
        sums: dict[str, tuple[float, int]] = {}
        for number in range(_EXAM_BATCHES):
            with torch.no_grad():
                _, right = self.loss(self.batch([HELD_OUT, rank, number]))
            for name, value in right.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)
        return sums
