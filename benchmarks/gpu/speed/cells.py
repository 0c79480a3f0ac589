"""What is measured, in which order: engines, the loads each of them gets, what each is expected to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

GIB = 1 << 30
UNMERGED = 576
KINDS = ("stock", "hybrid", "off", "stock_triton", "transformers")
LOADS = ("mixed", "prefill", "decode", "burst", "arrivals", "capacity")
# Seconds that a cell's repeats may take before no further one is begun.
REPEAT_WITHIN_S = 6.0


@dataclass(frozen=True)
class Cell:
    """One load on one engine.

    Attributes:
        load: one of LOADS.
        at: what tells it from others of its load: ``c64`` for 64 requests in flight, ``0.8x`` for a share of
            stock's saturated rate, ``all`` for requests that come together.
        tokens: new tokens of a request.
        requests: requests of one run; 0 with a share, where the rate decides.
        concurrency: requests in flight; None where arrivals do not wait for answers.
        share: arrivals per second over stock's saturated rate.
        rate: arrivals per second, once stock's rate is known.
        expected_s: seconds all repeats are expected to take on stock.
        headline: whether it belongs to the first table.

    """

    load: str
    at: str
    tokens: int
    requests: int
    concurrency: int | None = None
    share: float | None = None
    rate: float | None = None
    expected_s: float = 1.0
    headline: bool = False

    @property
    def name(self) -> str:
        """Load and size, the last part of a key."""
        return f"{self.load}/{self.at}"


@dataclass(frozen=True)
class Engine:
    """One start of one server.

    Attributes:
        kind: one of KINDS.
        ratio: R; 0 for all but the hybrid.
        lives: numbers of live tokens it is measured at, one after the other.
        narrow: whether it gets only a few sizes of each load.

    """

    kind: str
    ratio: float = 0.0
    lives: tuple[int, ...] = (UNMERGED,)
    narrow: bool = False

    @property
    def name(self) -> str:
        """Name in results and of the log."""
        if self.kind != "hybrid":
            return self.kind
        return f"hybrid-R{self.ratio:g}-" + "-".join(map(str, self.lives))

    def key(self, live: int, cell: Cell) -> str:
        """Name of a cell in the results."""
        return cell_key(self.kind, live, self.ratio, cell.name)


def cell_key(kind: str, live: int, ratio: float, name: str) -> str:
    """Name of a cell in the results: its kind, for the hybrid live tokens and R, its load and size."""
    return f"{kind}/{name}" if kind != "hybrid" else f"hybrid/{live}/{ratio:g}/{name}"


@dataclass(frozen=True)
class Scale:
    """How much is asked of the machine.

    Attributes:
        size: key of ``model.SIZES``.
        tokens: new tokens by load.
        requests: requests of a run by load and requests in flight.
        narrow: requests in flight that a narrow engine is measured at.
        shares: arrivals per second over stock's saturated rate.
        arriving_s: seconds for which requests arrive.
        most_arriving: most requests of a run of arrivals.
        burst: requests that come together.
        capacity: requests that fill the pool.
        pool_bytes: KV memory.
        max_num_seqs: requests an engine may run at once.
        step_tokens: tokens of a step.
        pictures: pictures that are prepared.
        calibration: pictures to calibrate on.
        warm_up: requests that come together, wave by wave, before anything is timed.
        start_s: seconds an engine is expected to take to start, until one has.
        start_limit_s: seconds after which an engine that has not started is given up.
        cell_limit_s: seconds that any cell may take before it is given up.
        rates: requests/s expected of stock by load, to plan with until it is measured.

    """

    size: str
    tokens: dict[str, int]
    requests: dict[str, dict[int, int]]
    narrow: tuple[int, ...]
    shares: tuple[float, ...]
    arriving_s: float
    most_arriving: int
    burst: int
    capacity: int
    pool_bytes: int
    max_num_seqs: int
    step_tokens: int
    pictures: int
    calibration: int
    warm_up: tuple[int, ...]
    start_s: float
    start_limit_s: float
    cell_limit_s: float
    rates: dict[str, float] = field(default_factory=dict)


# 16 tokens in 32 layers are 8 MiB of KV: in 50 GiB, 152 of stock's mixed requests fit, 114 of decode.
FULL = Scale(
    size="7b",
    tokens={"prefill": 1, "mixed": 32, "decode": 256, "burst": 32, "arrivals": 32, "capacity": 64},
    requests={
        "mixed": {1: 8, 4: 16, 16: 64, 32: 96, 64: 192, 256: 512},
        "prefill": {1: 16, 4: 32, 16: 64, 32: 96, 64: 192, 256: 512},
        "decode": {64: 64, 96: 96},
    },
    narrow=(32, 64),
    shares=(0.8, 1.2, 0.5, 2.0),
    arriving_s=6,
    most_arriving=512,
    burst=256,
    capacity=1024,
    pool_bytes=50 * GIB,
    max_num_seqs=1024,
    step_tokens=16384,
    pictures=256,
    calibration=32,
    warm_up=(1, 4, 16, 32, 64),
    start_s=75,
    start_limit_s=240,
    cell_limit_s=60,
    rates={"prefill": 65, "mixed": 42, "decode": 12},
)
TINY = Scale(
    size="tiny",
    tokens={"prefill": 1, "mixed": 2, "decode": 4, "burst": 2, "arrivals": 2, "capacity": 16},
    requests={"mixed": {1: 1, 2: 3}, "prefill": {2: 3}, "decode": {2: 2}},
    narrow=(2,),
    shares=(0.8,),
    arriving_s=0.3,
    most_arriving=3,
    burst=3,
    capacity=12,
    pool_bytes=1 << 23,
    max_num_seqs=16,
    step_tokens=16384,
    pictures=4,
    calibration=2,
    warm_up=(1, 2),
    start_s=1,
    start_limit_s=900,
    cell_limit_s=900,
    rates={"prefill": 10, "mixed": 5, "decode": 3},
)


def cells_of(scale: Scale, engine: Engine, loads: Sequence[str]) -> list[Cell]:
    """The cells an engine can measure at one number of live tokens, what counts most first."""
    made = []
    for load in loads:
        if engine.kind == "transformers":
            made += _one_by_one(scale, load)
        elif load in scale.requests:
            made += _in_flight(scale, engine, load)
        elif load == "burst":
            seconds = _expected(scale.burst / scale.rates["mixed"], 1)
            made.append(Cell(load, "all", scale.tokens[load], scale.burst, scale.burst, expected_s=seconds))
        elif load == "arrivals" and not engine.narrow:
            made += [
                Cell(load, f"{share:g}x", scale.tokens[load], 0, share=share, expected_s=2 * scale.arriving_s)
                for share in scale.shares
            ]
        elif load == "capacity":
            made.append(Cell(load, "all", scale.tokens[load], scale.capacity, scale.capacity, expected_s=8))
    return sorted(made, key=lambda cell: not cell.headline)


def _in_flight(scale: Scale, engine: Engine, load: str) -> list[Cell]:
    made = []
    for concurrency, requests in scale.requests[load].items():
        if engine.narrow and concurrency not in scale.narrow:
            continue
        made.append(
            Cell(
                load,
                f"c{concurrency}",
                scale.tokens[load],
                requests,
                concurrency,
                expected_s=_expected(requests / _rate(scale, load, concurrency), 3),
                headline=load in ("mixed", "prefill"),
            )
        )
    return made


def _one_by_one(scale: Scale, load: str) -> list[Cell]:
    """The outside yardstick serves one request at a time."""
    if load not in scale.requests:
        return []
    requests = max(1, min(8, 64 // scale.tokens[load]))
    return [Cell(load, "c1", scale.tokens[load], requests, 1, expected_s=30, headline=False)]


def _rate(scale: Scale, load: str, concurrency: int) -> float:
    """Requests/s expected of stock; few requests in flight leave most of a decode step unused."""
    busy = 1.0 if load == "prefill" else concurrency / (concurrency + 8)
    return scale.rates[load] * busy


def _expected(run_s: float, repeats: int) -> float:
    """Seconds of all repeats of a cell, warm-up included."""
    return max(1.0, run_s * min(repeats, math.ceil(REPEAT_WITHIN_S / run_s)))


def arrivals_at(cell: Cell, saturated: float, scale: Scale) -> Cell:
    """An arrivals cell with its rate and number of requests, the same for every engine.

    Args:
        cell: with a share.
        saturated: stock's requests/s with as many in flight as it can use.
        scale: of the run.

    """
    assert cell.share is not None
    rate = cell.share * saturated
    requests = max(2, min(scale.most_arriving, round(rate * scale.arriving_s)))
    return replace(cell, rate=rate, requests=requests)


def saturated_rate(cells: dict[str, Any]) -> float | None:
    """Stock's highest requests/s of the mixed load, None while there is no result."""
    found = [got["requests_per_s"] for key, got in cells.items() if key.startswith("stock/mixed/c")]
    return max(found, default=None)


def engines_of(kinds: Sequence[str], lives: Sequence[int], ratios: Sequence[float]) -> list[Engine]:
    """Engines in the order in which they are worth having.

    Stock and the hybrid at the first number of live tokens and the first R give the headline; then come
    the second R, the hybrid with nothing switched on, stock on Triton, other numbers of live tokens and other
    R, and transformers last.

    Args:
        kinds: of KINDS.
        lives: wanted averages of live tokens, UNMERGED for no merging; the first counts most.
        ratios: R; the first two count most.

    """
    wide = [Engine("hybrid", ratio, (lives[0],)) for ratio in ratios[:2]]
    others = [Engine("hybrid", ratio, tuple(lives[1:]), True) for ratio in ratios[:2] if lives[1:]]
    others += [Engine("hybrid", ratio, tuple(lives), True) for ratio in ratios[2:]]
    order = [
        Engine("stock"),
        *wide[:1],
        *wide[1:],
        Engine("off"),
        Engine("stock_triton"),
        *others,
        Engine("transformers"),
    ]
    return [
        kept for engine in order if engine.kind in kinds and (kept := _without_nothing(engine)) is not None
    ]


def _without_nothing(engine: Engine) -> Engine | None:
    """The engine without cells that reduce nothing: those are `off`."""
    if engine.kind != "hybrid" or engine.ratio:
        return engine
    lives = tuple(live for live in engine.lives if live < UNMERGED)
    return replace(engine, lives=lives) if lives else None
