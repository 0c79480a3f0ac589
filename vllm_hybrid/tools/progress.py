"""How the command shows that long work goes on, and what it tells on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Called as progress(stage, items done, items).
Progress = Callable[[str, int, int], None]


class Notice(UserWarning):
    """A warning for whoever uses the command, as opposed to those of libraries to programmers."""


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on standard error, from the first report until an error; notices are lines above it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    bar = Bar(*columns, console=console)
    stop = bar.stop

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, Notice):
            # File names may hold brackets, and one notice is one line, however long.
            text = f"vllm-hybrid: warning: {message}"
            console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def report(stage: str, done: int, total: int) -> None:
        bar.start()
        name = stage.partition(",")[0]
        if name not in tasks or bar.tasks[tasks[name]].finished:
            tasks[name] = bar.add_task(name, total=total)
        bar.update(tasks[name], completed=done, total=total)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = tell
        try:
            yield report
        except Exception:
            # The error is all there is to read.
            bar.live.transient = True
            stop = bar.live.stop
            raise
        finally:
            # Stopping a bar that never started would print an empty line.
            if tasks:
                stop()
