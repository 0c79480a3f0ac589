"""What vLLM's scheduler reports of every step, added up between two looks."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class Counted(StatLoggerBase):
    """A stat logger that keeps sums and peaks.

    Attributes:
        preemptions: requests that had to give their KV back.
        most_running: most requests that ran at once.
        held_share: share of the pool that was in use when most requests ran at once, before any preemption.
        prefix_hits: prompt tokens found in the prefix cache.

    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.preemptions = 0
        self.most_running = 0
        self.waiting = 0
        self.held_share = 0.0
        self.prefix_hits = 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add a step; vLLM calls this."""
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        self.waiting = scheduler_stats.num_waiting_reqs
        self.prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if not self.preemptions and scheduler_stats.num_running_reqs >= self.most_running:
            self.most_running = scheduler_stats.num_running_reqs
            self.held_share = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say; vLLM asks for the method."""

    def found(self) -> dict[str, int]:
        """What every cell reports."""
        return {
            "preemptions": self.preemptions,
            "most_running": self.most_running,
            "prefix_hit_tokens": self.prefix_hits,
        }
