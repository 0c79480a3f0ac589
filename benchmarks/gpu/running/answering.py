"""The side of a measuring process: questions come as lines of JSON, answers go as such lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.running.processes import ANSWER


class Answers:
    """Keeps standard output for answers: what libraries print there goes to standard error from here on."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(self, message: dict[str, Any]) -> None:
        """Send one answer."""
        self._file.write(ANSWER + json.dumps(message) + "\n")
        self._file.flush()


def questions() -> Iterator[dict[str, Any]]:
    """What is asked, until standard input is closed."""
    for line in sys.stdin:
        yield json.loads(line)
