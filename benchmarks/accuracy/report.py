"""The results as a table, a plot and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cases import BLANK, FULL, OFFLINE, SERVER
from benchmarks.accuracy.questions import Asked, counts, difference, shares

Result = dict[str, Any]


def result(asked: list[Asked], answers: list[str], full: list[str]) -> Result:
    """Figures of one configuration's answers beside the served full model's."""
    gain, half = difference(asked, answers, full)
    same = sum(map(str.__eq__, answers, full)) / len(full)
    return {"shares": shares(asked, answers), "gain": gain, "gain_half_interval": half, "same_as_full": same}


def table(results: Sequence[Result], asked: list[Asked]) -> str:
    """Markdown: a line per configuration, in percent; what is served first."""
    questions = counts(asked)
    heads = [
        "image tokens",
        "setting",
        "live",
        "kept",
        *(f"{task} ({n})" for task, n in questions.items()),
        "against full",
    ]
    lines = [line(heads), line(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for each in sorted(results, key=lambda each: [SERVER, OFFLINE].index(each["where"])):
        name = f"{each['name']}, offline" if each["where"] == OFFLINE else each["name"]
        cells = [f"{100 * each['shares'][task]:.1f}" for task in questions]
        gain = f"{100 * each['gain']:+.1f} ± {100 * each['gain_half_interval']:.1f}"
        lines.append(line([each["family"], name, f"{each['live']:.0f}", f"{each['kept']:.0f}", *cells, gain]))
    return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def summary(results: Sequence[Result], asked: list[Asked], dtype: str) -> str:
    """What was asked, and how far the two ways to answer agree."""
    pictures = len({question.picture for question in asked})
    text = f"{pictures} pictures, {len(asked)} questions, served in {dtype}."
    same = [r["same_as_full"] for r in results if r["family"] == FULL and r["where"] == OFFLINE]
    if same:
        text += f" Served and offline, the full model gave the same answer to {100 * same[0]:.1f}% of them."
    return text


def tokens_per_layer(found: Result, fastv_layer: int, layers: int) -> float:
    """Image tokens that a decoder layer computes, on average over the layers."""
    return (fastv_layer * found["live"] + (layers - fastv_layer) * found["kept"]) / layers


def plot(results: Sequence[Result], fastv_layer: int, layers: int, file: Path) -> None:
    """Headline share against the tokens of a layer, a line per family; served ones are drawn through."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for family, where in dict.fromkeys((r["family"], r["where"]) for r in results):
        if family in (FULL, BLANK):
            continue
        points = sorted(
            (tokens_per_layer(r, fastv_layer, layers), 100 * r["shares"]["headline"])
            for r in results
            if (r["family"], r["where"]) == (family, where)
        )
        style = "o-" if where == SERVER else "s--"
        label = family if where == SERVER else f"{family} (offline)"
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
    for each in results:
        if (each["family"], each["where"]) in ((FULL, SERVER), (BLANK, OFFLINE)):
            height = 100 * each["shares"]["headline"]
            axes.axhline(height, color="grey", linestyle=":", linewidth=1)
            axes.annotate(
                each["family"], (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
    axes.set(xlabel="image tokens in a decoder layer, on average", ylabel="exact answers, headline tasks, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def insert(page: str, found: str, mark: str = "table") -> str:
    """The page with what stands between two marks replaced.

    Raises:
        ValueError: it has no such marks.

    """
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page lacks {first!r} or, behind it, {last!r}")
    return f"{before}{first}\n\n{found}\n\n{last}{after}"
