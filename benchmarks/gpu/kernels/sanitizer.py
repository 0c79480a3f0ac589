"""NVIDIA's compute-sanitizer on small scenes of the kernels, and what it found."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.running.processes import Measuring, ProcessFailed

# Options of each tool. Torch asks CUDA for what may be missing, which is no fault of the kernels.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "initcheck": []}
# Where CUDA's tools lie when they are not on the PATH.
INSTALLED = "/usr/local/cuda/bin/compute-sanitizer"
# A tool that takes longer hangs.
MOST_S = 180
# Every allocation by itself, so that an access behind one is outside of all.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def program() -> str | None:
    """The sanitizer's path, None where it is not installed."""
    return shutil.which("compute-sanitizer") or shutil.which(INSTALLED)


def sanitize(tool: str, script: Path, seed: int, log: Path, deadline: float) -> dict[str, Any]:
    """Run the small scenes under a tool.

    Args:
        tool: one of TOOLS.
        script: run.py.
        seed: of the scenes.
        log: for what the process says; what the tool says comes beside it.
        deadline: seconds since the epoch.

    Returns:
        ``absent`` with the reason; or ``failed`` with it; or :func:`findings` and what the scenes' check
        said.

    Raises:
        ProcessFailed: the deadline came first.

    """
    found = program()
    if found is None:
        return {"absent": "compute-sanitizer is not installed"}
    report = log.with_name(f"{tool}-report.log")
    report.unlink(missing_ok=True)
    command = [found, "--tool", tool, "--log-file", str(report), "--launch-timeout", "120"]
    command += ["--target-processes", "application-only", "--print-limit", "1000", *TOOLS[tool]]
    child = Measuring([*command, sys.executable, str(script), "--sanitized", str(seed)], log, ENVIRONMENT)
    ran: dict[str, Any] = {}
    until = min(deadline, time.time() + MOST_S)
    try:
        while (message := child.next(until)) is not None:
            ran |= message
    except ProcessFailed as failure:
        if time.time() >= deadline:
            raise
        ran["failed"] = str(failure)
    finally:
        child.end()
    if report.exists():
        ran |= findings(report.read_text(errors="replace"))
    if "agrees" in ran and "scenes_agree" in ran:
        ran["agrees"]["scenes"] = ran["scenes_agree"]
    else:
        ran.setdefault("failed", f"{tool} gave no verdict; see {report}")
    return ran


def findings(report: str) -> dict[str, Any]:
    """What a tool's report says.

    Returns:
        ``findings``, how many errors it counted; ``kernels``, in which kernels the printed ones lie;
        ``first``, what the first says; ``agrees``, whether there are none. Nothing where the report has no
        summary.

    """
    summary = re.search(r"ERROR SUMMARY: (\d+) error", report)
    if summary is None:
        return {}
    lines = [line.removeprefix("=========").strip() for line in report.splitlines()]
    places = Counter(m[1] for line in lines if (m := re.match(r"at (\w[\w:]*)", line)))
    errors = [line for line in lines if re.match(r"(Invalid|Uninitialized|Program hit|Misaligned)", line)]
    count = int(summary[1])
    return {
        "findings": count,
        "kernels": dict(places),
        "first": errors[0] if errors else "",
        "agrees": {"memory": count == 0},
    }
