"""The stat logger alone: running totals from the scheduler become Prometheus counters."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.engines import checkpoint, hybrid_section
from vllm_hybrid.checkpoint import load_config
from vllm_hybrid.metrics import PREFIX, HybridStatLogger

_names = itertools.count()


def logger(
    hybrid: dict[str, Any] | None = None, engine: int = 0, name: str | None = None
) -> HybridStatLogger:
    """A logger of a model that no other test has counted for."""
    hf_config = load_config(checkpoint())
    hf_config.hybrid = hybrid
    model = SimpleNamespace(served_model_name=name or f"model-{next(_names)}", hf_config=hf_config)
    return HybridStatLogger(SimpleNamespace(model_config=model), engine)  # type: ignore[arg-type]


def value(of: HybridStatLogger, name: str) -> float | None:
    labels = dict(zip(("model_name", "engine"), of.labels, strict=True))
    return REGISTRY.get_sample_value(f"{PREFIX}{name}_total", labels)


def stats(**totals: int) -> SchedulerStats:
    return SchedulerStats(running_lora_adapters={PREFIX + name: n for name, n in totals.items()})


def test_totals_are_counted_by_difference() -> None:
    counted = logger()
    for images, live in [(1, 90), (1, 90), (4, 400)]:
        counted.record(stats(images=images, live_tokens=live), None)
    assert value(counted, "images") == 4
    assert value(counted, "live_tokens") == 400


def test_an_engine_that_starts_over_adds_to_the_count() -> None:
    counted = logger()
    for images in (5, 2, 3):
        counted.record(stats(images=images), None)
    assert value(counted, "images") == 8


def test_engines_are_counted_apart() -> None:
    first = logger()
    second = logger(engine=1, name=first.labels[0])
    first.record(stats(images=3), None)
    second.record(stats(images=7), None)
    assert (value(first, "images"), value(second, "images")) == (3, 7)


def test_what_other_models_send_is_left_alone() -> None:
    counted = logger()
    counted.record(SchedulerStats(running_lora_adapters={"images": 2, "vllm_hybrid:new": 1}), None)
    counted.record(None, None)
    assert value(counted, "images") is None


def test_counters_stand_at_zero_from_the_start_only_where_something_is_reduced() -> None:
    reduces, full = logger(hybrid_section("fastv")), logger()
    reduces.log_engine_initialized()
    full.log_engine_initialized()
    for name in ("images", "patches", "live_tokens", "kept_tokens", "blocks_given_back"):
        assert value(reduces, name) == 0
        assert value(full, name) is None


@pytest.mark.parametrize("total", [0, 1, 2**40])
def test_totals_survive_the_way_to_the_api_server(total: int) -> None:
    sent = EngineCoreOutputs(scheduler_stats=stats(patches=total))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    counted = logger()
    counted.record(received.scheduler_stats, None)
    assert value(counted, "patches") == total
