"""Results of all stages in a few small files, written anew whenever something was added."""

from __future__ import annotations

import io
import shutil
import tarfile
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

STAGES_FILES = ("smoke", "kernels", "checking", "speed", "profile")
LOG_BYTES = 400_000
EVERY_S = 15.0


def pack_logs(work: Path, target: Path) -> None:
    """The ends of all logs in one archive.

    Args:
        work: folder in whose depths they lie.
        target: the archive.

    """
    with tarfile.open(target, "w:gz") as archive:
        for log in sorted(work.rglob("*.log")):
            content = log.read_bytes()[-LOG_BYTES:]
            entry = tarfile.TarInfo(str(log.relative_to(work)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def pack_traces(folder: Path, target: Path) -> None:
    """The traces of the profiled steps, which are compressed already, in one archive."""
    # What the profiler wrote itself, such as a warm-up's, has the rank in its name.
    traces = [file for file in sorted(folder.glob("*.json.gz")) if "_rank" not in file.name]
    if traces:
        with tarfile.open(target, "w") as archive:
            for trace in traces:
                archive.add(trace, trace.name)


def take_back(work: Path, folders: Iterable[Path]) -> None:
    """Put results that an earlier machine published where stages go on with them.

    Args:
        work: folder of the stages; what it holds already stays.
        folders: with published results, the first that has one counts.

    """
    for folder in folders:
        for name in STAGES_FILES:
            file, published = work / f"{name}.json", folder / f"{name}.json"
            if published.exists() and not file.exists():
                _replace(file, published.read_bytes())
        traces = folder / "traces.tar"
        if traces.exists() and not (work / "traces").exists():
            with tarfile.open(traces) as archive:
                archive.extractall(work / "traces", filter="data")


class Publisher:
    """Keeps a folder of results, and a copy of it, up to date.

    Args:
        work: folder with the stages' JSON, logs and traces.
        out: folder of the results.
        copy: another folder with the same, None for none.
        tables: gives all tables as text.

    """

    def __init__(self, work: Path, out: Path, copy: Path | None, tables: Callable[[], str]) -> None:
        self.work = work
        self.folders = [out, *([copy] if copy else [])]
        self.tables = tables
        self._lock = threading.Lock()
        self._over = threading.Event()
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)

    def results(self) -> None:
        """Copy every JSON and write the tables."""
        with self._lock:
            files = [file for name in STAGES_FILES if (file := self.work / f"{name}.json").exists()]
            for folder in self.folders:
                for file in files:
                    _replace(folder / file.name, file.read_bytes())
            text = self.tables() + "\n"
            for folder in self.folders:
                _replace(folder / "tables.md", text.encode())

    def everything(self) -> None:
        """Results, logs and traces."""
        self.results()
        with self._lock:
            pack_logs(self.work, self.work / "logs.tar.gz")
            pack_traces(self.work / "traces", self.work / "traces.tar")
            for name in ("logs.tar.gz", "traces.tar"):
                if (self.work / name).exists():
                    for folder in self.folders:
                        shutil.copyfile(self.work / name, folder / name)

    def keep_going(self) -> None:
        """Write results every EVERY_S seconds from here on, until :meth:`stop`."""

        def write() -> None:
            while not self._over.wait(EVERY_S):
                # One file that cannot be written or shown does not keep later results from it.
                try:
                    self.results()
                except Exception:
                    traceback.print_exc()

        threading.Thread(target=write, daemon=True).start()

    def stop(self) -> None:
        """No further results from the background."""
        self._over.set()


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def sizes(folders: Iterable[Path]) -> str:
    """Names and sizes of the files in folders, one line."""
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    return ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in files)
