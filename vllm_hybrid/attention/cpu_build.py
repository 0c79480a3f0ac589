"""C++ beside the package, compiled once per machine at first use."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vllm_hybrid.environment.compilers import first_error
from vllm_hybrid.environment.faults import ADVICE
from vllm_hybrid.environment.waits import announced_wait
from vllm_hybrid.errors import one_line

# Below vLLM's, whose handler shows it.
logger = logging.getLogger(f"vllm.{__name__}")


def compile_extension(sources: Sequence[Path], name: str) -> Any:
    """Compile C++ files for this machine's CPU and import it; later calls find it built.

    Any number of processes may ask at once, and any of them may be killed while it builds. Builds lie in
    ``$TORCH_EXTENSIONS_DIR``, else in torch's own cache folder, one folder for each set of sources and flags.

    Args:
        sources: the C++ files; those they include from their own folders count as theirs.
        name: name of the module.

    Returns:
        The module.

    Raises:
        RuntimeError: there is no C++ compiler, or the sources do not compile.

    """
    compiler = _compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"the C++ compiler {compiler!r} was not found, and CPU attention needs it; install g++ or set CXX"
        )
    flags = machine_flags()
    folder = _build_folder(name, sources, [compiler, *flags])
    folder.mkdir(parents=True, exist_ok=True)
    # torch guards a build with a file that stays behind when the builder is killed, and then waits for it
    # for ever. This lock goes with its process, so whoever holds it knows that such a file is a leftover.
    # ninja is installed beside the interpreter, which need not be on PATH.
    with _locked(folder.with_suffix(".lock")), _on_path(str(Path(sys.executable).parent)):
        (folder / "lock").unlink(missing_ok=True)
        if _product(folder, name).exists():
            return _load(name, sources, flags, folder)
        with announced_wait(f"compiling {name} (C++), once per machine, which may take minutes"):
            return _load(name, sources, flags, folder)


def is_compiled(sources: Sequence[Path], name: str) -> bool:
    """Whether :func:`compile_extension` would find its module built."""
    return _product(_build_folder(name, sources, [_compiler(), *machine_flags()]), name).exists()


def _compiler() -> str:
    from torch.utils import cpp_extension

    return str(cpp_extension.get_cxx_compiler())


def _product(folder: Path, name: str) -> Path:
    """What a finished build leaves."""
    return folder / f"{name}.so"


def _load(name: str, sources: Sequence[Path], flags: list[str], folder: Path) -> Any:
    """Import an extension, built anew where it is not, or not of these sources."""
    from torch.utils import cpp_extension

    try:
        return cpp_extension.load(
            name=name,
            sources=[str(source) for source in sources],
            extra_cflags=flags,
            build_directory=str(folder),
            verbose=False,
        )
    except RuntimeError as error:
        # All that the compiler said stands in the error's cause.
        reason = first_error(str(error)) or one_line(error)
        raise RuntimeError(f"{name} could not be compiled ({reason}); {ADVICE}") from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock between processes; whoever waits for it says so."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("vllm-hybrid: waiting for another process that compiles %s", file.stem)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def machine_flags() -> list[str]:
    """Compiler flags for this machine's CPU, with the vector instructions torch itself picks."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa = pick_vec_isa()
    flags = ["-O3", "-fopenmp", "-fno-math-errno", *isa.build_arch_flags().split()]
    if "-mavx512f" in flags and torch.cpu.get_capabilities().get("avx512_bf16"):
        flags.append("-mavx512bf16")
    return flags + [f"-D{macro}" for macro in isa.build_macro()]


def _build_folder(name: str, sources: Sequence[Path], flags: list[str]) -> Path:
    """One folder for each build that differs, so that checkouts do not undo one another's."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    # The command line names the folders of headers: with others the compiler would begin anew in this folder.
    made_with = [torch.__version__, sys.version, *cpp_extension.include_paths(), *flags]
    digest = hashlib.sha256("\0".join(made_with).encode())
    headers = sorted({header for source in sources for header in source.parent.glob("*.h")})
    for file in [*sources, *headers]:
        digest.update(str(file).encode() + b"\0" + file.read_bytes())
    return Path(root) / f"{name}-{digest.hexdigest()[:16]}"


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
