"""Results of a run: one JSON file, on disk after every entry, that a later run goes on with."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.running import facts

# Another machine with the same card may have another driver, or a few bytes less.
IDENTITY = ("name", "kind")


def begin(file: Path, on_cpu: bool, commit: str | None, /, **same: Any) -> Results:
    """The results of this process's command, begun or gone on with.

    Args:
        file: where they are kept.
        on_cpu: whether a toy run on a CPU is asked for.
        commit: of the sources, where they are not a checkout.
        same: what has to be the same besides device and versions.

    Raises:
        RuntimeError: there is no device, or the file was made on another one or with other versions.

    """
    known = {"device": facts.device(on_cpu), "versions": facts.versions(), **same}
    results = Results(file, known, " ".join(["python", *sys.argv]))
    results.content["commit"] = commit or facts.commit()
    results.save()
    return results


class Results:
    """Everything measured so far.

    Args:
        file: where it is kept; what it holds is not measured again.
        same: what has to be the same for a run to go on: device, versions, scale. Of a device that is its
            name and kind; its driver and memory are noted for every call.
        command: the command line, noted with the date.

    Raises:
        RuntimeError: the file was made on another device or with other versions.

    """

    def __init__(self, file: Path, same: dict[str, Any], command: str) -> None:
        self.file = file
        self.content: dict[str, Any] = {**same, "commands": [], "engines": {}, "cells": {}, "failures": {}}
        if file.exists():
            old = json.loads(file.read_text())
            for key, value in same.items():
                if _identity(old.get(key)) != _identity(value):
                    raise RuntimeError(
                        f"{file} was measured with {key} {old.get(key)}, this is {value}; give another --out"
                    )
            self.content |= old | same
        noted = {"device": same["device"]} if "device" in same else {}
        self.content["commands"].append({"command": command, "date": date.today().isoformat(), **noted})
        self.save()

    @property
    def cells(self) -> dict[str, Any]:
        """Results by cell."""
        return self.content["cells"]

    @property
    def engines(self) -> dict[str, Any]:
        """What every engine that started said of itself."""
        return self.content["engines"]

    @property
    def failures(self) -> dict[str, Any]:
        """By cell or engine: the last error, and how often it failed."""
        return self.content["failures"]

    def failed(self, key: str, error: str) -> None:
        """Note that something failed; that it did before is counted."""
        times = self.failures.get(key, {}).get("times", 0) + 1
        self.failures[key] = {"error": error, "times": times}
        self.save()

    def save(self) -> None:
        """Write the file, so that it is whole whenever somebody reads it."""
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.file)


def _identity(fact: Any) -> Any:
    """What of a fact tells one machine from another: a device's name and kind, anything else whole."""
    return {name: fact[name] for name in IDENTITY} if isinstance(fact, dict) and "kind" in fact else fact
