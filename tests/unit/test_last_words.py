"""What a process says last: a refusal or what its environment lacks, in one sentence, and no more of it."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vllm_hybrid.environment import last_words
from vllm_hybrid.environment.faults import ADVICE, environment_fault

BROKEN = "raise OSError('Could not load this library: libtorchcodec.so')"
FAULT = "torchcodec cannot be imported (OSError: Could not load this library: libtorchcodec.so)"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A torchcodec that cannot be imported, and a library of the user's that imports it in vain."""
    (tmp_path / "torchcodec.py").write_text(BROKEN)
    (tmp_path / "users_own.py").write_text("int('x')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("torchcodec", "users_own"):
        sys.modules.pop(name, None)


def raised_by_import(name: str) -> Exception:
    try:
        importlib.import_module(name)
    except Exception as error:
        return error
    raise AssertionError(f"{name} was to be broken")


def test_a_library_that_cannot_be_imported_is_the_environments_fault(broken: Path) -> None:
    assert environment_fault(raised_by_import("torchcodec")) == FAULT


def test_it_is_found_behind_what_it_caused(broken: Path) -> None:
    cause = raised_by_import("torchcodec")
    try:
        raise RuntimeError("Failed to import transformers") from cause
    except RuntimeError as error:
        assert environment_fault(error) == FAULT
    try:
        raise ValueError("a message of its own") from None
    except ValueError as error:
        error.__context__ = cause
        assert environment_fault(error) is None, "its context does not count"


def test_other_faults_are_not_the_environments(broken: Path) -> None:
    assert environment_fault(raised_by_import("users_own")) is None
    assert environment_fault(ValueError("hybrid.fastv_ratio is 2")) is None
    assert environment_fault(PackageNotFoundError("users-own")) is None
    with pytest.raises(PackageNotFoundError) as own:
        version("no-such-distribution")
    assert environment_fault(own.value) is None


def test_a_missing_name_and_a_missing_device_are() -> None:
    assert environment_fault(PackageNotFoundError("vllm")) == "no distribution named 'vllm' is installed"
    assert environment_fault(RuntimeError("Failed to infer device type")) == "vLLM finds no device to run on"


@last_words.announced
def check(value: int) -> int:
    if value > 2:
        raise ValueError(f"{value}\nis too much")
    return value


def test_a_refusal_is_logged_once_before_it_is_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_words, "_refusals", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with caplog.at_level(logging.ERROR, last_words.logger.name):
        last_words.logger.addHandler(caplog.handler)
        try:
            assert check(2) == 2 and not caplog.records
            for _ in range(2):
                with pytest.raises(ValueError, match="is too much") as refused:
                    check(3)
        finally:
            last_words.logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"vllm-hybrid: 3 is too much"}
    assert last_words.last_words(refused.value) == "3 is too much"
    assert (
        last_words.last_words(RuntimeError("1 validation error\n  3 is too\n much [type=value]"))
        == "3 is too much"
    )
    assert last_words.last_words(RuntimeError("another")) is None


REFUSED = """
from vllm_hybrid.environment.last_words import announced

@announced
def check():
    raise ValueError("this is too much; use less")

try:
    check()
except ValueError as error:
    raise RuntimeError(f"1 validation error\\n  {error}")
"""
UNIMPORTABLE = """
from vllm_hybrid_last_words import no_platform

assert no_platform() is None
import torchcodec
"""
UNKNOWN = "from vllm_hybrid_last_words import no_platform\nno_platform()\nint('x')\n"


def ended(folder: Path, program: str, code: str) -> str:
    """What a program of a name prints on standard error when it ends of its code."""
    file = folder / program
    file.write_text(code)
    (folder / "torchcodec.py").write_text(BROKEN)
    paths = [str(folder), str(ROOT), str(ROOT / "plugins")]
    done = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(REFUSED, "this is too much; use less"), (UNIMPORTABLE, f"{FAULT}; {ADVICE}")],
    ids=["a refusal", "a broken library"],
)
def test_vllm_ends_with_the_sentence_alone_and_other_programs_with_it_last(
    tmp_path: Path, code: str, sentence: str
) -> None:
    said = ended(tmp_path, "vllm", code)
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"vllm-hybrid: error: {sentence}"
    said = ended(tmp_path, "users_program.py", code)
    assert said.count("Traceback") and said.splitlines()[-1] == f"vllm-hybrid: error: {sentence}"


@pytest.mark.parametrize("program", ["vllm", "users_program.py"])
def test_any_other_end_is_left_as_it_is(tmp_path: Path, program: str) -> None:
    said = ended(tmp_path, program, UNKNOWN)
    assert said.startswith("Traceback") and "vllm-hybrid" not in said.splitlines()[-1]


def test_vllm_calls_the_plugin_first_and_gets_no_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    for entry in entry_points(group="vllm.platform_plugins", name="hybrid"):
        assert entry.load()() is None
        break
    else:
        pytest.fail("the installed distribution has no such entry point: set it up anew")
    hook = sys.excepthook
    assert hook is not sys.__excepthook__
    last_words.say_last_words()
    assert sys.excepthook is hook, "once is enough"


def test_a_command_that_cannot_import_a_library_says_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: no such file')")
    command = [sys.executable, "-m", "vllm_hybrid.cli", "prepare", str(tmp_path), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    fault = "torch cannot be imported (ImportError: libtorch.so: no such file)"
    assert done.stderr == f"vllm-hybrid: error: {fault}; {ADVICE}\n"
