"""Python code in a fresh interpreter of this environment: what it finds no import here has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from vllm_hybrid.errors import last_line, one_line

_MARK = "DOCTOR "


@dataclass(frozen=True)
class Ran:
    """What a program said.

    Attributes:
        result: what it found; None if it failed.
        error: the last line of its errors if it failed, else "".

    """

    result: Any
    error: str


def run(code: str, *arguments: str) -> Ran:
    """Run code that ends in a call of ``found`` with something that JSON has.

    Args:
        code: Python code.
        arguments: its ``sys.argv[1:]``.

    """
    program = f"import json, sys\ndef found(x): print('{_MARK}' + json.dumps(x), flush=True)\n{code}"
    try:
        # -P: a folder called torch in the current one is no library.
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return Ran(None, one_line(error))
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return Ran(json.loads(line.removeprefix(_MARK)), "")
    return Ran(None, last_line(done.stderr) or f"it ended with status {done.returncode}")
