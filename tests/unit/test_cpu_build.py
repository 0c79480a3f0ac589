"""The C++ attention builds whatever an earlier, killed build left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_hybrid.attention import cpu_build

SOURCE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("answer", [] { return 42; }); }
"""
BUILD = """
import sys
from pathlib import Path
from vllm_hybrid.attention.cpu_build import compile_extension
print(compile_extension([Path(sys.argv[1])], "tiny_extension").answer())
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
    killed = start_build(source)
    built = source.parent / "builds"
    while not list(built.glob("*/lock")) and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list(built.glob("*/lock")), "the builder was to be killed while it holds torch's lock"
    for builder in [start_build(source), start_build(source)]:
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
