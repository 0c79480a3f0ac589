"""The stat logger alone: what the scheduler counted becomes Prometheus counters."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from prometheus_client import REGISTRY
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.support.engines import checkpoint
from vllm_hybrid.checkpoint.llava import load_config
from vllm_hybrid.engine.scheduler import HoleReclaim
from vllm_hybrid.frontend.metrics import PREFIX, HybridStatLogger, of_level

_names = itertools.count()


OF_IMAGES = ("images", "patches", "live_tokens", "kept_tokens", "blocks_given_back")
FOREIGN = "requests_with_foreign_pages"
SECTION = {"levels": {"low": {"fastv_ratio": 0.75}, "high": {"fastv_ratio": 0.5}}, "default_level": "high"}
NAMES = ("low", "high", "full")


def logger(section: Any = SECTION, engine: int = 0, name: str | None = None) -> HybridStatLogger:
    """A logger of a model that no other test has counted for."""
    hf_config = load_config(checkpoint())
    hf_config.hybrid = section
    model = SimpleNamespace(served_model_name=name or f"model-{next(_names)}", hf_config=hf_config)
    return HybridStatLogger(SimpleNamespace(model_config=model), engine)


def value(of: HybridStatLogger, name: str, level: str | None = "high") -> float | None:
    labels = dict(zip(("model_name", "engine"), of.labels, strict=True))
    if level is not None:
        labels["level"] = level
    return REGISTRY.get_sample_value(f"{PREFIX}{name}_total", labels)


def stats(level: str = "high", **counts: int) -> SchedulerStats:
    """What a scheduler sends of the images of one level."""
    return SchedulerStats(running_lora_adapters={PREFIX + of_level(n, level): c for n, c in counts.items()})


def test_counts_add_up() -> None:
    counted = logger()
    for images, live in [(1, 90), (0, 0), (3, 310)]:
        counted.record(stats(images=images, live_tokens=live), None)
    assert value(counted, "images") == 4
    assert value(counted, "live_tokens") == 400


def test_levels_are_counted_apart() -> None:
    counted = logger()
    for level, images in (("low", 2), ("full", 1), ("low", 3)):
        counted.record(stats(level, images=images, patches=576 * images), None)
    assert [value(counted, "images", level) for level in NAMES] == [5, None, 1]
    assert [value(counted, "patches", level) for level in NAMES] == [5 * 576, None, 576]


def test_a_level_may_have_any_name_that_a_section_may_give() -> None:
    name = "Half.of-it_2"
    counted = logger({"levels": {name: {"fastv_ratio": 0.5}}})
    counted.record(stats(name, kept_tokens=7), None)
    assert value(counted, "kept_tokens", name) == 7


def test_requests_with_foreign_pages_are_of_no_level() -> None:
    counted = logger()
    counted.record(SchedulerStats(running_lora_adapters={PREFIX + FOREIGN: 2}), None)
    assert value(counted, FOREIGN, None) == 2


def test_several_api_servers_share_the_counts_of_one_engine() -> None:
    """Each message reaches one of them, so that their sum is the engine's."""
    engine = SimpleNamespace(totals=Counter(), reported=Counter())
    servers = [logger(), logger()]
    for server, images in zip([0, 1, 1, 0], [2, 3, 0, 4], strict=True):
        engine.totals[of_level("images", "high")] += images
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
    counted, other = logger(), logger(None)
    counted.record(
        SchedulerStats(running_lora_adapters={"images": 2, f"{PREFIX}new": 1, f"{PREFIX}new:high": 1}), None
    )
    counted.record(None, None)
    assert value(counted, "images") is None
    other.record(stats(images=2), None)
    assert value(other, "images") is None


def test_counters_stand_at_zero_from_the_start_only_where_something_is_reduced() -> None:
    reduces, full = logger(), logger(None)
    reduces.log_engine_initialized()
    full.log_engine_initialized()
    for name in OF_IMAGES:
        for level in NAMES:
            assert value(reduces, name, level) == 0
            assert value(full, name, level) is None
    assert value(reduces, FOREIGN, None) == 0
    assert value(full, FOREIGN, None) is None


@pytest.mark.parametrize(
    ("section", "levels"),
    [
        ({"fastv_ratio": 0.5}, ["default", "full"]),
        ({"fastv_ratio": 0.5, "level": "full"}, ["default", "full"]),
        ({"thresholds": {"low": [0.9] * 3, "off": None}, "default_level": "off"}, ["low", "off", "full"]),
    ],
)
def test_a_model_counts_at_every_level_that_a_request_may_choose(section: Any, levels: list[str]) -> None:
    counted = logger(section)
    counted.log_engine_initialized()
    labels = [s.labels for m in REGISTRY.collect() for s in m.samples if s.name == f"{PREFIX}images_total"]
    own = [label["level"] for label in labels if label["model_name"] == counted.labels[0]]
    assert own == levels


@pytest.mark.parametrize("total", [0, 1, 2**40])
def test_counts_survive_the_way_to_the_api_server(total: int) -> None:
    sent = EngineCoreOutputs(scheduler_stats=stats(patches=total))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    counted = logger()
    counted.record(received.scheduler_stats, None)
    assert value(counted, "patches") == total
