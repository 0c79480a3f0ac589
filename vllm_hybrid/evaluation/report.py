"""What an evaluation found, for readers and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_hybrid.evaluation.left_out import BAD_PICTURE, merged, sentences
from vllm_hybrid.evaluation.predictions import Prediction
from vllm_hybrid.evaluation.scoring import score
from vllm_hybrid.evaluation.tsv import Data, Row

# How much is shown of what went wrong with a row; the report has all of it.
LONGEST_REASON = 200


@dataclass(frozen=True)
class Side:
    """One model and its answers, at one detail where it was asked at several.

    Attributes:
        name: the model's and the detail's, for readers.
        answered: its answers by index.
        failed: what went wrong with rows that have none.
        settings: what the answers depend on.
        unreadable: what is wrong with the pictures of rows that were not asked, by index.

    """

    name: str
    answered: Mapping[str, Prediction]
    failed: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)


def make_report(
    data: Data, rows: Sequence[Row], sides: Sequence[Side], metrics: Sequence[str]
) -> dict[str, Any]:
    """Score one side, or compare several, on the rows that all of them answered.

    Args:
        data: what was asked.
        rows: those that were to be answered.
        sides: one or more. Two are compared score by score; of more than two each says how many of its
            answers are the first one's.
        metrics: see `scoring.METRICS`.

    Returns:
        Plain values, for JSON.

    Raises:
        ValueError: there is no such row.

    """
    bad = {index: why for side in sides for index, why in side.unreadable.items()}
    asked = [row for row in rows if row.index not in bad]
    left_out = merged(data.left_out, {BAD_PICTURE: _named(bad)} if bad else {})
    common = [row for row in asked if all(row.index in side.answered for side in sides)]
    if not common:
        reasons = "".join(f"; {sentence}" for sentence in sentences(left_out))
        raise ValueError(f"none of the {len(asked)} rows got an answer{_first_failure(sides)}{reasons}")
    references = [row.references for row in common]
    answers = [[side.answered[row.index] for row in common] for side in sides]
    report: dict[str, Any] = {
        "data": str(data.file),
        "rows": len(asked),
        "scored": len(common),
        "left_out": left_out,
        "single_answers": sum(len(texts) == 1 for texts in references) if "vqa" in metrics else 0,
        "models": [
            {
                "name": side.name,
                "scores": score(metrics, [one.prediction for one in given], references),
                "cut": sum(one.finish_reason == "length" for one in given),
                "failed": dict(side.failed),
                "settings": dict(side.settings),
            }
            for side, given in zip(sides, answers, strict=True)
        ],
    }
    if len(sides) == 2:
        first, second = (model["scores"] for model in report["models"])
        report["difference"] = {name: second[name] - first[name] for name in first}
        report["same_answers"] = _same(*answers)
    elif len(sides) > 2:
        for model, given in zip(report["models"], answers, strict=True):
            model["same_answers"] = _same(answers[0], given)
    return report


def _same(first: Sequence[Prediction], second: Sequence[Prediction]) -> float:
    """The share of answers that are the same to the letter, from 0 to 100."""
    same = sum(a.prediction == b.prediction for a, b in zip(first, second, strict=True))
    return 100 * same / len(first)


def as_table(report: Mapping[str, Any]) -> str:
    """The scores as lines: a row for each score, a column for each side."""
    models = report["models"]
    lines = [["", *(model["name"] for model in models)]]
    for name in models[0]["scores"]:
        lines.append([name, *(f"{model['scores'][name]:.2f}" for model in models)])
    if "difference" in report:
        lines[0].append("difference")
        for line in lines[1:]:
            line.append(f"{report['difference'][line[0]]:+.2f}")
        lines.append(["same answers", "", f"{report['same_answers']:.1f}%", ""])
    elif len(models) > 2:
        shares = [f"{model['same_answers']:.1f}%" for model in models]
        lines.append([f"same answers as {models[0]['name']}", *shares])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def notes(report: Mapping[str, Any], max_tokens: int) -> list[str]:
    """What a reader of the scores must know: rows that are missing, answers that were cut."""
    found = [f"{report['scored']} of {report['rows']} rows of {report['data']} are scored"]
    found += sentences(report["left_out"])
    if report["single_answers"]:
        found.append(f"the VQA score leaves out rows with a single right answer: {report['single_answers']}")
    for model in report["models"]:
        if model["failed"]:
            index, reason = next(iter(model["failed"].items()))
            found.append(
                f"without an answer from {model['name']}: {len(model['failed'])}, such as row {index} "
                f"({reason[:LONGEST_REASON]}); run again to ask again"
            )
        if model["cut"]:
            found.append(f"answers of {model['name']} cut at {max_tokens} tokens: {model['cut']}")
    return found


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        line[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
    ]
    return "  ".join(cells).rstrip()


def _named(bad: Mapping[str, str]) -> list[str]:
    return [f"row {index} ({why[:LONGEST_REASON]})" for index, why in bad.items()]


def _first_failure(sides: Sequence[Side]) -> str:
    reasons = [f"; row {index}: {reason}" for side in sides for index, reason in side.failed.items()]
    return reasons[0] if reasons else ""
