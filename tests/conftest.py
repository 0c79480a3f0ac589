"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from tests.support.server_pixels import ServerPixels

pytest_plugins = [
    "tests.support.seeds",
    "tests.support.watchdog",
    "tests.support.grouping",
    "tests.support.engine_mark",
]

# vLLM's own limits: a slow machine takes the time it takes, and what hangs the watchdog ends.
for limit in ("VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"):
    os.environ.setdefault(limit, str(24 * 3600))

# With what the processes that tests start read first.
STARTUP = str(ROOT / "tests" / "support" / "startup")
_found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if STARTUP not in _found:
    os.environ["PYTHONPATH"] = os.pathsep.join([STARTUP, *filter(None, _found)])


class Made(NamedTuple):
    """A checkpoint, and how the command that made it ended."""

    checkpoint: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def demo_made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The demo checkpoint as `vllm-hybrid demo-model` makes it, once: calibrating takes a minute."""
    out = tmp_path_factory.mktemp("demo") / "llava-hybrid"
    call = [sys.executable, "-m", "vllm_hybrid.cli", "demo-model", str(out)]
    # Memory of large tensors that were freed is used again, not given back and cleared anew.
    keeps = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
    root, env = ROOT, os.environ | keeps
    done = subprocess.run(call, cwd=root, env=env, capture_output=True, text=True, check=False)
    return Made(out, done)


@pytest.fixture(scope="session")
def demo_checkpoint(demo_made: Made) -> Path:
    """The demo checkpoint; tests must not write into it."""
    assert demo_made.done.returncode == 0, demo_made.done.stderr
    return demo_made.checkpoint


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that the plugin serves; tests must not write into it."""
    from tests.support.tiny_checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("served") / "llava")


@pytest.fixture(scope="session")
def server_pixels(llava: Path) -> ServerPixels:
    """What a server of that checkpoint makes of pictures."""
    from tests.support.server_pixels import ServerPixels

    return ServerPixels(llava)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """At least two threads, which loops share work out among; a worker of pytest-xdist has one."""
    import torch

    before = torch.get_num_threads()
    # Once an engine runs in this process, `torch.set_num_threads` does nothing.
    torch._C.set_num_threads(max(2, before))
    yield
    torch._C.set_num_threads(before)
