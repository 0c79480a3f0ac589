"""How the command shows that long work goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error that appears with the first report; warnings become lines below it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    bar = Progress(*columns, console=console)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)

        def report(stage: str, done: int, total: int) -> None:
            bar.start()
            name = stage.partition(",")[0]
            if name not in tasks or bar.tasks[tasks[name]].finished:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        try:
            yield report
        finally:
            # Stopping a bar that never started would print an empty line.
            if tasks:
                bar.stop()
    for warning in raised:
        if warning.category is UserWarning:
            console.print(f"vllm-hybrid: warning: {warning.message}", style=None, highlight=False)
