"""The C++ attention builds whatever an earlier, killed build left behind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from vllm_hybrid.attention import cpu_build
from vllm_hybrid.environment import waits

# Without torch's headers, which take most of a compiler's time.
SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny_extension"};
PyMODINIT_FUNC PyInit_tiny_extension() {
  PyObject *made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "answer", 42);
  return made;
}
"""
# Compiles the source when the file "hold" beside it is gone, and at once what torch tries a compiler with.
PATIENT_COMPILER = """#!/bin/sh
case "$*" in *tiny*) while [ -e "$(dirname "$0")/hold" ]; do sleep 0.05; done ;; esac
exec c++ "$@"
"""
BUILD = """
import sys
from pathlib import Path
from vllm_hybrid.attention.cpu_build import compile_extension
print(compile_extension([Path(sys.argv[1])], "tiny_extension").answer)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    return path


def start_build(source: Path, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(source.parent / "builds")} | more
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.slow
def test_builds_at_once_and_after_a_killed_builder(source: Path) -> None:
    compiler = source.with_name("patient")
    compiler.write_text(PATIENT_COMPILER)
    compiler.chmod(0o755)
    hold = source.with_name("hold")
    hold.touch()
    killed = start_build(source, CXX=str(compiler))
    built = source.parent / "builds"
    while not list(built.glob("*/lock")) and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(built.glob("*/lock")), "the builder was to be killed while it holds torch's lock"
    hold.unlink()
    for builder in [start_build(source, CXX=str(compiler)) for _ in range(2)]:
        out, error = builder.communicate()
        assert out.strip() == "42", error


def test_a_missing_compiler_is_one_sentence(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="'no-such-compiler' was not found.*install g.. or set CXX"):
        cpu_build.compile_extension([source], "tiny_extension")


def test_builds_that_differ_lie_apart(source: Path) -> None:
    one = cpu_build._build_folder("x", [source], ["-O3"])
    assert one == cpu_build._build_folder("x", [source], ["-O3"])
    assert one != cpu_build._build_folder("x", [source], ["-O2"])
    source.with_name("tiny.h").write_text("")
    two = cpu_build._build_folder("x", [source], ["-O3"])
    assert one != two
    source.write_text(SOURCE.replace("42", "43"))
    assert two != cpu_build._build_folder("x", [source], ["-O3"])
    shutil.copy(source, source.with_name("other.cpp"))
    assert cpu_build._build_folder("x", [source], []) != cpu_build._build_folder(
        "x", [source.with_name("other.cpp")], []
    )


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What is logged, with builds in a folder of this test's."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    said: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Noting()
    loggers = [cpu_build.logger, waits.logger]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.INFO)
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


def built_at_once(
    name: str, sources: list[str], extra_cflags: list[str], build_directory: str, verbose: bool
) -> str:
    """In torch's place."""
    Path(build_directory, f"{name}.so").touch()
    return f"module {name}"


def test_a_build_is_announced_and_what_is_built_is_not(
    source: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.load", built_at_once)
    assert not cpu_build.is_compiled([source], "tiny_extension")
    for _ in range(2):
        assert cpu_build.compile_extension([source], "tiny_extension") == "module tiny_extension"
        assert cpu_build.is_compiled([source], "tiny_extension")
    before, after = messages
    what = "compiling tiny_extension (C++), once per machine, which may take minutes"
    assert before == f"vllm-hybrid: {what}"
    assert re.fullmatch(rf"vllm-hybrid: done in [\d.]+ s: {re.escape(what)}", after)


def test_who_waits_for_a_build_says_so(
    source: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.load", built_at_once)
    folder = cpu_build._build_folder(
        "tiny_extension", [source], [cpu_build._compiler(), *cpu_build.machine_flags()]
    )
    folder.mkdir(parents=True)
    held = FileLock(folder.with_suffix(".lock"))
    held.acquire()
    waiting = threading.Thread(target=cpu_build.compile_extension, args=([source], "tiny_extension"))
    waiting.start()
    while not messages:
        time.sleep(0.01)
    assert messages == [f"vllm-hybrid: waiting for another process that compiles {folder.name}"]
    held.release()
    waiting.join()
    assert len(messages) == 3


def test_sources_that_do_not_compile_are_one_sentence(source: Path, messages: list[str]) -> None:
    source.write_text('#error "not here"\n')
    with pytest.raises(RuntimeError) as refused:
        cpu_build.compile_extension([source], "tiny_extension")
    said = str(refused.value)
    assert "\n" not in said and said.startswith("tiny_extension could not be compiled (")
    assert "not here" in said and "vllm-hybrid doctor" in said
    assert refused.value.__cause__ is not None


def test_headers_at_another_path_are_another_build(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = cpu_build._build_folder("x", [source], [])
    monkeypatch.setattr("torch.utils.cpp_extension.include_paths", lambda: ["/elsewhere/include"])
    assert cpu_build._build_folder("x", [source], []) != here
