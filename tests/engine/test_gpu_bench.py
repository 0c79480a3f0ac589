"""The GPU benchmark without a GPU: cells and their order, measuring processes, loads, tables, a toy run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoImageProcessor

from benchmarks.checkpoint import picture
from benchmarks.gpu.prediction import cost_model
from benchmarks.gpu.running import processes
from benchmarks.gpu.running.cases import UNLIMITED_S
from benchmarks.gpu.running.processes import Measuring, ProcessFailed, last_error, lines_of
from benchmarks.gpu.running.results import Results
from benchmarks.gpu.speed import bench, measuring, one_at_a_time, prepared, tables
from benchmarks.gpu.speed.cells import FULL, LOADS, TINY, UNMERGED, Engine, arrivals_at, cells_of, engines_of
from benchmarks.gpu.speed.model import SIZES, seeded_tower, tower_file, tower_weights, write_folder
from tests.support.model_infos import share_model_infos
from tests.support.paths import ROOT

# Measuring.


def test_medians() -> None:
    runs = [
        measuring.Timed(3, 2.0, [0.1, 0.3, 0.2], [0.4, 0.4, 1.0]),
        measuring.Timed(3, 1.0, [0.2, 0.2, 0.2], [0.2, 0.2, 0.2]),
        measuring.Timed(3, 3.0, [0.5, 0.5, 0.5], [0.6, 0.6, 0.6]),
    ]
    found = measuring.summary(runs)
    assert found["requests_per_s"] == 1.5
    assert found["first_token_s"] == 0.2
    assert found["first_token_p99_s"] == 0.5
    assert found["per_token_s"] == pytest.approx(0.2)
    assert found["all_requests_per_s"] == [1.5, 3.0, 1.0]
    assert measuring.summary([measuring.Timed(1, 1.0, [0.1], [0.0])])["per_token_s"] is None


def test_the_99th_percentile() -> None:
    assert measuring.percentile(range(1, 101), 0.99) == 100
    assert measuring.percentile(range(1, 201), 0.99) == 199
    assert measuring.percentile([5.0], 0.99) == 5.0


# Cells and their order.


def test_cells_have_names_of_their_own() -> None:
    keys = [
        engine.key(live, cell)
        for engine in engines_of(bench.KINDS, [90, 195, UNMERGED], [0.5, 0.0, 0.75])
        for live in engine.lives
        for cell in cells_of(FULL, engine, LOADS)
    ]
    assert len(keys) == len(set(keys))
    assert {"hybrid/90/0.5/prefill/c64", "stock/capacity/all", "stock_triton/mixed/c256"} <= set(keys)
    # Without merging, R = 0 reduces nothing: that is "off".
    assert "hybrid/576/0.5/decode/c64" in keys
    assert not any(key.startswith("hybrid/576/0/") for key in keys)
    assert {key.rsplit("/", 1)[1] for key in keys if key.startswith("transformers/")} == {"c1"}


def test_what_counts_most_comes_first() -> None:
    engines = engines_of(bench.KINDS, [90, 195, 394], [0.5, 0.0, 0.75])
    assert engines[:5] == [
        Engine("stock"),
        Engine("hybrid", 0.5, (90,)),
        Engine("hybrid", 0.0, (90,)),
        Engine("off"),
        Engine("stock_triton"),
    ]
    assert engines[-1].kind == "transformers" and engines[5].lives == (195, 394)
    cells = cells_of(FULL, engines[0], LOADS)
    headline = [cell.headline for cell in cells]
    assert headline == sorted(headline, reverse=True)
    in_flight = [cell.concurrency for cell in cells if cell.load == "mixed"]
    assert in_flight == [1, 4, 16, 32, 64, 256] and all(c.headline for c in cells if c.load == "mixed")
    # Every cell sends at least as many requests as are to be in flight.
    assert all(cell.requests >= cell.concurrency for cell in cells if cell.concurrency)


def test_arrivals_come_at_the_same_rate_for_every_engine() -> None:
    for engine in (Engine("stock"), Engine("hybrid", 0.5, (90,))):
        shares = {c.at: arrivals_at(c, 40.0, FULL) for c in cells_of(FULL, engine, ["arrivals"])}
        assert {at: cell.rate for at, cell in shares.items()} == pytest.approx(
            {"0.5x": 20.0, "0.8x": 32.0, "1.2x": 48.0, "2x": 80.0}
        )
        assert shares["0.5x"].requests == 120


def run_of(tmp_path: Path, **changes: Any) -> bench.Run:
    run: dict[str, Any] = {
        "scale": TINY,
        "cuda": False,
        "eager": True,
        "tower_graphs": False,
        "repeats": 1,
        "loads": LOADS,
        "folder": tmp_path,
        "work": tmp_path,
        "thresholds": {"90": [0.5, 0.5, 0.5]},
        "deadline": time.time() + UNLIMITED_S,
        "library": "a",
        "progress": lambda: None,
    }
    return bench.Run(**(run | changes))


def test_time_is_kept_back_for_the_first_table(tmp_path: Path) -> None:
    run = run_of(tmp_path, scale=FULL)
    results = Results(tmp_path / "results.json", {}, "")
    hybrid = Engine("hybrid", 0.5, (90,))
    cells = [cell for cell in cells_of(FULL, hybrid, LOADS) if cell.headline]
    expected = FULL.start_s + sum(cell.expected_s for cell in cells)
    assert bench.reserved_s(run, results, [hybrid, Engine("off")]) == pytest.approx(expected)
    # What an engine really took to start counts as soon as one has, and so do stock's cells.
    results.engines["stock"] = {"started_s": [33.0]}
    results.cells["stock/mixed/c1"] = {"cell_s": 100.0}
    (first,) = [cell for cell in cells if cell.name == "mixed/c1"]
    assert bench.reserved_s(run, results, [hybrid]) == pytest.approx(
        expected - FULL.start_s + 33 + 100 - first.expected_s
    )
    late = run_of(tmp_path, scale=FULL, deadline=time.time() + 50)
    assert bench._ready(late, results, cells_of(FULL, hybrid, ["decode"])[0], 60.0) is None
    assert bench._ready(late, results, cells[-1], 60.0) == cells[-1]


def test_what_fails_again_and_again_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    results = Results(tmp_path / "results.json", {}, "")
    engine = Engine("stock")
    names = [cell.name for _, cell in bench.cells_left(run, results, engine)]
    results.failed(f"stock/{names[0]}", "boom")
    assert [cell.name for _, cell in bench.cells_left(run, results, engine)] == [*names[1:], names[0]]
    results.failed(f"stock/{names[0]}", "boom")
    assert [cell.name for _, cell in bench.cells_left(run, results, engine)] == names[1:]
    bench.say_left_out(results)
    assert f"left out after 2 failures, the next call tries it: stock/{names[0]}" in capsys.readouterr().out
    # A new call tries it once more.
    bench.one_more_try(results)
    assert [cell.name for _, cell in bench.cells_left(run, results, engine)] == [*names[1:], names[0]]
    results.failed(f"stock/{names[0]}", "boom")
    assert [cell.name for _, cell in bench.cells_left(run, results, engine)] == names[1:]


def test_a_cell_measured_eagerly_gives_way_to_graphs_and_never_the_other_way(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {}, "")
    for eager in (True, False):
        results.cells["stock/mixed/c1"] = cell_with(10.0, eager=eager)
        for asked in (True, False):
            run = run_of(tmp_path, eager=asked)
            assert bench.measured(run, results, "stock/mixed/c1") == (asked or not eager)
    assert not bench.measured(run_of(tmp_path), results, "stock/mixed/c2")


def test_an_engine_that_does_not_start_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script in the engine's place: stock fails at once, the hybrid answers every cell."""
    (tmp_path / "serving.py").write_text(
        "import json, sys\n"
        "plan = json.loads(sys.argv[2])\n"
        "if plan['kind'] == 'stock': raise ValueError('no such attention')\n"
        "print('CELL {\"engine_s\": 1}', flush=True)\n"
        "for line in sys.stdin:\n"
        "    print('CELL ' + json.dumps({'result': {'cell_s': 0.1}}), flush=True)\n"
    )
    monkeypatch.setattr(bench, "HERE", tmp_path)
    results = Results(tmp_path / "results.json", {}, "")
    engines = [Engine("stock"), Engine("hybrid", 0.5, (90,))]
    bench.measure(run_of(tmp_path, loads=["mixed"]), results, engines)
    assert results.failures["stock"] == {
        "error": f"a measuring process ended with code 1: ValueError: no such attention; see "
        f"{tmp_path / 'stock.log'}",
        "times": 2,
    }
    assert set(results.cells) == {"hybrid/90/0.5/mixed/c1", "hybrid/90/0.5/mixed/c2"}
    assert "FAILED stock" in capsys.readouterr().out


# Results.


def test_results_go_on_only_where_they_were_begun(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = Results(file, {"device": "a"}, "python bench.py")
    first.cells["stock/prefill"] = {"requests_per_s": 2.0}
    first.save()
    again = Results(file, {"device": "a"}, "python bench.py --kinds stock")
    assert again.cells == {"stock/prefill": {"requests_per_s": 2.0}}
    assert [entry["command"] for entry in json.loads(file.read_text())["commands"]] == [
        "python bench.py",
        "python bench.py --kinds stock",
    ]
    with pytest.raises(RuntimeError, match="was measured with device a, this is b"):
        Results(file, {"device": "b"}, "python bench.py")


def test_another_card_of_the_same_name_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    card = {"name": "H100", "kind": "cuda", "driver": "580.1", "memory_bytes": 85}
    first = Results(file, {"device": card}, "python bench.py")
    first.cells["stock/prefill"] = {}
    first.save()
    other = card | {"driver": "580.2", "memory_bytes": 84}
    again = Results(file, {"device": other}, "python bench.py")
    assert set(again.cells) == {"stock/prefill"} and again.content["device"] == other
    assert [call["device"]["driver"] for call in again.content["commands"]] == ["580.1", "580.2"]
    for name, wrong in (("name", "H200"), ("kind", "cpu")):
        with pytest.raises(RuntimeError, match=f"this is .*{wrong}"):
            Results(file, {"device": card | {name: wrong}}, "python bench.py")


def test_other_code_of_the_plugin_is_measured_again_and_stock_is_not(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {}, "")
    bench.set_older_aside(results, "first")
    for key in ("stock/mixed/c1", "hybrid/90/0.5/mixed/c1", "off/mixed/c1"):
        results.cells[key] = {"requests_per_s": 1.0}
    results.failed("hybrid-R0-90", "boom")
    bench.set_older_aside(results, "first")
    assert len(results.cells) == 3 and results.failures
    bench.set_older_aside(results, "second")
    assert set(results.cells) == {"stock/mixed/c1"} and not results.failures
    assert set(results.content["older"]["first"]) == {"hybrid/90/0.5/mixed/c1", "off/mixed/c1"}


# Measuring processes.


def test_a_measuring_process_is_ended_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time; print('CELL {\"n\": 1}', flush=True); time.sleep(600)"
    began = now = time.time()
    with monkeypatch.context() as patch:
        # The deadline comes with the first answer, however long that takes.
        patch.setattr(processes, "time", SimpleNamespace(time=lambda: now))
        lines = lines_of([sys.executable, "-c", code], tmp_path / "log", began + UNLIMITED_S)
        assert next(lines) == {"n": 1}
        now += UNLIMITED_S
        assert list(lines) == []
    with pytest.raises(ProcessFailed, match="ended with code 3"):
        list(lines_of([sys.executable, "-c", "exit(3)"], tmp_path / "log", time.time() + UNLIMITED_S))


def test_all_that_a_measuring_process_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('CELL ' + str(started.pid), flush=True)\n"
        "time.sleep(600)\n"
    )
    child = Measuring([sys.executable, "-c", code], tmp_path / "log")
    started: Any = child.next(time.time() + UNLIMITED_S)
    assert psutil.pid_exists(started)
    child.end()
    assert not psutil.pid_exists(child.process.pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(started).status() == psutil.STATUS_ZOMBIE


def test_a_measuring_process_answers_what_it_is_asked(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.gpu.running.answering import Answers, questions\n"
        "answers = Answers()\n"
        "print('CELL not an answer: it goes to the log')\n"
        "for asked in questions():\n"
        "    answers.tell({'twice': 2 * asked['n']})\n"
        "    if asked['n'] == 3: raise KeyError('three')\n"
    )
    child = Measuring([sys.executable, "-c", code, str(ROOT)], tmp_path / "log")
    try:
        for n in (1, 3):
            child.send({"n": n})
            assert child.next(time.time() + UNLIMITED_S) == {"twice": 2 * n}
        with pytest.raises(ProcessFailed, match=r"ended with code 1: KeyError: 'three'; see .*log"):
            child.next(time.time() + UNLIMITED_S)
        with pytest.raises(ProcessFailed):
            for _ in range(100):
                child.send({"n": 1})
    finally:
        child.end()
    assert "not an answer" in (tmp_path / "log").read_text()


def test_the_line_that_explains_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO starting\n"
        "(EngineCore pid=7) ERROR 11-26 14:40:15 [core.py:1] ValueError: hybrid.thresholds has 3 entries\n"
        "Traceback (most recent call last):\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
        "some last words\n"
    )
    assert last_error(log) == "ValueError: hybrid.thresholds has 3 entries"
    log.write_text("RuntimeError: Engine core initialization failed. See above\n")
    assert last_error(log).startswith("RuntimeError: Engine core initialization failed")
    log.write_text("Killed\n\n")
    assert last_error(log) == "Killed"
    assert last_error(tmp_path / "absent") == "no log"


# Loads.


class PretendEngine:
    """Answers a request after a while and knows how many were in flight."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self.began: list[float] = []

    async def generate(self, request: Any, params: Any, name: str) -> AsyncIterator[Any]:
        self.now += 1
        self.most = max(self.most, self.now)
        self.began.append(time.perf_counter())
        for _ in range(params.max_tokens):
            await asyncio.sleep(0.002)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])
        self.now -= 1


class PretendSupply:
    def take(self, count: int) -> list[int]:
        return list(range(count))


def driver_of(engine: PretendEngine) -> Any:
    from benchmarks.gpu.speed.driving import Driver

    supply: Any = PretendSupply()
    return Driver(engine, supply)


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_so_many_requests_are_in_flight(concurrency: int) -> None:
    engine = PretendEngine()
    timed = asyncio.run(driver_of(engine).in_flight(8, concurrency, 3))
    assert engine.most == concurrency
    assert len(timed.first) == len(timed.last) == 8
    assert all(first > 0 and last > 0 for first, last in zip(timed.first, timed.last, strict=True))
    assert timed.seconds >= max(timed.last)


def test_arrivals_do_not_wait_for_answers() -> None:
    engine = PretendEngine()
    start = time.perf_counter()
    timed = asyncio.run(driver_of(engine).arriving(20, 200.0, 30, seed=7))
    draw, due, dues = random.Random(7), 0.0, []
    for _ in range(20):
        due += draw.expovariate(200.0)
        dues.append(due)
    assert engine.most > 1
    # A request never begins before it is due, but for the resolution of clocks.
    for began, wanted in zip(engine.began, dues, strict=True):
        assert began - start >= wanted - 1e-3
    assert len(timed.first) == 20


def test_a_request_with_too_few_tokens_is_an_error() -> None:
    class Short(PretendEngine):
        async def generate(self, request: Any, params: Any, name: str) -> AsyncIterator[Any]:
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])

    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(driver_of(Short()).in_flight(2, 1, 3))
    assert failed.group_contains(RuntimeError, match="1 tokens instead of 3")


# Model and pictures.


def test_the_tower_on_disk_is_the_seeded_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlavaConfig

    folder = write_folder(tmp_path / "model", SIZES["tiny"])
    found = load_file(tower_file(folder))
    tower = seeded_tower(LlavaConfig.from_pretrained(str(folder)).vision_config)
    wanted = {name: weight.to(torch.bfloat16) for name, weight in tower_weights(tower)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_prepared_requests_are_what_vllm_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pixels as vLLM's own processing gives, under new names and with new texts every time."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    from benchmarks.gpu.speed.serving import engine_options

    folder = write_folder(tmp_path / "model", SIZES["tiny"])
    plan = bench.plan_of(run_of(tmp_path, folder=folder), Engine("stock"), 1)
    config = EngineArgs(**engine_options(folder, plan)).create_engine_config()
    renderer = renderer_from_config(config)

    def render(request: dict[str, Any]) -> dict[str, Any]:
        parsed = parse_model_prompt(config.model_config, request)
        return renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)[0]

    image_token = json.loads((folder / "config.json").read_text())["image_token_index"]
    supply = prepared.Supply.of(render, folder, image_token, pictures=3, seed=5)
    sent = supply.take(5)
    for index, request in enumerate(sent):
        raw = prepared.raw_prompt(image_token)
        raw["multi_modal_data"] = {"image": picture(prepared.FIRST_SEED + index % 3)}
        wanted = render(raw)
        assert len(request["prompt_token_ids"]) == len(wanted["prompt_token_ids"]) == 60 + 576
        assert request["mm_placeholders"] == wanted["mm_placeholders"]
        (got,), (pixels,) = (r["mm_kwargs"]["image"] for r in (request, wanted))
        assert torch.equal(got["pixel_values"].data, pixels["pixel_values"].data)
        ids = request["prompt_token_ids"]
        assert [i for i, token in enumerate(ids) if token == image_token] == list(range(5, 581))
    assert len({request["mm_hashes"]["image"][0] for request in sent}) == 5
    assert len({tuple(request["prompt_token_ids"]) for request in sent}) == 5


def test_only_stock_on_triton_is_held_to_an_attention_backend(tmp_path: Path) -> None:
    from benchmarks.gpu.speed.serving import engine_options

    run = run_of(tmp_path, cuda=True, eager=False)
    for engine in (Engine("stock"), Engine("stock_triton"), Engine("off"), Engine("hybrid", 0.5, (90,))):
        kind = engine.kind
        options = engine_options(tmp_path, bench.plan_of(run, engine, 1))
        served = options["hf_overrides"]
        assert served["architectures"][0].startswith("LlavaForC") == kind.startswith("stock")
        assert bool(served.get("hybrid")) == (kind == "hybrid")
        held = {"attention_backend", "mm_encoder_attn_backend"} & options.keys()
        assert bool(held) == (kind == "stock_triton")
        # What a user gets: nothing of graphs, blocks or prefix caching is chosen here.
        assert (
            not {"block_size", "enable_prefix_caching", "compilation_config", "enforce_eager"}
            & options.keys()
        )


def test_graphs_of_the_tower_are_asked_of_the_hybrid_alone(tmp_path: Path) -> None:
    from benchmarks.gpu.speed.serving import engine_options

    run = run_of(tmp_path, cuda=True, eager=False, tower_graphs=True)
    asked = {
        engine.kind: engine_options(tmp_path, bench.plan_of(run, engine, 1)).get("compilation_config")
        for engine in (Engine("stock"), Engine("off"), Engine("hybrid", 0.5, (90,)))
    }
    assert asked == {"stock": None, "off": None, "hybrid": {"cudagraph_mm_encoder": True}}
    plan = bench.plan_of(run, Engine("hybrid", 0.5, (90,)), 1) | {"eager": True}
    assert "compilation_config" not in engine_options(tmp_path, plan)


def test_every_engine_keeps_the_same_share_of_the_pool_free(tmp_path: Path) -> None:
    """What stock lets in on its prompts alone then fits at its full length, in mixed and in burst."""
    from benchmarks.gpu.speed.serving import engine_options

    run = run_of(tmp_path, cuda=True)
    kinds = (Engine("stock"), Engine("stock_triton"), Engine("off"), Engine("hybrid", 0.5, (90,)))
    (share,) = {engine_options(tmp_path, bench.plan_of(run, engine, 1))["watermark"] for engine in kinds}
    tokens = 576 + prepared.TEXT_TOKENS
    block = 16 * 2 * 2 * 32 * 4096
    blocks = FULL.pool_bytes // block
    let_in = (blocks - int(share * blocks)) // math.ceil(tokens / 16)
    for load in ("mixed", "burst", "arrivals"):
        assert let_in * math.ceil((tokens + FULL.tokens[load]) / 16) < blocks
    most = max(FULL.requests["decode"])
    assert most * math.ceil((tokens + FULL.tokens["decode"]) / 16) < blocks


def test_torch_s_own_attention_comes_first_for_stock_on_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.speed import serving

    for kind in ("stock", "off", "hybrid", "stock_triton"):
        monkeypatch.setattr(serving.os, "environ", {})
        serving.set_environment(kind)
        assert ("TORCH_CUDNN_SDPA_DEPRIORITIZED" in os.environ) == (kind == "stock_triton")


# Tables.


def cell_with(rate: float, preemptions: int = 0, **more: Any) -> dict[str, Any]:
    timed = measuring.summary([measuring.Timed(2, 4 / rate, [0.1] * 4, [0.01] * 4)])
    return timed | {"preemptions": preemptions, "pictures_encoded": 4, "cell_s": 1.0} | more


def content_of(cells: dict[str, Any]) -> dict[str, Any]:
    facts = {"device": {"name": "a device"}, "versions": {"vllm": "0"}}
    return {**facts, "engines": {}, "failures": {}, "cells": cells}


def test_the_sweep_is_a_ratio_by_requests_in_flight() -> None:
    seen = {"images": 4, "mean": 91.0, "least": 90, "most": 92}
    cells = {
        "stock/mixed/c32": cell_with(10.0),
        "stock/mixed/c256": cell_with(20.0, preemptions=3),
        "hybrid/90/0.5/mixed/c32": cell_with(25.0, live_counts=seen),
        "hybrid/90/0.5/mixed/c256": cell_with(70.0),
    }
    said = tables.report(content_of(cells), "check: agrees", short=True)
    assert "hybrid, 90 live tokens (91.0 seen), R = 0.5" in said
    assert "| mixed/c32 | 10.00 | 2.50x |" in said
    assert "| mixed/c256 | 20.00* | 3.50x |" in said and "were preempted" in said
    assert "cache" not in said and "eager" not in said
    cells["hybrid/90/0.5/mixed/c32"]["eager"] = True
    assert "| mixed/c32 | 10.00 | 2.50x (eager) |" in tables.report(content_of(cells), "", short=True)
    del cells["hybrid/90/0.5/mixed/c32"]["eager"]
    cells["hybrid/90/0.5/mixed/c32"]["pictures_encoded"] = 3
    said = tables.report(content_of(cells), "check: agrees", short=False)
    assert "pictures came from a cache in hybrid/90/0.5/mixed/c32" in said
    assert "| mixed/c32 | 25.00 | 10.00 | 2.50 | 100.0 (100.0) | 100.0 (100.0) | 10.0 | 10.0 | 0, 0 |" in said


def test_a_disagreement_stands_above_the_table(tmp_path: Path) -> None:
    kernels, checking = tmp_path / "kernels.json", tmp_path / "checking.json"
    good = {"agrees": {"bits": True, "attend": True}}
    kernels.write_text(json.dumps({"cells": {"check: a": good, "time: a": {"kernels": []}}}))
    assert tables.check_lines([kernels]) == "check: kernels agrees in all 1 cases"
    wrong = {"agrees": {"bits": True, "tokens": False}}
    checking.write_text(json.dumps({"cells": {"x": wrong, "y": good, "z": {"failed": "boom"}}}))
    said = tables.check_lines([kernels, checking, tmp_path / "absent.json"])
    assert "checking DISAGREES: tokens in x" in said and "FAILED: boom in z" in said
    assert said.endswith("absent not checked")


# Everything at toy size.


@pytest.mark.engine
def test_the_whole_benchmark_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.json"
    arguments = ["--tiny", "--out", str(out), "--repeats", "1", "--lives", "195", "--kinds", "stock,hybrid"]
    arguments += ["--ratios", "0.5", "--loads", "mixed,capacity,arrivals", "--budget", str(UNLIMITED_S)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    share_model_infos(Path(bench.caches(tmp_path / "tiny-work")["VLLM_CACHE_ROOT"]))
    assert bench.main(arguments) == 0, capfd.readouterr().out[-2000:]
    said = capfd.readouterr().out
    assert "| load, in flight | stock, requests/s | hybrid, 195 live tokens (" in said
    assert "check: not checked" in said
    content = json.loads(out.read_text())
    cells = content["cells"]
    loads = ["mixed/c1", "mixed/c2", "arrivals/0.8x", "capacity/all"]
    assert set(cells) == {f"{group}/{load}" for group in ("stock", "hybrid/195/0.5") for load in loads}
    for key, cell in cells.items():
        assert cell["prefix_hit_tokens"] == 0
        if "capacity" not in key:
            assert cell["pictures_encoded"] == cell["requests"] and cell["preemptions"] == 0, key
            assert cell["requests_per_s"] > 0 and cell["first_token_s"] > 0 and cell["per_token_s"] > 0
    # More requests than there are prepared pictures, and yet each was encoded.
    assert sum(c["pictures_encoded"] for k, c in cells.items() if k.startswith("stock")) > TINY.pictures
    seen = cells["hybrid/195/0.5/mixed/c2"]["live_counts"]
    assert seen["images"] == TINY.requests["mixed"][2] and 1 <= seen["mean"] < 576
    ours, stock = cells["hybrid/195/0.5/capacity/all"], cells["stock/capacity/all"]
    assert ours["kv_bytes_a_request"] < stock["kv_bytes_a_request"]
    # Seven of stock's requests are let in (an eighth would leave less than the watermark free); they outgrow
    # the pool, and all are dropped as soon as one has to give way.
    assert stock["running_at_once"] == 7 and stock["preemptions"] and not stock["limited_by_sent"]
    assert ours["running_at_once"] > stock["running_at_once"]
    facts = content["engines"]["hybrid-R0.5-195"]["facts"]
    assert facts["decoder_attention"] == {"HYBRID": 3} and len(facts["block_sizes"]) == 2
    assert content["versions"]["vllm-hybrid"] != "absent"
    # What is measured already is not measured again.
    assert bench.main(arguments) == 0
    assert "measuring" not in capfd.readouterr().out
    assert json.loads(out.read_text())["cells"] == cells


def test_transformers_at_toy_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SIZES["tiny"])
    processor = AutoImageProcessor.from_pretrained(str(folder))
    model = one_at_a_time.random_model(folder, "cpu")
    image_token = model.config.image_token_id
    asked = one_at_a_time.some_requests(1, True, image_token)[:2]
    inputs = [one_at_a_time.inputs_of(request, image_token, processor, "cpu") for request in asked]
    assert inputs[0]["input_ids"].shape[1] == cost_model.TEXT_TOKENS + 576
    with torch.inference_mode():
        timed = one_at_a_time.run(model, inputs, 3)
    assert len(timed.first) == len(timed.last) == 2
    assert timed.seconds == pytest.approx(sum(timed.first) + sum(timed.last))


def test_a_gpu_is_needed_for_anything_but_the_toy_size(tmp_path: Path) -> None:
    for script, more in (("speed/bench.py", []), ("first_run.py", ["--stage", "smoke"])):
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / script)]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "out"), *more],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 1
        assert (
            done.stdout.strip() == "there is no CUDA device; use a GPU host, or --tiny for a toy run on a CPU"
        )
