"""The stat logger alone: what the scheduler counted becomes Prometheus counters."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
from prometheus_client import REGISTRY
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.support.engines import checkpoint, hybrid_section
from vllm_hybrid.checkpoint.llava import load_config
from vllm_hybrid.engine.scheduler import HoleReclaim
from vllm_hybrid.frontend.metrics import PREFIX, HybridStatLogger

_names = itertools.count()


def logger(reduces: bool = True, engine: int = 0, name: str | None = None) -> HybridStatLogger:
    """A logger of a model that no other test has counted for."""
    hf_config = load_config(checkpoint())
    hf_config.hybrid = hybrid_section("fastv") if reduces else None
    model = SimpleNamespace(served_model_name=name or f"model-{next(_names)}", hf_config=hf_config)
    return HybridStatLogger(SimpleNamespace(model_config=model), engine)


def value(of: HybridStatLogger, name: str) -> float | None:
    labels = dict(zip(("model_name", "engine"), of.labels, strict=True))
    return REGISTRY.get_sample_value(f"{PREFIX}{name}_total", labels)


def stats(**counts: int) -> SchedulerStats:
    return SchedulerStats(running_lora_adapters={PREFIX + name: n for name, n in counts.items()})


def test_counts_add_up() -> None:
    counted = logger()
    for images, live in [(1, 90), (0, 0), (3, 310)]:
        counted.record(stats(images=images, live_tokens=live), None)
    assert value(counted, "images") == 4
    assert value(counted, "live_tokens") == 400


def test_several_api_servers_share_the_counts_of_one_engine() -> None:
    """Each message reaches one of them, so that their sum is the engine's."""
    engine = SimpleNamespace(totals=Counter(), reported=Counter())
    servers = [logger(), logger()]
    for server, images in zip([0, 1, 1, 0], [2, 3, 0, 4], strict=True):
        engine.totals["images"] += images
        with mock.patch.object(Scheduler, "make_stats", lambda self: SchedulerStats()):
            bound = type("Engine", (HoleReclaim, Scheduler), {"__init__": lambda self: None})()
            bound.__dict__ |= vars(engine)
            sent = bound.make_stats()
        engine.reported = bound.reported
        servers[server].record(sent, None)
    assert sum(value(server, "images") or 0 for server in servers) == 9


def test_engines_are_counted_apart() -> None:
    first = logger()
    second = logger(engine=1, name=first.labels[0])
    first.record(stats(images=3), None)
    second.record(stats(images=7), None)
    assert (value(first, "images"), value(second, "images")) == (3, 7)


def test_what_other_models_send_is_left_alone() -> None:
    counted, other = logger(), logger(reduces=False)
    counted.record(SchedulerStats(running_lora_adapters={"images": 2, "vllm_hybrid:new": 1}), None)
    counted.record(None, None)
    assert value(counted, "images") is None
    other.record(stats(images=2), None)
    assert value(other, "images") is None


def test_counters_stand_at_zero_from_the_start_only_where_something_is_reduced() -> None:
    reduces, full = logger(), logger(reduces=False)
    reduces.log_engine_initialized()
    full.log_engine_initialized()
    for name in ("images", "patches", "live_tokens", "kept_tokens", "blocks_given_back"):
        assert value(reduces, name) == 0
        assert value(full, name) is None


@pytest.mark.parametrize("total", [0, 1, 2**40])
def test_counts_survive_the_way_to_the_api_server(total: int) -> None:
    sent = EngineCoreOutputs(scheduler_stats=stats(patches=total))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    counted = logger()
    counted.record(received.scheduler_stats, None)
    assert value(counted, "patches") == total
