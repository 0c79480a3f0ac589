"""Ranks as threads of one process, which exchange tensors as tensor-parallel ranks do.

What would leave those waiting for each other, or with wrong numbers, fails here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from vllm_hybrid.models.picture_shares import Ranks

Result = TypeVar("Result")


class RankThreads:
    """Some ranks.

    Args:
        size: how many.

    Attributes:
        exchanges: how many each rank came to.

    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.exchanges = [0] * size
        self._came: list[dict[int, torch.Tensor]] = []
        self._ended: set[int] = set()
        self._changed = threading.Condition()

    def run(self, work: Callable[[Ranks], Result]) -> list[Result]:
        """What every rank makes of the work, all at the same time, in inference mode.

        Raises:
            RuntimeError: a rank waited in an exchange for one that had ended, or they came with tensors of
                unlike shapes or dtypes, or of whole numbers, which vLLM does not exchange on CPUs.

        """
        with ThreadPoolExecutor(self.size) as pool:
            running = [pool.submit(self._run, work, rank) for rank in range(self.size)]
        return [one.result() for one in running]

    def _run(self, work: Callable[[Ranks], Result], rank: int) -> Result:
        try:
            with torch.inference_mode():
                return work(Ranks(self.size, rank, partial(self._gather, rank)))
        finally:
            with self._changed:
                self._ended.add(rank)
                self._changed.notify_all()

    def _gather(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        with self._changed:
            number = self.exchanges[rank]
            self.exchanges[rank] += 1
            if number == len(self._came):
                self._came.append({})
            parts = self._came[number]
            parts[rank] = part.clone()
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(parts) == self.size or self._ended - parts.keys())
        if absent := set(range(self.size)) - parts.keys():
            raise RuntimeError(f"ranks {sorted(absent)} never came to exchange {number}")
        if len({(one.shape, one.dtype) for one in parts.values()}) > 1:
            raise RuntimeError(f"ranks came to exchange {number} with unlike tensors")
        if not part.is_floating_point():
            raise RuntimeError(f"ranks came to exchange {number} with whole numbers")
        return torch.stack([parts[each] for each in range(self.size)])
