"""Tables of what was found about the kernels."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.running.tables import state


def table(cells: dict[str, Any]) -> str:
    """Markdown: the check of every scene, then the times of every kernel, marked where a check disagrees."""
    return "\n\n".join(filter(None, [checks_table(cells), times_table(cells)]))


def checks_table(cells: dict[str, Any]) -> str:
    """Markdown: the check of every scene, and what a sanitizer found."""
    checks = {key: cell for key, cell in cells.items() if not key.startswith("time: ")}
    lines = ["| check | off by | worst row | second run | |", "|---|--:|--:|---|---|"]
    for key, cell in checks.items():
        lines.append(f"| {key.removeprefix('check: ')} | {_off(cell)} | {state(cell)} |")
    return "\n".join(lines) if checks else ""


def times_table(cells: dict[str, Any]) -> str:
    """Markdown: the device's ceilings, the time of every kernel beside its floor, and what failed."""
    lines = []
    if "bytes_per_s" in (found := cells.get("time: ceilings", {})):
        lines.append(
            f"Ceilings here: a copy moves {found['bytes_per_s'] / 1e12:.2f} TB/s, a large product in "
        )
        lines[-1] += f"bf16 runs at {found['flops_per_s'] / 1e12:.0f} TFLOP/s."
    rows = [row for cell in cells.values() for row in cell.get("kernels", []) if isinstance(row, dict)]
    failed = {key: cell for key, cell in cells.items() if key.startswith("time: ") and "failed" in cell}
    if not rows and not failed:
        return "\n".join(lines)
    lines += [
        *([""] if lines else []),
        "| kernel | requests, images | live tokens of each | time, us | floor, us | times floor |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in rows:
        step = " (decode step)" if row["kernel"] == "key_index" and row["decodes"] else ""
        lines.append(
            f"| {row['kernel']}{step} | {row['requests']} | {row['live']} | {row['seconds'] * 1e6:.1f} | "
            f"{row['floor_s'] * 1e6:.2f} | {row['seconds'] / row['floor_s']:.1f} |"
        )
    lines += [f"| {key} | | | {state(cell)} | | |" for key, cell in failed.items()]
    return "\n".join(lines)


def _off(cell: dict[str, Any]) -> str:
    if "errors" in cell:
        worst, row = max(cell["errors"].values()), max(cell["row_errors"].values())
        return f"{worst:.1e} | {row:.1e} | {'same bits' if cell['agrees']['bits'] else 'OTHER BITS'}"
    if "findings" in cell:
        return f"{cell['findings']} findings {cell['first']} | | "
    return " | | "


def verdicts(cells: dict[str, Any]) -> str:
    """One line: whether the kernels that were timed are right."""
    checks = {key: state(cell) for key, cell in cells.items() if key.startswith("check: ")}
    wrong = [key.removeprefix("check: ") for key, said in checks.items() if said != "agrees"]
    if not checks:
        return "check: not checked"
    return (
        f"check: DISAGREES in {'; '.join(wrong)}" if wrong else f"check: agrees in all {len(checks)} scenes"
    )
