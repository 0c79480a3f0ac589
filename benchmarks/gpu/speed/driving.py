"""Loads on a running engine: so many requests in flight, or arrivals that do not wait for answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks.gpu.speed.measuring import Timed
from benchmarks.gpu.speed.prepared import Supply


class Driver:
    """Sends requests to vLLM's asynchronous engine and times their tokens.

    Args:
        engine: vLLM's ``AsyncLLM``.
        supply: new requests.

    """

    def __init__(self, engine: Any, supply: Supply) -> None:
        self.engine = engine
        self.supply = supply
        self._sent = 0

    async def in_flight(self, count: int, concurrency: int, tokens: int) -> Timed:
        """``count`` requests, ``concurrency`` of them at any time: the next is sent when one is done."""
        timed = Timed(tokens)
        left = iter(self.supply.take(count))
        began = time.perf_counter()
        await _all_or_first_error(self._one_after_the_other(left, timed) for _ in range(concurrency))
        timed.seconds = time.perf_counter() - began
        return timed

    async def arriving(self, count: int, rate: float, tokens: int, seed: int) -> Timed:
        """``count`` requests that arrive as a Poisson process, whatever became of those before.

        Args:
            count: requests.
            rate: arrivals per second.
            tokens: new tokens of each.
            seed: of the gaps.

        Returns:
            The run; the time to first token counts from when a request was due.

        """
        timed = Timed(tokens)
        draw, due = random.Random(seed), 0.0
        began = time.perf_counter()
        sent = []
        for request in self.supply.take(count):
            due += draw.expovariate(rate)
            sent.append(self._when_due(request, began + due, timed))
        await _all_or_first_error(sent)
        timed.seconds = time.perf_counter() - began
        return timed

    async def abandon_when(self, count: int, tokens: int, full: Any) -> None:
        """Send ``count`` requests at once and drop them all as soon as ``full()`` is true."""
        timed = Timed(tokens)
        tasks = [asyncio.ensure_future(self._one(r, timed)) for r in self.supply.take(count)]
        while not all(task.done() for task in tasks) and not full():
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one_after_the_other(self, left: Iterator[Any], timed: Timed) -> None:
        for request in left:
            await self._one(request, timed)

    async def _when_due(self, request: Any, due: float, timed: Timed) -> None:
        await asyncio.sleep(due - time.perf_counter())
        await self._one(request, timed, due)

    async def _one(self, request: Any, timed: Timed, due: float | None = None) -> None:
        params = SamplingParams(
            temperature=0,
            max_tokens=timed.tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._sent += 1
        began = time.perf_counter() if due is None else due
        first, made = 0.0, 0
        async for output in self.engine.generate(request, params, str(self._sent)):
            if not made:
                first = time.perf_counter()
            made += len(output.outputs[0].token_ids)
        if made != timed.tokens:
            raise RuntimeError(f"a request made {made} tokens instead of {timed.tokens}")
        timed.first.append(first - began)
        timed.last.append(time.perf_counter() - first)


async def _all_or_first_error(work: Any) -> None:
    """Wait for all; the first error ends the others."""
    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(one)
