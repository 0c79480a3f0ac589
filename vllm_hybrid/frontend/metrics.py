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
# Of images, so that each says at which level.
_IMAGE_MEANINGS = {
    "images": "Images prefilled.",
    "patches": "Patches of those images: the tokens the full model would have computed.",
    "live_tokens": "Image tokens left after merging.",
    "kept_tokens": "Image tokens left after pruning.",
    "blocks_given_back": "KV blocks freed inside holes while their requests went on.",
}
_MEANINGS = {
    "requests_with_foreign_pages": "Requests ended with an error: a KV page of theirs held another's data.",
}


@functools.cache
def counters() -> dict[str, Counter]:
    """The process's counters by name, registered once."""
    of_images = {
        name: Counter(PREFIX + name, it, (*_LABELS, "level")) for name, it in _IMAGE_MEANINGS.items()
    }
    return of_images | {name: Counter(PREFIX + name, it, _LABELS) for name, it in _MEANINGS.items()}


def of_level(name: str, level: str) -> str:
    """What the count of a level's images is called on the way here."""
    return f"{name}:{level}"


def _levels(hf_config: Any) -> tuple[str, ...]:
    """Names of a model's levels; none where nothing is reduced."""
    if ARCHITECTURE not in (getattr(hf_config, "architectures", None) or []):
        return ()
    # Not at the top: this file is loaded for every model, and must not fail for one that is not ours.
    from vllm_hybrid.startup.settings import hybrid_config

    hybrid = hybrid_config(hf_config)
    return hybrid.levels.names if hybrid.active else ()


class HybridStatLogger(StatLoggerBase):
    """Counts what one engine reduced; silent for engines that reduce nothing."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.labels = (vllm_config.model_config.served_model_name, str(engine_index))
        self.levels = _levels(vllm_config.model_config.hf_config)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add what the scheduler counted to the counters."""
        if scheduler_stats is None or not self.levels:
            return
        for key, count in scheduler_stats.running_lora_adapters.items():
            if not key.startswith(PREFIX):
                continue
            name, *level = key.removeprefix(PREFIX).split(":", 1)
            if name in counters():
                counters()[name].labels(*self.labels, *level).inc(count)

    def log_engine_initialized(self) -> None:
        """Show the counters at zero once an engine that may move them is up."""
        if not self.levels:
            return
        for name, counter in counters().items():
            levels = [[level] for level in self.levels] if name in _IMAGE_MEANINGS else [[]]
            for level in levels:
                counter.labels(*self.labels, *level)
