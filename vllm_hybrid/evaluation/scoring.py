"""Scores of answers against references, from 0 to 100 (CIDEr to 1000), as VLMEvalKit computes them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
from collections.abc import Sequence

from vllm_hybrid.evaluation.tsv import Data
from vllm_hybrid.evaluation.vqa_text import plain

CAPTIONS = ("bleu", "rouge", "cider")
METRICS = (*CAPTIONS, "exact", "vqa")


def choose_metrics(data: Data, wanted: str | None) -> tuple[str, ...]:
    """What to score by.

    Args:
        data: what is asked.
        wanted: names from `METRICS` with commas; None for what suits the data.

    Raises:
        ValueError: an unknown name, or one that the data's answers do not allow.

    """
    several = sum(len(row.references) > 1 for row in data.rows)
    if wanted is None:
        return (("exact", "vqa") if 2 * several > len(data.rows) else ("exact",)) if data.asks else CAPTIONS
    chosen = tuple(dict.fromkeys(name.strip() for name in wanted.split(",")))
    unknown = [name for name in chosen if name not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    if "vqa" in chosen and not several:
        raise ValueError(
            f"the VQA score compares answers of several people; {data.file} has only one to each question"
        )
    return chosen


def require_libraries(metrics: Sequence[str]) -> None:
    """See that what asking and scoring need is installed, before an hour of asking.

    Args:
        metrics: see `METRICS`.

    Raises:
        ValueError: it is not.

    """
    needed = ["openai", *(["pycocoevalcap"] if set(metrics) & set(CAPTIONS) else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"this needs {' and '.join(missing)}; install vllm-hybrid with its extra: vllm-hybrid[eval]"
        )


def score(
    metrics: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score answers.

    Args:
        metrics: see `METRICS`.
        answers: at least one.
        references: the right answers to each.

    Returns:
        Scores by their usual names. The VQA score is that of the rows with several right answers, and is
        left out where no row has them.

    """
    scores: dict[str, float] = {}
    captions = [name for name in CAPTIONS if name in metrics]
    if captions:
        scores |= score_captions(captions, answers, references)
    if "exact" in metrics:
        scores["Exact match"] = 100 * statistics.fmean(map(exact_match, answers, references))
    several = [
        vqa_score(answer, texts) for answer, texts in zip(answers, references, strict=True) if len(texts) > 1
    ]
    if "vqa" in metrics and several:
        scores["VQA score"] = 100 * statistics.fmean(several)
    return scores


def score_captions(
    metrics: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Bleu-1 to Bleu-4, ROUGE-L, CIDEr of captions split at spaces, as VLMEvalKit does.

    The programs of the COCO caption challenge first take captions apart by a tokenizer in Java, which changes
    all scores: compare with scores of the same kind only.

    Args:
        metrics: of `CAPTIONS`.
        answers: see `score`.
        references: see `score`.

    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {str(at): [answer] for at, answer in enumerate(answers)}
    right = {str(at): list(texts) for at, texts in enumerate(references)}
    scores: dict[str, float] = {}
    # Bleu prints what it counts.
    with contextlib.redirect_stdout(io.StringIO()):
        if "bleu" in metrics:
            for n, value in enumerate(Bleu(4).compute_score(right, given)[0], 1):
                scores[f"Bleu-{n}"] = 100 * float(value)
        if "rouge" in metrics:
            scores["ROUGE-L"] = 100 * float(Rouge().compute_score(right, given)[0])
        if "cider" in metrics:
            scores["CIDEr"] = 100 * float(Cider().compute_score(right, given)[0])
    return scores


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references but for case and white space around it, else 0."""
    return float(answer.strip().lower() in {text.strip().lower() for text in references})


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """The VQA score (arXiv 1505.00468): right as far as three people said so, on average with one left out.

    Args:
        answer: is compared as `vqa_text.plain` reads it.
        references: one person's answer each.

    """
    given = plain(answer)
    agree = [plain(text) == given for text in references]
    return statistics.fmean(min(1.0, (sum(agree) - own) / 3) for own in agree)
