"""Whether there is a compiler that compiles: C++ for the attention on a CPU, C for what Triton makes on CUDA.

A file is compiled that includes what the real ones do, so that headers which are missing are found too.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

_CPP = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
_C = "#include <Python.h>\nint answer(void) { return 42; }\n"
_DEBIAN = "(Debian: build-essential python3-dev)"


@dataclass(frozen=True)
class Compiler:
    """A compiler that is needed.

    Attributes:
        language: what it compiles.
        name: its name or path, as those who call it look for one.
        gap: why it cannot compile what is needed; empty if it can.
        remedy: what to do about that.

    """

    language: str
    name: str
    gap: str
    remedy: str

    @property
    def is_there(self) -> bool:
        """Whether there is such a program at all."""
        return shutil.which(self.name) is not None


def cpp_compiler() -> Compiler:
    """The C++ compiler that torch calls for the attention on a CPU."""
    name = os.environ.get("CXX", "c++")
    gap = _gap(name, _CPP, ".cpp", "-fopenmp")
    return Compiler("C++", name, gap, f"install g++ and Python's headers {_DEBIAN}, or set CXX")


def c_compiler() -> Compiler:
    """The C compiler that Triton calls for what launches its kernels."""
    name = os.environ.get("CC") or next((name for name in ("clang", "gcc") if shutil.which(name)), "gcc")
    gap = _gap(name, _C, ".c")
    return Compiler("C", name, gap, f"install gcc and Python's headers {_DEBIAN}, or set CC")


@functools.cache
def _gap(compiler: str, source: str, suffix: str, *flags: str) -> str:
    """Why a compiler does not make a shared library of a source; "" if it does."""
    if shutil.which(compiler) is None:
        return "not found"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"try{suffix}")
        file.write_text(source)
        include = sysconfig.get_path("include")
        command = [compiler, str(file), f"-I{include}", "-shared", "-fPIC", *flags, "-o", f"{folder}/try.so"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    return f"it cannot compile ({first_error(done.stderr) or 'no message'})"


def first_error(output: str) -> str:
    """The first error that a compiler reports, on one line; "" without one."""
    return next((" ".join(line.split()) for line in output.splitlines() if "error:" in line), "")
