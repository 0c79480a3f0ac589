"""Code in a Python process of its own, which says what it found in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


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
