"""Where training is: the folder that holds its checkpoint and log, so that it can go on after an end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout


class StateFolder:
    """A folder with ``state.pt`` and ``log.txt``."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)

    def claim(self) -> None:
        """Keep other runs out until this process ends.

        Raises:
            ValueError: another run trains there.

        """
        lock = FileLock(self.path / "lock", is_singleton=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run trains in {self.path}; end it first") from None
        self._lock = lock

    def load(self) -> dict[str, Any] | None:
        """What was saved last, None before the first time."""
        file = self.path / "state.pt"
        # Optimizers' states are more than tensors, and the file is this program's own.
        return torch.load(file, weights_only=False) if file.exists() else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was saved; whoever reads or ends this meanwhile finds one or the other, complete."""
        partial = self.path / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.path / "state.pt")

    def log(self, line: str) -> None:
        """Add a line with the time to the log."""
        with (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
