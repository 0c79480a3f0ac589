"""Times of one run of a load, and what several runs come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timed:
    """One run: seconds in all, and per request to its first token and from there to its last."""

    tokens: int
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(runs: Sequence[Timed]) -> dict[str, Any]:
    """Medians over runs; of times per request, the median over the requests of a run first.

    Returns:
        requests/s with the lowest and highest of all runs, seconds to first token (TTFT) with its 99th
        percentile over all requests of all runs, and seconds per later token (TPOT, None for one new token).

    """
    rates = [len(run.first) / run.seconds for run in runs]
    firsts = [statistics.median(run.first) for run in runs]
    laters = [statistics.median(t / (run.tokens - 1) for t in run.last) for run in runs if run.tokens > 1]
    return {
        "requests": len(runs[0].first),
        "new_tokens": runs[0].tokens,
        "requests_per_s": statistics.median(rates),
        "first_token_s": statistics.median(firsts),
        "first_token_p99_s": percentile([t for run in runs for t in run.first], 0.99),
        "per_token_s": statistics.median(laters) if laters else None,
        "all_requests_per_s": rates,
    }
