"""The checks for the first GPU, without one: scenes, comparisons, cases in processes of their own, faults."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.checks import asked, run
from benchmarks.gpu.checks.compare import TOLERANCES, Answer, Comparison, Look, NotingReference, same_answers
from benchmarks.gpu.checks.watch import Steps
from benchmarks.gpu.kernels import calls
from benchmarks.gpu.kernels import run as kernel_run
from benchmarks.gpu.kernels.checks import errors, verdict
from benchmarks.gpu.kernels.floors import floor_table, floors, owners_floor, tower_floor_table, tower_floors
from benchmarks.gpu.kernels.plan import (
    SANITIZED_TOWERS,
    SEVEN_B,
    TimedTower,
    checked_scenes,
    checked_towers,
    timed_towers,
)
from benchmarks.gpu.kernels.sanitizer import findings, sanitize
from benchmarks.gpu.kernels.scenes import KV_ROWS_PER_BLOCK, Heads, SceneShape, make_scene, reference_results
from benchmarks.gpu.kernels.tower_scenes import (
    MARGIN,
    TowerHeads,
    TowerShape,
    granted_rows,
    make_tower_scene,
    tower_lengths,
    tower_reference,
)
from benchmarks.gpu.running import cases
from benchmarks.gpu.running.cases import UNLIMITED_S, Case, Record, Runner, drive
from benchmarks.gpu.running.results import Results
from benchmarks.gpu.running.tables import state
from tests.support.engines import Served
from tests.support.paths import ROOT
from vllm_hybrid.attention.reference import build_key_index

SHAPE = SceneShape(requests=3, live=5, patches=24, text=9, heads=Heads(2, 1, 8), decodes=False)
NO_GPU = not torch.cuda.is_available()


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu" / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


# Scenes and floors.


@pytest.mark.parametrize("decodes", [False, True])
def test_a_scene_has_every_virtual_key_once(decodes: bool) -> None:
    scene = make_scene(dataclasses.replace(SHAPE, decodes=decodes), seed=0)
    keys = build_key_index(scene.facts, scene.block_table, scene.seq_lens, 24, KV_ROWS_PER_BLOCK)
    for request in range(3):
        first, end = (int(keys.member_ptr[keys.row_ptr[request + i]]) for i in (0, 1))
        assert keys.member_pos[first:end].sort().values.tolist() == list(range(24 + 9 + decodes))
    assert keys.kv_row_index.unique().shape[0] == 3 * (5 + 9 + decodes)
    results = reference_results(scene)
    assert bool(torch.isfinite(results["attend"]).all())
    if not decodes:
        # Two heads give one unit of attention each, to all rows of their request.
        assert results["importance"].sum().item() == pytest.approx(3 * 2, rel=1e-5)


def test_a_scene_of_kept_rows_has_their_patches_alone() -> None:
    scene = make_scene(dataclasses.replace(SHAPE, kept=2), seed=0)
    keys = build_key_index(scene.facts, scene.block_table, scene.seq_lens, 24, KV_ROWS_PER_BLOCK)
    assert keys.kv_row_index.shape[0] == 3 * (2 + 9)
    assert keys.member_pos.shape[0] == int((scene.row_plan.row_of >= 0).sum()) < 3 * (24 + 9)
    assert "importance" not in reference_results(scene)


def test_requests_of_padding_answer_nothing() -> None:
    scene = make_scene(dataclasses.replace(SHAPE, decodes=True, padding=2), seed=0)
    assert scene.query_start_loc_cpu == [0, 1, 2, 3, 4, 5]
    assert scene.query_start_loc.tolist() == [0, 1, 2, 3, 3, 3]
    answers = reference_results(scene)["attend"]
    assert bool(answers[:3].any(dim=-1).all()) and not bool(answers[3:].any())
    with pytest.raises(ValueError, match="only a step of decodes"):
        make_scene(dataclasses.replace(SHAPE, padding=1), seed=0)


def test_pages_behind_others_hold_the_same_scene() -> None:
    scene = make_scene(SHAPE, seed=3)
    behind = scene.moved_behind(10_000)
    row_bytes = scene.kv_rows[0].numel() * 4
    assert int(behind.kv_row_index.min()) * row_bytes >= 10_000
    assert bool(behind.kv_rows[: int(behind.kv_row_index.min())].isnan().all())
    there = reference_results(behind)
    for name, wanted in reference_results(scene).items():
        assert torch.equal(there[name], wanted)


def test_the_gpu_s_scenes_reach_behind_32_bits() -> None:
    scenes = checked_scenes(tiny=False)
    for step in ("prefill", "decode"):
        far = scenes[f"{step}, behind 2^31 numbers"]
        assert far.bytes_before / torch.finfo(far.dtype).bits * 8 > 1 << 31
    assert any(scene.shape.padding for scene in scenes.values())
    assert any(scene.shape.heads.kv_heads < scene.shape.heads.heads for scene in scenes.values())
    assert {scene.dtype for scene in scenes.values()} == {torch.bfloat16, torch.float32}


def test_floors_follow_the_shape() -> None:
    heads = Heads(32, 32, 128)
    decode = floors(1, 90, 576, 60, heads, True)["decode"]
    rows, positions = 60 + 90 + 1, 60 + 576 + 1
    assert decode.bytes == rows * 2 * 32 * 128 * 2 + 2 * 32 * 128 * 2 + 8 * positions
    assert decode.flops == positions * 4 * 32 * 128
    dense = floors(2, 90, 576, 60, heads, False)["dense"]
    assert dense.flops == 2 * (636 * 637 / 2) * 4 * 32 * 128


# Scenes of the tower.

TOWERS = checked_towers(tiny=True)
TOWER = TOWERS["tower, padding"].shape
SHORT = TOWERS["tower, more tokens than rows"].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TOWER, TimedTower(3, 9, 3, layers=4, patches=24).shape])
def test_a_tower_scene_leaves_the_lengths_asked_for(shape: TowerShape, dtype: torch.dtype) -> None:
    scene = make_tower_scene(shape, seed=4, dtype=dtype)
    found = tower_reference(scene)
    wanted = [[0, *torch.tensor(own).cumsum(0).tolist()] for own in shape.lengths]
    assert found["bounds"][: len(wanted) * (shape.images + 1)].tolist() == sum(wanted, [])
    assert bool(found["owners"].amax(dim=1).add(2).eq(torch.tensor(shape.lengths[-1])).all())
    for tensor in (scene.hidden, *(x for layer in scene.layers for x in (layer.qkv, layer.added))):
        assert torch.equal(tensor, tensor.to(dtype).float())
    # Behind the tokens of every stage lies padding: features 0, sizes 1.
    room = shape.rows[-1] - sum(shape.lengths[-1])
    assert room > 0 and not found["hidden"][-room:].any() and bool((found["sizes"][-room:] == 1).all())


def test_no_decision_of_a_tower_scene_is_a_matter_of_rounding() -> None:
    scene = make_tower_scene(TOWER, seed=5, dtype=torch.bfloat16)
    for layer, before in zip(scene.layers, TOWER.lengths, strict=False):
        keys = layer.heads(TOWER.heads.head_size)[1].double().sum(dim=1).split(list(before))
        for image, threshold in zip(keys, layer.threshold.tolist(), strict=True):
            unit = torch.nn.functional.normalize(image, dim=-1)
            best = (unit[2::2] @ unit[1::2].T).topk(2, dim=1).values
            assert bool(((best[:, 0] - threshold).abs() > MARGIN / 4).all())
            # Of a blank image every choice is a tie, which no rounding breaks.
            assert bool((best[:, 0] - best[:, 1] > MARGIN / 2).all()) or bool((best == 1).all())


def test_more_merges_than_there_can_be_are_no_scene() -> None:
    shape = TowerShape(TowerHeads(1, 8), 24, ((25,), (12,)), (25, 25))
    with pytest.raises(ValueError, match="13 of 25 tokens cannot merge in one layer"):
        make_tower_scene(shape, seed=0, dtype=torch.float32)


def test_of_a_scene_with_too_few_rows_whole_images_are_compared() -> None:
    assert SHORT.first_overflow == 2 and SHORT.whole == 3
    found = tower_reference(make_tower_scene(SHORT, seed=6, dtype=torch.float32))
    assert found["owners"].shape[0] == SHORT.whole and found["bounds"][-1] == 1
    kept = [sum(stage[: SHORT.whole]) for stage in SHORT.lengths]
    assert found["hidden"].shape[0] == sum(kept[1:]) and found["attend"].shape[0] == sum(kept[:-1])
    # Rows there are and rows needed, up to where they do not suffice.
    assert found["bounds"][-3:-1].tolist() == [SHORT.rows[2], sum(SHORT.lengths[2])]


def test_the_gpu_s_towers_are_the_model_s_in_both_dtypes() -> None:
    scenes = checked_towers(tiny=False).values()
    assert {scene.dtype for scene in scenes} == {torch.bfloat16, torch.float32}
    for dtype in (torch.bfloat16, torch.float32):
        own = [scene.shape for scene in scenes if scene.dtype == dtype and scene.shape.heads.width == 1024]
        assert any(shape.first_overflow for shape in own)
        assert any(shape.first_overflow is None and shape.rows[-1] > sum(shape.lengths[-1]) for shape in own)
    assert [shape.first_overflow for shape in SANITIZED_TOWERS] == [None, 2]
    assert any(layer.images == 25 and layer.patches == 576 for layer in timed_towers(tiny=False).values())


def test_pictures_of_a_timed_tower_differ_and_fit_their_rows() -> None:
    lengths = tower_lengths(25, 90, 576, 23)
    assert lengths[0] == [577] * 25 and sum(lengths[-1]) == pytest.approx(25 * 91, rel=0.02)
    assert min(lengths[-1]) < 60 and max(lengths[-1]) > 150
    for before, after in zip(lengths, lengths[1:], strict=False):
        assert all(0 <= b - a <= (b + 1) // 2 - 1 for b, a in zip(before, after, strict=True))
    rows = granted_rows(lengths)
    assert rows[0] == 25 * 577 and rows == sorted(rows, reverse=True)
    assert all(sum(stage) <= own for stage, own in zip(lengths, rows, strict=True))


def test_floors_of_the_tower_follow_the_shape() -> None:
    shape = TowerShape(TowerHeads(16, 64), 576, ((577, 577), (400, 300)), (1154, 800))
    least = tower_floors(shape)
    assert least["tower_attention"].bytes == 2 * 577 * (4 * 1024 * 2 + 4)
    assert least["tower_attention"].flops == 2 * 577**2 * 4 * 1024
    # Ten tiles of queries read all keys and values, and the sizes for each head.
    asked = 2 * 577 * (2 * 1024 * 2 + 10 * (2 * 1024 * 2 + 16 * 4))
    assert least["tower_attention"].asked == asked
    assert least["match and plan"].flops == 2 * 289 * 288 * 2 * 64
    assert least["join"].bytes > (2 * 1154 + 700) * 1024 * 2
    assert all(floor.asked >= floor.bytes for floor in least.values())
    assert owners_floor([[577], [400], [300]], 576).bytes == (577 + 400) * 4 + 576 * 8


def test_the_page_about_kernels_has_the_floors() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert floor_table(1, 90, 576, 60, SEVEN_B) in text
    assert tower_floor_table(timed_towers(tiny=False).values()) in text


# What is wrong about a kernel's result is seen.


def test_errors_of_all_and_of_the_worst_row() -> None:
    wanted = torch.ones(4, 2)
    assert errors(wanted.clone(), wanted) == (0, 0)
    got = wanted.clone()
    got[2] = 2
    assert errors(got, wanted) == (pytest.approx(0.5), pytest.approx(1))
    got[2, 0] = float("nan")
    assert errors(got, wanted) == (float("inf"), float("inf"))
    # A row of padding is 0, and nothing else.
    wanted[3] = 0
    assert errors(wanted.clone(), wanted)[1] == 0
    assert errors(wanted + 1e-6, wanted)[1] == float("inf")


def row_off(answers: torch.Tensor) -> None:
    answers[1] *= 1.03


def all_off(answers: torch.Tensor) -> None:
    answers *= 1.008


def unwritten(answers: torch.Tensor) -> None:
    answers[-1, -1, -1] = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [row_off, all_off, unwritten])
def test_a_wrong_kernel_disagrees(fault: Callable[[torch.Tensor], None], dtype: torch.dtype) -> None:
    wanted = reference_results(make_scene(SHAPE, seed=1))
    got = {name: value.to(dtype) if name == "attend" else value for name, value in wanted.items()}
    assert state(verdict(got, got, wanted, dtype)) == "agrees"
    wrong = got | {"attend": got["attend"].clone()}
    fault(wrong["attend"])
    assert state(verdict(wrong, wrong, wanted, dtype)) == "DISAGREES: attend"
    scored = got | {"importance": got["importance"] * 1.0005}
    assert state(verdict(scored, scored, wanted, dtype)) == "DISAGREES: importance"


def test_a_second_run_of_other_bits_disagrees() -> None:
    wanted = reference_results(make_scene(SHAPE, seed=1))
    again = {name: value.clone() for name, value in wanted.items()}
    again["importance"][0] = torch.nextafter(again["importance"][0], torch.tensor(9.0))
    assert state(verdict(wanted, again, wanted, torch.float32)) == "DISAGREES: bits"


def one_patch_more(sizes: torch.Tensor) -> None:
    sizes[3] += 1


def other_owner(owners: torch.Tensor) -> None:
    owners[0, -1] = (owners[0, -1] + 1) % owners[0].max()


def written_padding(hidden: torch.Tensor) -> None:
    hidden[-1, 0] = 1e-3


TOWER_FAULTS = [
    ("attend", row_off),
    ("attend", all_off),
    ("attend", unwritten),
    ("hidden", row_off),
    ("hidden", written_padding),
    ("sizes", one_patch_more),
    ("bounds", one_patch_more),
    ("owners", other_owner),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "fault"), TOWER_FAULTS)
def test_a_wrong_kernel_of_the_tower_disagrees(
    name: str, fault: Callable[[torch.Tensor], None], dtype: torch.dtype
) -> None:
    wanted = tower_reference(make_tower_scene(TOWER, seed=1, dtype=dtype))
    got = {key: x.to(dtype) if key in ("attend", "hidden") else x.clone() for key, x in wanted.items()}
    assert state(verdict(got, got, wanted, dtype)) == "agrees"
    wrong = got | {name: got[name].clone()}
    fault(wrong[name])
    assert state(verdict(wrong, wrong, wanted, dtype)) == f"DISAGREES: {name}"
    assert state(verdict(got, wrong, wanted, dtype)) == "DISAGREES: bits"


def test_unwritten_memory_holds_no_number() -> None:
    with calls.poisoned_memory():
        assert bool(torch.empty(3, 5).isnan().all())
        assert bool(torch.ones(2).new_empty(7).isnan().all()) and bool(
            torch.empty_like(torch.ones(2)).isnan().all()
        )
        assert torch.empty(4, dtype=torch.int32).tolist() == [torch.iinfo(torch.int32).max] * 4
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_kernels_are_checked_and_timed_through_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    done = run_script("kernels/run.py", "--tiny", "--seed", "7", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    content = json.loads(out.read_text())
    checked = {key: cell for key, cell in content["cells"].items() if key.startswith("check: ")}
    assert set(checked) == {f"check: {name}" for name in (*checked_scenes(tiny=True), *TOWERS)}
    assert {state(cell) for cell in checked.values()} == {"agrees"}, checked
    assert {cell["seed"] for cell in checked.values()} == {7} and "seed 7" in done.stdout
    rows = [row for cell in content["cells"].values() for row in cell.get("kernels", [])]
    assert {row["kernel"] for row in rows} == {
        "key_index",
        "queries",
        "expand",
        "dense",
        "segments",
        "importance",
        "decode",
        "tower_attention",
        "metric",
        "match and plan",
        "join",
        "owners",
    }
    assert all(row["seconds"] > 0 and row["floor_s"] > 0 for row in rows)
    assert "check: agrees in all 6 scenes" in done.stdout


@pytest.mark.parametrize("module", [kernel_run, run])
def test_a_gpu_is_needed_for_anything_but_the_toy_size(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["script", "--out", str(tmp_path / "results.json")])
    assert module.main() == 1
    assert "there is no CUDA device; use a GPU host, or --tiny" in capsys.readouterr().out


# compute-sanitizer.

REPORT = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _combine+0x2b0
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f00 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""


def test_what_a_sanitizer_found() -> None:
    found = findings(REPORT)
    assert found["findings"] == 1 and found["kernels"] == {"_combine": 1}
    assert found["first"] == "Invalid __global__ write of size 4 bytes"
    assert state(found) == "DISAGREES: memory"
    assert state(findings("========= ERROR SUMMARY: 0 errors\n")) == "agrees"
    assert findings("========= COMPUTE-SANITIZER\n") == {}


def test_a_sanitizer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.kernels.sanitizer.program", lambda: None)
    found = sanitize("memcheck", tmp_path / "kernels.py", 1, tmp_path / "log", time.time() + UNLIMITED_S)
    assert state(found) == "not run: compute-sanitizer is not installed"


def test_a_sanitizer_without_a_verdict_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compute-sanitizer"
    script.write_text("#!/bin/sh\necho 'ValueError: no such device' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr("benchmarks.gpu.kernels.sanitizer.program", lambda: str(script))
    found = sanitize(
        "memcheck", tmp_path / "kernels.py", 1, tmp_path / "memcheck.log", time.time() + UNLIMITED_S
    )
    assert state(found).startswith("FAILED: ") and "ValueError: no such device" in found["failed"]


def test_answers_that_are_wrong_under_a_sanitizer_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's report goes to its file, what the scenes say through it."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors" > "$4"\n'
        """echo 'CELL {"scenes": 3, "scenes_agree": false}'\n"""
    )
    program.chmod(0o755)
    monkeypatch.setattr("benchmarks.gpu.kernels.sanitizer.program", lambda: str(program))
    found = sanitize(
        "initcheck", tmp_path / "kernels.py", 1, tmp_path / "initcheck.log", time.time() + UNLIMITED_S
    )
    assert found["findings"] == 0 and state(found) == "DISAGREES: scenes"


# Cases in processes of their own.

CHILD = """
import json, os, sys, time
sys.path.insert(0, {repo!r})
from benchmarks.gpu.running.answering import Answers
from benchmarks.gpu.running.cases import Case, run_all

def run(key):
    if key == "raises":
        raise ValueError("the pages are torn")
    if key == "dies":
        os.abort()
    if key == "hangs":
        time.sleep(3600)
    return {{"agrees": {{"all": True}}}}

def recover():
    if plan["fatal"]:
        raise RuntimeError("the device does not answer")

plan = json.loads(sys.argv[1])
if plan["broken"]:
    raise ImportError("no module named engine")
answers = Answers()
answers.tell({{"started_s": 1.5}})
cases = [Case(**case) for case in plan["cases"]]
run_all(cases, run, plan["deadline"], answers, None if plan["fatal"] is None else recover)
"""


def runner(broken: bool = False, fatal: bool | None = None) -> Runner:
    def command(left: Any, until: float) -> list[str]:
        # The process says where a case hangs long before it is ended.
        cases = [vars(case) | {"most_s": case.most_s / 4} for case in left]
        plan: dict[str, Any] = {"cases": cases, "deadline": until}
        plan |= {"broken": broken, "fatal": fatal}
        return [sys.executable, "-c", CHILD.format(repo=str(ROOT)), json.dumps(plan)]

    return Runner("engine", command, start_s=1, most_start_s=UNLIMITED_S)


def case(key: str, seconds: float = 1, most_s: float = UNLIMITED_S) -> Case:
    """A case that takes as long as it takes."""
    return Case(key, seconds, most_s)


def new_record(folder: Path) -> Record:
    return Record(Results(folder / "results.json", {"device": "a"}, "python checking.py"))


def test_a_crash_and_a_hang_stop_nothing_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "sources", lambda: "this code")
    record = new_record(tmp_path)
    plan = [case("first"), case("raises"), case("dies"), case("hangs", most_s=15), case("last")]
    drive(runner(), plan, record, tmp_path, time.time() + UNLIMITED_S)
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert set(cells) == {one.key for one in plan}
    assert state(cells["first"]) == state(cells["last"]) == "agrees"
    assert "ValueError: the pages are torn" in cells["raises"]["failed"]
    assert "ended with code -6" in cells["dies"]["failed"]
    assert "in time" in cells["hangs"]["failed"]
    assert record.results.engines["engine"] == {"started_s": 1.5}
    # The log of the process that hung says where.
    said = [log.read_text() for log in tmp_path.glob("*.log")]
    assert any("Timeout (" in text and "in run_all" in text for text in said)
    # Everything is on record: nothing is started again, unless the code is another.
    before = copy.deepcopy(cells)
    drive(runner(broken=True), plan, new_record(tmp_path), tmp_path, time.time() + UNLIMITED_S)
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == before
    monkeypatch.setattr(cases, "sources", lambda: "other code")
    drive(runner(), plan[:1], new_record(tmp_path), tmp_path, time.time() + UNLIMITED_S)
    after = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert after["first"]["sources"] == "other code" and after["last"] == before["last"]


@pytest.mark.parametrize(("fatal", "processes"), [(False, 1), (True, 2)])
def test_an_error_ends_the_process_only_where_the_device_is_gone(
    fatal: bool, processes: int, tmp_path: Path
) -> None:
    record = new_record(tmp_path)
    drive(runner(fatal=fatal), [case("raises"), case("last")], record, tmp_path, time.time() + UNLIMITED_S)
    cells = record.results.cells
    why = "RuntimeError: the device does not answer" if fatal else "ValueError: the pages are torn"
    assert why in cells["raises"]["failed"] and state(cells["last"]) == "agrees"
    assert len(list(tmp_path.glob("*.log"))) == processes


def test_an_engine_that_does_not_start_is_said_of_all_its_cases(tmp_path: Path) -> None:
    record = new_record(tmp_path)
    drive(runner(broken=True), [case("a"), case("b")], record, tmp_path, time.time() + UNLIMITED_S)
    for key in ("a", "b"):
        assert state(record.results.cells[key]).startswith("FAILED: did not start: ")
        assert "ImportError: no module named engine" in record.results.cells[key]["failed"]
    again = Record(record.results, again=True)
    drive(runner(), [case("a"), case("b")], again, tmp_path, time.time() + UNLIMITED_S)
    assert {state(cell) for cell in again.results.cells.values()} == {"agrees"}


def test_a_case_that_fails_is_tried_twice_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [case("dies")]
    monkeypatch.setattr(cases, "sources", lambda: "this code")

    def again() -> int:
        """Processes started by another call."""
        for log in tmp_path.glob("*.log"):
            log.unlink()
        record = new_record(tmp_path)
        drive(runner(), plan, Record(record.results, again=True), tmp_path, time.time() + UNLIMITED_S)
        return len(list(tmp_path.glob("*.log")))

    assert [again(), again(), again()] == [1, 1, 0]
    assert "failed 2 times, not tried again: dies" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["cells"]["dies"]["tries"] == 2
    # Other code is a new beginning.
    monkeypatch.setattr(cases, "sources", lambda: "other code")
    assert [again(), again(), again()] == [1, 1, 0]


def test_nothing_begins_that_cannot_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = new_record(tmp_path)
    drive(runner(), [case("a", seconds=100)], record, tmp_path, time.time() + 50)
    assert not record.results.cells and "no time left for engine: a" in capsys.readouterr().out


# What an engine did against the reference.


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> NotingReference:
    folder = asked.checkpoint(tmp_path_factory.mktemp("checks"))
    return NotingReference(folder, asked.section(0.5))


ASK = asked.CASES["alone"].asks()[0]
TOKENS = 3


@pytest.fixture(scope="module")
def right(reference: NotingReference) -> Answer:
    """What an engine answers that does everything as the reference does."""
    (image,) = ASK.images
    ids = reference.prompt_ids(ASK.text)
    features, members = reference.encode(image)
    (choice,) = reference.choices(ids, [image])
    owner = torch.empty(reference.patches, dtype=torch.int64)
    for token, patches in enumerate(members):
        owner[patches] = token
    kept = torch.isin(owner, torch.tensor(choice.kept))
    steps = reference.generate(ids, [image], TOKENS)
    tokens, logprobs = [step.token for step in steps], [step.top_logprobs for step in steps]
    return Answer(ids, tokens, logprobs, [[Look(owner, kept, features)]])


def wrong_aspects(reference: NotingReference, answer: Answer, dtype: str = "float32") -> set[str]:
    comparison = Comparison(reference, TOLERANCES[dtype])
    comparison.add(ASK, answer, TOKENS)
    return {aspect for aspect, right in comparison.result()["agrees"].items() if right is False}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_right_answer_agrees(reference: NotingReference, right: Answer, dtype: str) -> None:
    assert wrong_aspects(reference, right, dtype) == set()


def test_wrong_log_probabilities_disagree(reference: NotingReference, right: Answer) -> None:
    answer = copy.deepcopy(right)
    answer.logprobs[1] = {token: logprob - 0.01 for token, logprob in answer.logprobs[1].items()}
    assert wrong_aspects(reference, answer) == {"logprobs", "logprobs, given the sets"}
    answer.logprobs[1] = {token: float("nan") for token in answer.logprobs[1]}
    assert wrong_aspects(reference, answer, "bfloat16") == {"logprobs, given the sets"}


def test_a_wrong_token_disagrees(reference: NotingReference, right: Answer) -> None:
    answer = copy.deepcopy(right)
    answer.tokens[-1] = 5
    assert wrong_aspects(reference, answer) == {"tokens"}
    answer.tokens.pop()
    assert wrong_aspects(reference, answer) == {"prompt and length"}


def test_a_wrong_choice_disagrees(reference: NotingReference, right: Answer) -> None:
    """The most important token is dropped for the least important one."""
    reference.choices(right.prompt_ids, ASK.images)
    (choice,) = reference.wanted
    (look,) = right.looks[0]
    best, worst = int(choice.importance.argmax()), int(choice.importance.argmin())
    kept = look.kept.clone()
    kept[look.owner == best], kept[look.owner == worst] = False, True
    answer = dataclasses.replace(right, looks=[[Look(look.owner, kept, look.features)]])
    for dtype in TOLERANCES:
        wrong = wrong_aspects(reference, answer, dtype)
        assert "kept, given the merged" in wrong and "merged" not in wrong
    assert {"kept", "logprobs, given the sets"} <= wrong_aspects(reference, answer)
    few = dataclasses.replace(look, kept=look.kept & (look.owner != best))
    assert "kept, given the merged" in wrong_aspects(
        reference, dataclasses.replace(right, looks=[[few]]), "bfloat16"
    )


def test_a_wrong_merge_disagrees(reference: NotingReference, right: Answer) -> None:
    """One patch is with other patches than it should be."""
    (look,) = right.looks[0]
    owner = look.owner.clone()
    big = int(owner.bincount().argmax())
    owner[(owner == big).nonzero()[0, 0]] = (big + 1) % look.features.shape[0]
    answer = dataclasses.replace(right, looks=[[dataclasses.replace(look, owner=owner)]])
    assert "merged" in wrong_aspects(reference, answer)
    # Whichever prefill it was in: a request that starts over is looked at each time.
    twice = dataclasses.replace(right, looks=[[answer.looks[0][0], look]])
    assert wrong_aspects(reference, twice) == {"merged"}


def test_a_picture_that_no_prefill_showed_disagrees(reference: NotingReference, right: Answer) -> None:
    assert {"merged", "kept"} <= wrong_aspects(reference, dataclasses.replace(right, looks=[[]]))


def test_second_runs_are_compared_to_the_bit(right: Answer) -> None:
    again = copy.deepcopy(right)
    assert same_answers([right], [again])
    token, logprob = next(iter(again.logprobs[0].items()))
    again.logprobs[0][token] = logprob * (1 + 2**-50)
    assert not same_answers([right], [again])


def test_a_condition_that_did_not_happen_is_said() -> None:
    assert state(
        {"agrees": {"merged": True}, "happened": False, "condition": "no request was preempted"}
    ) == ("DID NOT HAPPEN: no request was preempted")


def test_no_decision_of_the_requests_is_a_matter_of_rounding(reference: NotingReference) -> None:
    served = Served(None, reference, asked.section(0.5))
    asks = {ask.text + str([id(i) for i in ask.images]): ask for ask in asked.CASES["together"].asks()}
    asks |= {str(i): ask for i, ask in enumerate(asked.CASES["two pictures"].asks())}
    assert len(asks) == 7
    assert all(served.is_decided(ask) for ask in asks.values())


def test_no_picture_stands_in_two_requests_of_a_case() -> None:
    for case in asked.CASES.values():
        shown = [picture for own in case.pictures for picture in own]
        assert len(shown) == len(set(shown))


# What an engine's steps are made of.


def test_steps_are_counted_by_what_they_are_made_of() -> None:
    plan = [
        # Rows of each request, requests preempted, rows of the graph replayed.
        ({"a": 600}, 0, None),
        ({"a": 1, "b": 600}, 1, None),
        ({"a": 1, "b": 1, "c": 1}, 0, 4),
        ({"a": 1, "b": 1}, 0, 2),
        ({}, 0, None),
    ]
    outputs = iter(plan)

    def schedule() -> SimpleNamespace:
        rows, preempted, _ = next(outputs)
        gone = {str(i) for i in range(preempted)} or None
        return SimpleNamespace(num_scheduled_tokens=rows, preempted_req_ids=gone)

    scheduler = SimpleNamespace(schedule=schedule, update_from_output=lambda scheduled, ran: ran)
    steps = Steps(scheduler)
    for rows, _, graph in plan:
        scheduled = scheduler.schedule()
        assert scheduled.num_scheduled_tokens == rows
        mode, padding = ("NONE", 0) if graph is None else ("FULL", graph - len(rows))
        stats = SimpleNamespace(runtime_mode=mode, num_paddings=padding)
        scheduler.update_from_output(scheduled, SimpleNamespace(cudagraph_stats=stats))
    assert steps.take() == {"steps": 4, "mixed": 1, "preempted": 1, "graphs": 2, "padded": 1}
    assert not any(steps.take().values())


# A real engine.


@pytest.mark.engine
def test_an_engine_is_checked_under_mixed_steps_and_preemption(tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    arguments = ["--tiny", "--engines", "float32", "--cases", "mixed,preempted", "--out", str(out)]
    done = run_script("checks/run.py", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cells = json.loads(out.read_text())["cells"]
    assert set(cells) == {"float32-eager-R0.5: mixed", "float32-eager-R0.5: preempted"}
    assert {state(cell) for cell in cells.values()} == {"agrees"}, done.stdout
    assert cells["float32-eager-R0.5: mixed"]["seen"]["mixed"] >= 1
    preempted = cells["float32-eager-R0.5: preempted"]
    assert preempted["seen"]["preempted"] >= 1
    # Whoever had to start over looked at its picture again.
    assert preempted["merged"]["pictures"] > 4
    assert "check: agrees in all 2 cases" in done.stdout


@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device: kernels compiled, not interpreted")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    done = run_script("kernels/run.py", "--check-only", "--out", str(tmp_path / "kernels.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cells = json.loads((tmp_path / "kernels.json").read_text())["cells"]
    names = (*checked_scenes(tiny=False), *checked_towers(tiny=False))
    assert {state(cells[f"check: {name}"]) for name in names} == {"agrees"}, done.stdout


@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device: the engines' answers on it")
@pytest.mark.engine
@pytest.mark.parametrize("engine", run.ENGINES, ids=lambda engine: engine.name)
def test_answers_on_a_gpu(engine: run.Engine, tmp_path: Path) -> None:
    done = run_script("checks/run.py", "--engines", engine.name, "--out", str(tmp_path / "checks.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cells = json.loads((tmp_path / "checks.json").read_text())["cells"]
    assert len(cells) == len(engine.cases())
    assert {state(cell) for cell in cells.values()} == {"agrees"}, done.stdout
