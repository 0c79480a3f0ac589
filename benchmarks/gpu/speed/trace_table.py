"""A torch profiler trace as a table: which kernels took the time, launches, and waits of the host."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
LAUNCH, GRAPH_LAUNCH, WAIT = "LaunchKernel", "GraphLaunch", "Synchronize"
TOP = 25
LONGEST_NAME = 90


def read_trace(file: Path) -> list[dict[str, Any]]:
    """Events of a Chrome trace, gzipped or not, that have a duration."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]


def summarise(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Where the time of a trace went.

    Args:
        events: of :func:`read_trace`.

    Returns:
        ``device``: whether there are device events; without them CPU operators take their place. ``busy_s``,
        ``span_s``: seconds that kernels ran in sum, and from the first one's begin to the last one's end.
        ``top``: name, calls and seconds of the TOP longest. ``launches``, ``graph_launches``: calls of the
        host. ``waits``: name, calls and seconds of what the host waited in.

    """
    events = list(events)
    on_device = [event for event in events if event.get("cat") in ON_DEVICE]
    shown = on_device or [event for event in events if event.get("cat") == "cpu_op"]
    calls = [event for event in events if event.get("cat") in CALLS]
    ends = [event["ts"] + event["dur"] for event in shown]
    return {
        "device": bool(on_device),
        "busy_s": sum(event["dur"] for event in shown) / 1e6,
        "span_s": (max(ends) - min(event["ts"] for event in shown)) / 1e6 if shown else 0.0,
        "top": _by_name(shown)[:TOP],
        "launches": sum(LAUNCH in event["name"] for event in calls),
        "graph_launches": sum(GRAPH_LAUNCH in event["name"] for event in calls),
        "waits": _by_name([event for event in calls if WAIT in event["name"]]),
    }


def _by_name(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls and seconds by name, the longest first."""
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        name = event["name"]
        seconds[name] = seconds.get(name, 0.0) + event["dur"] / 1e6
        calls[name] = calls.get(name, 0) + 1
    order = sorted(seconds, key=lambda name: -seconds[name])
    return [{"name": name, "calls": calls[name], "seconds": seconds[name]} for name in order]


def table(found: dict[str, Any], rows: int = TOP) -> str:
    """Markdown of :func:`summarise`.

    Args:
        found: one trace; with ``steps``, how many it holds, times are also given for one of them.
        rows: how many of the longest kernels to show.

    """
    what = "kernel" if found["device"] else "CPU operator (no device in this trace)"
    waits = ", ".join(f"{w['calls']} x {w['name']} ({w['seconds'] * 1e3:.2f} ms)" for w in found["waits"])
    steps = found.get("steps", 1)
    lines = [
        f"{steps} step{'s' if steps > 1 else ''}, each {found['span_s'] * 1e3 / steps:.2f} ms, of which busy "
        f"{found['busy_s'] * 1e3 / steps:.2f} ms; in all "
        f"busy {found['busy_s'] * 1e3:.2f} ms of {found['span_s'] * 1e3:.2f} ms; {found['launches']} "
        f"launches, {found['graph_launches']} graph launches; the host waited in: {waits or 'nothing'}",
        "",
        f"| {what} | calls | ms | share |",
        "|---|--:|--:|--:|",
    ]
    for row in found["top"][:rows]:
        share = row["seconds"] / found["busy_s"] if found["busy_s"] else 0.0
        name = row["name"][:LONGEST_NAME].replace("|", "/")
        lines.append(f"| {name} | {row['calls']} | {row['seconds'] * 1e3:.3f} | {share:.1%} |")
    return "\n".join(lines)
