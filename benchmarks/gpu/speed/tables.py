"""Results as Markdown: the sweep over requests in flight first, then everything else beside stock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.running.tables import head, state

Cells = dict[str, Any]
SWEPT = ("mixed", "prefill", "decode")


def check_lines(files: list[Path]) -> str:
    """What the checks of answers and kernels found, in one line.

    Args:
        files: their JSON; one that is absent counts as not checked.

    """
    said = []
    for file in files:
        cells = json.loads(file.read_text())["cells"] if file.exists() else {}
        found = {key: state(cell) for key, cell in cells.items() if not key.startswith("time: ")}
        wrong = {key: what for key, what in found.items() if _bad(what)}
        if not found:
            said.append(f"{file.stem} not checked")
        elif wrong:
            said.append(f"{file.stem} " + "; ".join(f"{what} in {key}" for key, what in wrong.items()))
        else:
            said.append(f"{file.stem} agrees in all {len(found)} cases")
    return "check: " + ("; ".join(said) or "not checked")


def _bad(what: str) -> bool:
    """Whether a case's state says that something is wrong, and not merely that it was not run."""
    return what != "agrees" and not what.startswith("not run")


def number(value: float | None, factor: float = 1e3, digits: int = 1) -> str:
    """A number in a table; nothing for None."""
    return "" if value is None else f"{value * factor:.{digits}f}"


def groups(cells: Cells) -> list[str]:
    """What stands before load and size in the keys, stock left out, in order of appearance."""
    return [g for g in dict.fromkeys(key.rsplit("/", 2)[0] for key in cells) if g != "stock"]


def title(group: str, cells: Cells) -> str:
    """A group's name for people, with the live tokens really seen."""
    kind, *rest = group.split("/")
    if kind != "hybrid":
        return kind
    means = [
        got["live_counts"]["mean"] for key, got in cells.items() if _of(key, group) and "live_counts" in got
    ]
    seen = f" ({sum(means) / len(means):.1f} seen)" if means else ""
    return f"hybrid, {rest[0]} live tokens{seen}, R = {rest[1]}"


def _of(key: str, group: str) -> bool:
    return key.rsplit("/", 2)[0] == group


def rate(got: dict[str, Any] | None) -> str:
    """Requests/s with the spread of the runs; a star where a request was preempted, a word where eager."""
    if got is None:
        return ""
    runs = got["all_requests_per_s"]
    spread = f" ({min(runs):.1f}-{max(runs):.1f})" if len(runs) > 1 else ""
    return f"{got['requests_per_s']:.2f}{spread}" + ("*" if got["preemptions"] else "") + _eager(got)


def _eager(got: dict[str, Any]) -> str:
    """The mark of a cell without compilation and graphs."""
    return " (eager)" if got.get("eager") else ""


def beside_stock(group: str, cells: Cells) -> list[str]:
    """Rows of one group beside stock's, for every load with requests/s."""
    lines = [
        "| load | requests/s | stock | ratio | TTFT, ms (p99) | stock | TPOT, ms | stock | preempted |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key, got in cells.items():
        if not _of(key, group) or "requests_per_s" not in got:
            continue
        name = "/".join(key.rsplit("/", 2)[1:])
        base = cells.get(f"stock/{name}")
        lines.append(
            f"| {name} | {rate(got)} | {rate(base)} | {_ratio(got, base)} | {_first(got)} | {_first(base)} | "
            f"{number(got['per_token_s'])} | {number(base['per_token_s']) if base else ''} | "
            f"{got['preemptions']}, {base['preemptions'] if base else ''} |"
        )
    return lines if len(lines) > 2 else []


def _ratio(got: dict[str, Any], base: dict[str, Any] | None) -> str:
    return f"{got['requests_per_s'] / base['requests_per_s']:.2f}" if base else ""


def _first(got: dict[str, Any] | None) -> str:
    return "" if got is None else f"{number(got['first_token_s'])} ({number(got['first_token_p99_s'])})"


def sweep(cells: Cells) -> list[str]:
    """The headline: requests/s over stock's by load and requests in flight, a column for each group."""
    shown = [group for group in groups(cells) if group != "transformers"]
    parts = [key.rsplit("/", 2) for key in cells]
    names = dict.fromkeys("/".join(rest) for group, *rest in parts if group in ("stock", *shown))
    swept = [n for load in SWEPT for n in names if n.startswith(f"{load}/c")]
    if not swept:
        return []
    lines = ["| load, in flight | stock, requests/s | " + " | ".join(title(g, cells) for g in shown) + " |"]
    lines.append("|---|--:|" + "--:|" * len(shown))
    for name in swept:
        base = cells.get(f"stock/{name}")
        ratios = [_swept(cells.get(f"{group}/{name}"), base) for group in shown]
        lines.append(f"| {name} | {rate(base)} | " + " | ".join(ratios) + " |")
    return lines


def _swept(got: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if got is None:
        return ""
    if base is None:
        return rate(got)
    return f"{_ratio(got, base)}x" + ("*" if got["preemptions"] else "") + _eager(got)


def memory(cells: Cells) -> list[str]:
    """What a request holds, and how many run at once."""
    base = cells.get("stock/capacity/all")
    rows = []
    for key, got in cells.items():
        if key.endswith("/capacity/all") and base is not None and got is not base:
            held, of_stock = got["kv_bytes_a_request"], base["kv_bytes_a_request"]
            rows.append(
                f"| {title(key.rsplit('/', 2)[0], cells)} | {number(held, 1e-6)} | "
                f"{number(of_stock, 1e-6)} | {of_stock / held:.2f}x | {_at_once(got)} | {_at_once(base)} |"
            )
    head = ["| | KV a request, MB | stock | less | at once | stock |", "|---|--:|--:|--:|--:|--:|"]
    return head + rows if rows else []


def _at_once(got: dict[str, Any]) -> str:
    return (">= " if got["limited_by_sent"] else "") + str(got["running_at_once"])


def engine_rows(content: dict[str, Any]) -> list[str]:
    """What each engine chose, and how long it took to start."""
    rows = []
    for name, engine in content["engines"].items():
        facts = engine.get("facts", {})
        starts = ", ".join(f"{s:.0f}" for s in engine["started_s"])
        attention = [_listed(facts.get(part, {})) for part in ("decoder_attention", "tower_attention")]
        graphs = ", ".join(facts[mode] for mode in ("compile_mode", "graph_mode") if mode in facts)
        graphs += ", tower" if facts.get("tower_graphs") else ""
        blocks = ", ".join(map(str, facts.get("block_sizes", [])))
        rows.append(f"| {name} | {starts} | {attention[0]} | {attention[1]} | {blocks} | {graphs} |")
    head = [
        "| engine | starts, s | decoder attention | tower attention | blocks | compile, graphs |",
        "|---|--:|---|---|---|---|",
    ]
    return head + rows if rows else []


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(counts)


def failure_lines(content: dict[str, Any]) -> list[str]:
    """Everything that failed, a line each."""
    return [
        f"- FAILED {name} ({failure['times']}x): {failure['error']}"
        for name, failure in content["failures"].items()
    ]


def report(content: dict[str, Any], check: str, short: bool) -> str:
    """All tables of a results file.

    Args:
        content: of the file.
        check: what the checks found, see :func:`check_lines`.
        short: only what fits on a screen: the sweep, memory, engines, failures.

    """
    cells: Cells = content["cells"]
    parts: list[list[str]] = [[head(content), "", check], sweep(cells), memory(cells), engine_rows(content)]
    if not short:
        for group in groups(cells):
            if rows := beside_stock(group, cells):
                parts.append([f"{title(group, cells)}:", "", *rows])
    parts.append(failure_lines(content))
    notes = []
    if any(got.get("preemptions") and "requests_per_s" in got for got in cells.values()):
        notes.append("\\* requests were preempted")
    unseen = [k for k, got in cells.items() if got.get("pictures_encoded", _sent(got)) < _sent(got)]
    if unseen:
        notes.append(f"pictures came from a cache in {', '.join(unseen)}")
    parts.append(notes)
    return "\n\n".join("\n".join(part) for part in parts if part)


def _sent(got: dict[str, Any]) -> int:
    """Pictures that a cell's timed runs sent."""
    return got["requests"] * len(got["all_requests_per_s"]) if "requests" in got else 0
