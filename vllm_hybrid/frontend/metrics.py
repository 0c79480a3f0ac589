"""Prometheus counters of what was reduced, on vLLM's own /metrics.

What the scheduler counted arrives with vLLM's statistics (see ``HoleReclaim.make_stats``); this stat
logger, loaded by entry point, adds it to counters labelled like vLLM's.
"""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vllm_hybrid.checkpoint.llava import ARCHITECTURE

PREFIX = "vllm_hybrid:"
_LABELS = ("model_name", "engine")
_MEANINGS = {
    "images": "Images prefilled.",
    "patches": "Patches of those images: the tokens the full model would have computed.",
    "live_tokens": "Image tokens left after merging.",
    "kept_tokens": "Image tokens left after pruning.",
    "blocks_given_back": "KV blocks freed inside holes while their requests went on.",
    "requests_with_foreign_pages": "Requests ended with an error: a KV page of theirs held another's data.",
}


@functools.cache
def counters() -> dict[str, Counter]:
    """The process's counters by name, registered once."""
    return {name: Counter(PREFIX + name, meaning, _LABELS) for name, meaning in _MEANINGS.items()}


def _reduces(hf_config: Any) -> bool:
    if ARCHITECTURE not in (getattr(hf_config, "architectures", None) or []):
        return False
    # Not at the top: this file is loaded for every model, and must not fail for one that is not ours.
    from vllm_hybrid.startup.settings import hybrid_config

    return hybrid_config(hf_config).active


class HybridStatLogger(StatLoggerBase):
    """Counts what one engine reduced; silent for engines that reduce nothing."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.labels = (vllm_config.model_config.served_model_name, str(engine_index))
        self.reduces = _reduces(vllm_config.model_config.hf_config)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add what the scheduler counted to the counters."""
        if scheduler_stats is None or not self.reduces:
            return
        for key, count in scheduler_stats.running_lora_adapters.items():
            name = key.removeprefix(PREFIX)
            if name in _MEANINGS and name != key:
                counters()[name].labels(*self.labels).inc(count)

    def log_engine_initialized(self) -> None:
        """Show the counters at zero once an engine that may move them is up."""
        if self.reduces:
            for counter in counters().values():
                counter.labels(*self.labels)
