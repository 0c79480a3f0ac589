"""Code in a Python process of its own, which says what it found in a line of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.paths import ROOT


def found_by(code: str, marker: str, *arguments: str) -> tuple[Any, str]:
    """Run code and read what it prints as JSON behind a marker.

    Args:
        code: Python code.
        marker: how its line begins.
        arguments: its command line.

    Returns:
        What the line holds, and all that the process printed.

    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(marker)]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix(marker)), done.stdout + done.stderr


def answers_of(module: str, marker: str, works: list[Any]) -> list[Any]:
    """Run a module that reads works as JSON and prints the answer of each as JSON behind a marker.

    Args:
        module: its name.
        marker: how its lines begin.
        works: what it is to do.

    Returns:
        An answer for each work.

    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(works),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(marker)]
    assert len(lines) == len(works), done.stderr[-3000:]
    return [json.loads(line.removeprefix(marker)) for line in lines]
