"""The benchmark of the front end: its engine without a model, its requests, and what it makes of figures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image
from vllm.v1.request import RequestStatus

from benchmarks.front_end import (
    KINDS,
    REPORTS,
    body,
    page,
    picture,
    processes,
    role_of,
    summary,
    table,
    take_rounds,
)
from benchmarks.gpu.prediction.predictions import refreshed
from benchmarks.stub_engine import TOKEN, Steps
from tests.support.configurations import PRUNES
from tests.support.scheduler_bench import Bench, Prompt

# ---- an engine without a model --------------------------------------------------------------------


def answered(bench: Bench, steps: Steps, names: Sequence[str], preempt_at: int | None = None) -> None:
    """Run steps until all requests have ended; preempt all that run in front of one of the steps."""
    number = 0
    while any(not RequestStatus.is_finished(bench.requests[name].status) for name in names):
        if number == preempt_at:
            bench.scheduler.reset_prefix_cache(reset_running_requests=True)
        step = bench.scheduler.schedule()
        bench.scheduler.update_from_output(step, steps.answer(step))
        number += 1
        assert number < 200, "a request waits for ever"


@pytest.mark.parametrize("hybrid", [{}, PRUNES], ids=["stock", "hybrid"])
@pytest.mark.parametrize("preempt_at", [None, 6])
def test_requests_are_answered_to_their_last_token(hybrid: dict[str, Any], preempt_at: int | None) -> None:
    """Also where prompts are cut over steps, and where one starts over in the middle of its answer."""
    bench = Bench(hybrid, max_num_batched_tokens=650)
    steps = Steps(TOKEN, 90 if hybrid else None)
    names = [bench.ask(Prompt().text(5).image(f"picture {i}").text(70), max_tokens=8) for i in range(3)]
    answered(bench, steps, names, preempt_at)
    assert [list(bench.requests[name].output_token_ids) for name in names] == [[TOKEN] * 8] * 3
    assert bench.preemptions() == 0 if preempt_at is None else bench.preemptions() > 0
    if hybrid:
        assert dict(bench.scheduler.live_counts) == {f"picture {i}": 90 for i in range(3)}


# ---- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [336, 1024])
def test_every_request_has_a_picture_of_its_own(side: int) -> None:
    said = [json.loads(body(side, number)) for number in (0, 1, 8, 16)]
    seen = set()
    for one in said:
        url = one["messages"][0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert image.format == "JPEG" and image.size == (side, side)
        seen.add(image.tobytes())
    assert len(seen) == len(said)
    # Anew the same, for all kinds of servers.
    assert picture(side, 1) == picture(side, 1)


def test_all_kinds_get_the_same_requests_there_and_back() -> None:
    asked: list[tuple[str, tuple[bytes, ...]]] = []

    def measured(kind: str, bodies: Sequence[bytes]) -> dict[str, float]:
        asked.append((kind, tuple(bodies)))
        return {"api_ms": float(len(asked))}

    found = take_rounds(["a", "b"], [16], 3, 2, measured)
    assert [kind for kind, _ in asked] == ["a", "b", "b", "a", "a", "b"]
    sent = [bodies for _, bodies in asked]
    assert sent[0] == sent[1] and sent[2] == sent[3] and sent[4] == sent[5]
    assert len({content for bodies in sent for content in bodies}) == 6
    assert [one["api_ms"] for one in found["b"]["16"]] == [2, 3, 6]


def test_every_kind_of_a_report_is_compared_with_one_of_it() -> None:
    for kinds in REPORTS.values():
        assert {KINDS[kind].beside for kind in kinds[1:]} <= set(kinds)


# ---- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_first", "role"),
    [
        (".venv/bin/python -m vllm.entrypoints.cli.main serve m --api-server-count=2", True, "api"),
        ("VLLM::APIServer_1", False, "api"),
        ("VLLM::ApiServer_0", False, "api"),
        ("VLLM::EngineCore", False, "engine"),
        ("python -c from multiprocessing.resource_tracker import main;main(32)", False, "other"),
    ],
)
def test_processes_are_known_by_their_names(name: str, is_first: bool, role: str) -> None:
    assert role_of(name, is_first) == role


def one(api: float, engine: float = 2.0, rate: float = 50.0) -> dict[str, float]:
    return {"api_ms": api, "engine_ms": engine, "other_ms": 0.0, "requests_per_s": rate}


FOUND: dict[str, Any] = {
    "command": "python benchmarks/front_end.py",
    "date": "2026-01-01",
    "machine": {"processor": "a processor"},
    "cores": 2,
    "versions": {"vllm": "0.32.0"},
    "load": {"requests": 8, "rounds": 3, "at_once": 4},
    "jpeg_bytes": {"336": 23_456},
    "rounds": {
        "stock": {"336": [one(10), one(8), one(20)]},
        "hybrid": {"336": [one(11, 3, 40), one(12, 2.5, 60), one(20, 4, 50)]},
    },
}


def test_ratios_are_of_single_rounds() -> None:
    found = summary(FOUND)["hybrid"]["336"]
    assert found["api_ms"] == {"median": 12, "lowest": 11, "highest": 20}
    assert found["engine_ms"]["median"] == 3 and found["requests_per_s"]["median"] == 50
    assert found["ratio"]["all"] == [1.1, 1.5, 1.0] and found["ratio"]["median"] == 1.1
    alone = summary(FOUND | {"rounds": {"hybrid": FOUND["rounds"]["hybrid"]}})
    assert "ratio" not in alone["hybrid"]["336"]


def test_processes_for_a_rate() -> None:
    """Seven tenths of a core each: 100 requests/s at 7 ms fill one."""
    assert [processes(ms, rate) for ms, rate in ((7, 100), (7.1, 100), (7, 300), (0.1, 100))] == [1, 2, 3, 1]


def test_the_table_and_its_page() -> None:
    lines = table(FOUND).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| stock | 336 px | 10.0 (8.0 to 20.0) |  | 2.0 (2.0 to 2.0) | 50 (50 to 50) | 2 | 5 |",
        "| hybrid | 336 px | 12.0 (11.0 to 20.0) | 1.10x stock | 3.0 (2.5 to 4.0) | 50 (40 to 60) | 2 | 6 |",
    ]
    text = page(FOUND)
    assert table(FOUND) in text and "2 cores" in text and FOUND["command"] in text
    other = "## API servers\n\nWords.\n\n| a |\n|---|\n| 1 |\n\nMore.\n"
    assert table(FOUND) in refreshed(other, {"API servers": table(FOUND)})
