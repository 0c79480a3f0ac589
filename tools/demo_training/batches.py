"""Batches drawn in processes beside the training one; the batch of a step depends on the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tools.demo_training.dense_labels import dense_labels
from vllm_hybrid.demo.scenes import Scene

Batch = dict[str, Tensor]


class _Steps(IterableDataset[Batch]):
    def __init__(self, make: Callable[[int], Batch], steps: range) -> None:
        self._make, self._steps = make, steps

    def __iter__(self) -> Iterator[Batch]:
        worker: Any = torch.utils.data.get_worker_info()
        share = self._steps[worker.id :: worker.num_workers] if worker else self._steps
        return (self._make(step) for step in share)


def batches(make: Callable[[int], Batch], steps: range, workers: int = 1) -> Iterator[Batch]:
    """The batches of the given steps, in order, made ahead of their use by other processes.

    Args:
        make: makes the batch of a step; nothing but the step decides what is in it.
        steps: the steps.
        workers: processes; 0 makes every batch when it is asked for.

    """
    options: dict[str, Any] = {"num_workers": workers, "batch_size": None}
    if workers:
        options |= {"prefetch_factor": 6, "multiprocessing_context": "fork"}
    return iter(DataLoader(_Steps(make, steps), **options))


def dense_batch(scenes: list[Scene]) -> Batch:
    """Pictures and labels of the tower's lessons.

    Returns:
        pixels uint8 [batch, side, side, 3]; kind, colour, cell, centre int64 [batch, patches, patches].

    """
    labels = [dense_labels(scene) for scene in scenes]
    stacked = {
        name: torch.from_numpy(np.stack([getattr(each, name) for each in labels]))
        for name in ("kind", "colour", "cell", "centre")
    }
    return {"pixels": torch.from_numpy(np.stack([scene.pixels for scene in scenes]))} | stacked
