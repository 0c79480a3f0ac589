"""Lower and upper stack are compiled apart, and find their own graphs again in vLLM's compile cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def errors(cache: Path) -> dict[str, float]:
    """What tests/compiled_stacks.py prints, in a process of its own over a compile cache."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_stacks"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "VLLM_CACHE_ROOT": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            # Compiled ahead of time, graphs are found by their source; otherwise by the stack's tag.
            "VLLM_USE_AOT_COMPILE": "0",
        },
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ERRORS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ERRORS "))


def test_two_stacks_share_no_compiled_graph(tmp_path: Path) -> None:
    for start in ("cold", "warm"):
        found = errors(tmp_path)
        assert all(error < 1e-4 for error in found.values()), (start, found)
