"""Tables of what the check of the engines found."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.running.tables import state


def table(cells: dict[str, Any]) -> str:
    """Markdown: a line for every engine and case."""
    lines = [
        "| engine: case | merged | kept | log-probability | given the sets | tokens | |",
        "|---|---|---|--:|--:|---|---|",
    ]
    for key, cell in cells.items():
        lines.append(f"| {key} | {_differences(cell)} | {state(cell)} |")
    return "\n".join(lines)


def wrong_cases(cells: dict[str, Any]) -> dict[str, Any]:
    """The cases that do not agree."""
    return {key: cell for key, cell in cells.items() if state(cell) != "agrees"}


def _differences(cell: dict[str, Any]) -> str:
    if "logprobs" not in cell:
        return " | | | | "
    merged, kept, tokens = cell["merged"], cell["kept"], cell["tokens"]
    plain, given = cell["logprobs"], cell["logprobs_given_sets"]
    return (
        f"{_sets(merged)} | {_sets(kept)} | {plain['worst']:.1e} ({plain['median']:.1e}) | "
        f"{given['worst']:.1e} ({given['median']:.1e}) | "
        f"{tokens['not_the_likeliest']} of {tokens['count']} other"
    )


def _sets(found: dict[str, Any]) -> str:
    if not found["different"]:
        return "equal"
    return f"{found['different']} of {found['pictures']} other, up to {found['most_patches']} patches"


def verdicts(cells: dict[str, Any]) -> str:
    """One line: whether the engines answer as the reference."""
    said = {key: state(cell) for key, cell in cells.items()}
    wrong = [key for key, what in said.items() if what != "agrees"]
    if not said:
        return "check: not checked"
    return f"check: DISAGREES in {'; '.join(wrong)}" if wrong else f"check: agrees in all {len(said)} cases"
