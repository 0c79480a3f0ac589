"""The first run on a GPU, at toy size: stages end in time whatever happens, and go on where they were."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import first_run
from benchmarks.gpu.running import publishing
from benchmarks.gpu.running.cases import UNLIMITED_S
from benchmarks.gpu.running.processes import ProcessFailed
from benchmarks.gpu.running.results import Results
from benchmarks.gpu.speed import smoke, trace_table
from benchmarks.gpu.speed.cells import KINDS
from benchmarks.gpu.speed.model import SIZES
from tests.support.model_infos import share_model_infos
from tests.support.paths import ROOT

SPEED = ("--loads", "mixed", "--commit", "c0ffee", "--eager")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code with the repository's modules at hand."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )


# Smoke.


def test_every_kind_starts_eagerly_first_then_with_graphs() -> None:
    keys = [start.key for start in smoke.starts(KINDS, tiny=False)]
    kinds = ["stock", "stock_triton", "off", "hybrid R=0", "hybrid R=0.5"]
    assert keys == [f"{kind}, {mode}" for mode in ("eager", "graphs") for kind in kinds]


def test_live_tokens_are_known_where_every_layer_merges_all_it_may() -> None:
    assert smoke.expected_live(SIZES["7b-short"]) == 144
    assert smoke.expected_live(SIZES["tiny"]) == 72
    hybrid = smoke.Start("hybrid", 0.5, smoke.EAGER)
    right = {"least": 144, "most": 144}
    size = SIZES["7b-short"]
    assert smoke.wrong_with(hybrid, size, {"pictures_encoded": 3, "live_counts": right}) is None
    wrong = smoke.wrong_with(hybrid, size, {"pictures_encoded": 3, "live_counts": right | {"most": 150}})
    assert wrong == "images have 144 to 150 live tokens instead of 144"
    assert "no live counts" in str(smoke.wrong_with(hybrid, size, {"pictures_encoded": 3}))
    stock = smoke.Start("stock", 0.0, smoke.EAGER)
    assert smoke.wrong_with(stock, size, {"pictures_encoded": 2}) == "2 of 3 pictures were encoded"


def test_an_engine_that_fails_in_smoke_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    facts: dict[str, Any] = {"decoder_attention": {"A": 2}, "tower_attention": {}, "block_sizes": [16]}
    facts |= {"compile_mode": "NONE", "graph_mode": "NONE", "tower_graphs": False}

    def start(one: smoke.Start, *_: Any) -> dict[str, Any]:
        tried.append(one.key)
        if one.kind == "off":
            raise ProcessFailed("a measuring process ended with code 1: ValueError: no")
        return {"ok": True, "started_s": 1.0, "answered_s": 1.0, "facts": facts, "answer": {}}

    monkeypatch.setattr(smoke, "run_start", start)
    results = Results(tmp_path / "smoke.json", {}, "")
    arguments: Any = (results, KINDS, tmp_path, time.time() + UNLIMITED_S, True, 2, lambda: None)
    smoke.run(*arguments)
    assert sorted(tried) == sorted(start.key for start in smoke.starts(KINDS, tiny=True))
    said = smoke.table(results.content, tiny=True)
    assert "| off, eager | FAILED: a measuring process ended with code 1: ValueError: no |" in said
    assert said.count("| ok |") == 4
    # Only what failed is tried again.
    tried.clear()
    smoke.run(*arguments)
    assert tried == ["off, eager"]
    assert results.failures["off, eager"]["times"] == 2


# Profile.


def test_a_trace_is_summed_up_by_kernel() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "attend", "ts": 100.0, "dur": 30.0},
        {"ph": "X", "cat": "kernel", "name": "attend", "ts": 140.0, "dur": 10.0},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 160.0, "dur": 100.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 270.0, "dur": 10.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 90.0, "dur": 5.0},
        {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 95.0, "dur": 5.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 98.0, "dur": 5.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaEventSynchronize", "ts": 110.0, "dur": 50.0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 80.0, "dur": 500.0},
    ]
    found = trace_table.summarise(events)
    assert [(row["name"], row["calls"]) for row in found["top"]] == [
        ("gemm", 1),
        ("attend", 2),
        ("Memcpy DtoH", 1),
    ]
    assert found["busy_s"] == pytest.approx(150e-6) and found["span_s"] == pytest.approx(180e-6)
    assert found["launches"] == 2 and found["graph_launches"] == 1
    assert [wait["name"] for wait in found["waits"]] == ["cudaEventSynchronize"]
    said = trace_table.table(found)
    assert said.startswith("1 step, each 0.18 ms, of which busy 0.15 ms; in all busy 0.15 ms of 0.18 ms")
    twice = trace_table.table(found | {"steps": 2})
    assert twice.startswith("2 steps, each 0.09 ms, of which busy 0.07 ms; in all busy 0.15 ms of 0.18 ms")
    assert "1 x cudaEventSynchronize (0.05 ms)" in said and "| gemm | 1 | 0.100 | 66.7% |" in said
    on_cpu = trace_table.summarise(events[-1:])
    assert not on_cpu["device"] and "no device in this trace" in trace_table.table(on_cpu)


# Results.


def test_results_are_a_few_files(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / "traces").mkdir()
    for name in publishing.STAGES_FILES:
        (work / f"{name}.json").write_text(json.dumps({"name": name}))
    (work / "other.json").write_text("{}")
    (work / "deep" / "engine.log").write_bytes(b"x" * publishing.LOG_BYTES + b"the end")
    (work / "traces" / "stock-decode.json.gz").write_bytes(gzip.compress(b"{}"))
    (work / "traces" / "warm-up_rank0.123.json.gz").write_bytes(gzip.compress(b"{}"))
    publisher = publishing.Publisher(work, tmp_path / "out", tmp_path / "copy", lambda: "tables")
    publisher.everything()
    for folder in (tmp_path / "out", tmp_path / "copy"):
        files = {file.name for file in folder.iterdir()}
        assert files == {f"{name}.json" for name in publishing.STAGES_FILES} | {
            "tables.md",
            "logs.tar.gz",
            "traces.tar",
        }
        assert len(files) == 8 and (folder / "tables.md").read_text() == "tables\n"
        with tarfile.open(folder / "logs.tar.gz") as logs:
            member = logs.extractfile("deep/engine.log")
            assert member is not None
            content = member.read()
        assert len(content) == publishing.LOG_BYTES and content.endswith(b"the end")
        with tarfile.open(folder / "traces.tar") as traces:
            assert traces.getnames() == ["stock-decode.json.gz"]


def test_results_carried_to_a_fresh_machine_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "adopt_orphans", lambda: None)
    monkeypatch.setattr(first_run, "end_descendants", lambda: None)
    seen = []

    def measures(stage: first_run.Stage) -> None:
        results = stage.results("smoke")
        seen.append(sorted(results.cells))
        results.cells[f"cell {len(seen)}"] = {}
        results.save()

    monkeypatch.setitem(first_run.STAGES, "smoke", measures)
    monkeypatch.setattr(first_run, "all_tables", lambda *_: "tables")
    out, copy = tmp_path / "out", tmp_path / "copy"
    command = ["--tiny", "--stage", "smoke", "--out", str(out), "--copy", str(copy)]
    assert first_run.main(command) == 0
    # A fresh machine: nothing but the published files of the one before it.
    shutil.rmtree(out / "work")
    assert first_run.main(command) == 0
    # Nothing but the copy.
    shutil.rmtree(out)
    assert first_run.main(command) == 0
    assert seen == [[], ["cell 1"], ["cell 1", "cell 2"]]


def test_what_the_work_folder_holds_is_newer_than_what_was_published(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for folder, said in ((work, "newer"), (out, "older")):
        folder.mkdir()
        (folder / "speed.json").write_text(json.dumps({"said": said}))
    (tmp_path / "decode.json.gz").write_bytes(gzip.compress(b"{}"))
    with tarfile.open(out / "traces.tar", "w") as archive:
        archive.add(tmp_path / "decode.json.gz", "decode.json.gz")
    publishing.take_back(work, [out])
    assert json.loads((work / "speed.json").read_text()) == {"said": "newer"}
    assert (work / "traces" / "decode.json.gz").exists()


def test_a_table_that_cannot_be_made_does_not_end_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publishing, "EVERY_S", 0.01)
    again = threading.Event()
    asked = []

    def tables() -> str:
        asked.append(1)
        if len(asked) == 1:
            raise KeyError("no such cell")
        again.set()
        return "tables"

    publisher = publishing.Publisher(tmp_path / "work", tmp_path / "out", None, tables)
    publisher.keep_going()
    again.wait()
    publisher.stop()
    assert "no such cell" in capfd.readouterr().err


# Stages.

# Ends by force while the results cannot be written, because something holds them or raises.
FORCED = """
import sys, threading
from benchmarks.gpu import first_run
first_run.FORCED_END_S = 3.0
class Stuck:
    def stop(self):
        pass
    def everything(self):
        if sys.argv[1] == "raises":
            raise OSError("no space left")
        threading.Event().wait()
first_run.end_by_force(Stuck(), lambda: print("THE TABLE"))
"""


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_the_end_by_force_ends(how: str) -> None:
    done = run_python(FORCED, how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the stage was ended by force" in done.stdout and "THE TABLE" not in done.stdout


# Starts a process in a session of its own, whose parent then ends, and hangs.
HANGS = """
import subprocess, sys, threading, time
from benchmarks.gpu import first_run
hung = threading.Event()
class Guard(threading.Timer):
    def run(self):
        hung.wait()
        super().run()
# The stage's time runs from where it hangs, and its end by force has all it needs.
first_run.threading.Timer, first_run.FORCED_END_S = Guard, 86400.0
PARENT = '''
import subprocess, sys
sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(sleeps, stdout=subprocess.DEVNULL).pid)
'''
def hang(stage):
    command = [sys.executable, "-c", PARENT]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    print("ORPHAN", said.stdout, flush=True)
    hung.set()
    time.sleep(600)
first_run.STAGES["smoke"] = hang
sys.exit(first_run.main(["--tiny", "--stage", "smoke", "--minutes", "0.1", "--out", sys.argv[1]]))
"""


def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    done = run_python(HANGS, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the stage was ended by force" in done.stdout
    orphan = int(done.stdout.split("ORPHAN ")[1].split()[0])
    assert not psutil.pid_exists(orphan)
    assert (tmp_path / "out" / "tables.md").exists()


def test_a_stage_that_breaks_keeps_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "adopt_orphans", lambda: None)
    monkeypatch.setattr(first_run, "end_descendants", lambda: None)

    def breaks(stage: first_run.Stage) -> None:
        stage.results("smoke").failed("stock, eager", "boom")
        raise KeyError("broken")

    monkeypatch.setitem(first_run.STAGES, "smoke", breaks)
    out = tmp_path / "out"
    assert first_run.main(["--tiny", "--stage", "smoke", "--out", str(out)]) == 1
    assert "| stock, eager | FAILED: boom |" in (out / "tables.md").read_text()


def test_a_script_that_fails_is_named_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_run, "end_descendants", lambda: None)
    monkeypatch.setattr(first_run, "HERE", tmp_path)
    (tmp_path / "fails.py").write_text("raise ValueError('no kernel')\n")
    args = first_run.arguments().parse_args(["--tiny", "--stage", "correct", "--out", str(tmp_path)])
    publisher = publishing.Publisher(tmp_path, tmp_path, None, str)
    stage = first_run.Stage(args, tmp_path, time.time() + UNLIMITED_S, publisher)
    first_run.script(stage, "fails", ["fails.py"], UNLIMITED_S)
    assert "fails FAILED with code 1: ValueError: no kernel" in capsys.readouterr().out
    first_run.script(stage, "late", ["fails.py"], 5)
    assert "no time left for late" in capsys.readouterr().out


# Stands for the scripts of kernels and checks: notes its options and has one case that agrees and one not.
STUB = """
import json, sys
from pathlib import Path
options = sys.argv[1:]
out = Path(options[options.index("--out") + 1])
with (out.parent / "asked").open("a") as file:
    print(Path(sys.argv[0]).parent.name, *options, file=file)
print("what the script itself prints")
cells = {"check: good": {"agrees": {"all": True}}, "check: bad": {"agrees": {"bits": False}}}
if "--time-only" in options:
    row = {"kernel": "key_index", "decodes": True, "requests": 4, "live": 90}
    row |= {"seconds": 2e-5, "floor_s": 1e-5}
    cells["time: a"] = {"kernels": [row]}
device = {"name": "a device", "kind": "cuda", "driver": "580.1"}
content = {"device": device, "versions": {"vllm": "0"}, "commit": options[options.index("--commit") + 1]}
content |= {"commands": [{"command": "python stub.py"}], "cells": cells}
out.write_text(json.dumps(content))
"""


def test_the_checks_of_correct_are_shown_as_far_as_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_run, "end_descendants", lambda: None)
    monkeypatch.setattr(first_run, "HERE", tmp_path)
    for script in ("kernels/run.py", "checks/run.py"):
        (tmp_path / script).parent.mkdir()
        (tmp_path / script).write_text(STUB)
    work = tmp_path / "work"
    work.mkdir()
    command = ["--tiny", "--stage", "correct", "--out", str(tmp_path), "--commit", "c0ffee"]
    args = first_run.arguments().parse_args(command)
    publisher = publishing.Publisher(work, tmp_path, None, str)
    first_run.correct(first_run.Stage(args, work, time.time() + UNLIMITED_S, publisher))
    asked = [line.split() for line in (work / "asked").read_text().splitlines()]
    assert [line[0] for line in asked] == ["kernels", "checks", "kernels"]
    assert "--check-only" in asked[0] and "--time-only" in asked[2]
    for line in asked:
        assert {"--again", "--tiny", "c0ffee"} <= set(line)
        # The script is to end before it is ended.
        assert float(line[line.index("--minutes") + 1]) * 60 <= UNLIMITED_S - first_run.SCRIPT_END_S
    short = first_run.all_tables(work, True, "correct")
    assert "a device, driver 580.1; vllm 0; commit c0ffee" in short and "command: `python stub.py`" in short
    assert "kernels: check: DISAGREES in bad" in short and "- checking, check: bad: DISAGREES: bits" in short
    assert "| key_index (decode step) | 4 | 90 | 20.0 | 10.00 | 2.0 |" in short and "good" not in short
    # Everything is in the long tables, whether or not the scripts came to print it.
    for log in work.glob("*.log"):
        log.unlink()
    whole = first_run.all_tables(work, True)
    assert "| good | " in whole and "## checking" in whole and whole.count("commit c0ffee") == 2


def test_the_tables_of_correct_fit_on_a_screen(tmp_path: Path) -> None:
    cells = {f"check: {n}": {"failed": "boom", "tries": 2} for n in range(60)}
    row = {
        "kernel": "key_index",
        "decodes": False,
        "requests": 4,
        "live": 90,
        "seconds": 2e-5,
        "floor_s": 1e-5,
    }
    cells |= {f"time: {n}": {"kernels": [row]} for n in range(15)}
    content = {"device": {"name": "a device"}, "versions": {}, "cells": cells}
    (tmp_path / "kernels.json").write_text(json.dumps(content))
    lines = first_run.all_tables(tmp_path, True, "correct").splitlines()
    assert len(lines) <= first_run.SCREEN and any("and 35 more in tables.md" in line for line in lines)
    assert sum(line.startswith("| key_index") for line in lines) == 15
    assert "- kernels, check: 0: FAILED: boom (not tried again)" in lines


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smoke, speed and profile at toy size, one engine start each."""
    out = tmp_path_factory.mktemp("first") / "out"
    caches = out / "work" / "caches"
    share_model_infos(caches / "vllm", caches / "smoke" / "stock-eager")
    for stage, kinds, *more in (("smoke", "stock"), ("speed", "stock", *SPEED), ("profile", "hybrid")):
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "gpu" / "first_run.py"),
            "--tiny",
            "--out",
            str(out),
        ]
        done = subprocess.run(
            [*command, "--stage", stage, "--kinds", kinds, "--minutes", str(UNLIMITED_S / 60), *more],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(done.stdout.splitlines()) < 100
    return out


@pytest.mark.engine
def test_smoke_at_toy_size(ran: Path) -> None:
    content = json.loads((ran / "smoke.json").read_text())
    assert content["failures"] == {}
    (cell,) = content["cells"].values()
    assert cell["ok"] and cell["answer"]["pictures_encoded"] == smoke.REQUESTS
    assert cell["facts"]["decoder_attention"]
    assert "first_run.py --tiny" in content["commands"][0]["command"]
    assert "| stock, eager | ok |" in (ran / "tables.md").read_text()


@pytest.mark.engine
def test_speed_at_toy_size(ran: Path) -> None:
    content = json.loads((ran / "speed.json").read_text())
    assert content["failures"] == {} and content["commit"] == "c0ffee"
    assert set(content["cells"]) == {"stock/mixed/c1", "stock/mixed/c2"}
    assert all(cell["requests_per_s"] > 0 and cell["eager"] for cell in content["cells"].values())
    said = (ran / "tables.md").read_text().split("## speed")[1]
    assert "commit c0ffee" in said and "command: `python " in said and " (eager) |" in said
    assert "check: kernels not checked; checking not checked" in said


@pytest.mark.engine
def test_profile_at_toy_size(ran: Path) -> None:
    content = json.loads((ran / "profile.json").read_text())
    assert content["failures"] == {}
    assert set(content["cells"]) == {"hybrid/prefill", "hybrid/decode"}
    assert all(cell["busy_s"] > 0 and cell["top"] for cell in content["cells"].values())
    assert "### hybrid/decode, eager\n\n2 steps, each " in (ran / "tables.md").read_text()
    with tarfile.open(ran / "traces.tar") as traces:
        assert set(traces.getnames()) == {"hybrid-prefill.json.gz", "hybrid-decode.json.gz"}
    with tarfile.open(ran / "logs.tar.gz") as logs:
        assert {"smoke-stock-eager.log", "profile-hybrid.log"} <= set(logs.getnames())
    assert len([file for file in ran.iterdir() if file.is_file()]) <= 8
