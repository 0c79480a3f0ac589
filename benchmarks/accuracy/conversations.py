"""Which position is to rank an image's tokens in a conversation: right answers, a table for docs/accuracy.md.

FastV may rank a picture by the last position of the prompt (`prompt_end`: anew in each turn, by the question
of that turn) or by the first answer's beginning (`turn_end`: once, by the first question). Later questions
here ask for other things than the first one did. They are answered twice:

- Offline, by transformers, each as a question of its own, which is what the embedded model was trained on,
  but with the image tokens that its own end chooses, or the first question's. Image tokens stand before all
  text, so those that the first question chooses are those that every later turn would have.
- By `vllm serve`, in real conversations with right answers as history. The model was never trained on them,
  so the full model is asked first, and others only where --served-ratios names them.

A run that was cut off goes on with the configurations that are left.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.cases import Found, Setup  # noqa: E402
from benchmarks.accuracy.questions import (  # noqa: E402
    Asked,
    after,
    counts,
    difference,
    held_out,
    right,
    shares,
)
from benchmarks.accuracy.report import insert, line  # noqa: E402
from benchmarks.accuracy.settings import PRUNED, Setting  # noqa: E402
from tools.demo_training.measure import HEADLINE  # noqa: E402
from tools.demo_training.questions import TASKS  # noqa: E402
from vllm_hybrid.config import FASTV_RANKS, PROMPT_END, TURN_END  # noqa: E402
from vllm_hybrid.levels import FULL  # noqa: E402
from vllm_hybrid.tools.journal import Journal  # noqa: E402

MARK = "conversations"
# First questions of a picture, and turns behind one in a real conversation.
FIRSTS, LATER_TURNS = 3, 2
# Of which later questions the ranks are compared: the tasks, and whether the thing has to be there ("No" is
# right for an absent one whatever was dropped). Counts and captions need all things at once.
COMPARED = {
    "headline": (HEADLINE, False),
    "headline, things that are there": (HEADLINE, True),
    "count and caption": (("count", "caption"), False),
}


@dataclass(frozen=True)
class Talk:
    """A first question about one thing of a picture, and all that ask for something else there."""

    first: Asked
    others: tuple[Asked, ...]

    def turns(self, tokenizer: Any) -> list[Asked]:
        """A real conversation: the first question and two others, of different tasks if there are such."""
        chosen: list[Asked] = []
        while len(chosen) < min(LATER_TURNS, len(self.others)):
            left = [other for other in self.others if other not in chosen]
            tasks = {each.task for each in (self.first, *chosen)}
            chosen.append(next((other for other in left if other.task not in tasks), left[0]))
        said = [self.first, *chosen]
        return [after(question, said[:turn], tokenizer) for turn, question in enumerate(said)]


def talks(asked: Sequence[Asked]) -> list[Talk]:
    """Up to FIRSTS conversations about each picture; first questions are headline ones on one thing."""
    found: list[Talk] = []
    for picture in dict.fromkeys(question.picture for question in asked):
        own = [question for question in asked if question.picture == picture]
        firsts = [question for question in own if question.task in HEADLINE and len(question.cells) == 1]
        made = [
            Talk(first, tuple(other for other in own if asks_for_other(first, other))) for first in firsts
        ]
        found += [talk for talk in made if talk.others][:FIRSTS]
    return found


def asks_for_other(first: Asked, later: Asked) -> bool:
    """Whether a question speaks of a thing that the first one did not name, or of one that is not there."""
    return later != first and (not later.cells or not set(later.cells) <= set(first.cells))


def ranks(setting: Setting) -> tuple[str, ...]:
    """What may rank; nothing does where nothing is dropped."""
    return FASTV_RANKS if setting.ratio else ("",)


# ---- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Answers of one setting to the questions of all conversations, in their order.

    Attributes:
        setting: which one.
        rank: what ranked; "" where nothing is dropped.
        kept: image tokens behind FastV's choice, on average.
        first: offline, to each conversation's first question.
        later: offline, to its other questions.
        spoken: the server's, to the turns of the real conversations; None where none was started.

    """

    setting: Setting
    rank: str
    kept: float
    first: list[str]
    later: list[str]
    spoken: list[str] | None


@dataclass(frozen=True)
class Questions:
    """All that is asked: conversation after conversation."""

    first: list[Asked]
    later: list[Asked]
    rankers: list[Asked]
    spoken: list[Asked]

    @classmethod
    def of(cls, held: Sequence[Talk], tokenizer: Any) -> Questions:
        """Of each later question, ``rankers`` has the first one of its conversation."""
        return cls(
            [talk.first for talk in held],
            [other for talk in held for other in talk.others],
            [talk.first for talk in held for _ in talk.others],
            [turn for talk in held for turn in talk.turns(tokenizer)],
        )

    def pairs(self, rank: str) -> list[tuple[Asked, Asked]]:
        """Whose end ranks, and what is asked: first questions, then the later ones."""
        own = rank != TURN_END
        rankers = self.later if own else self.rankers
        return [*zip(self.first, self.first, strict=True), *zip(rankers, self.later, strict=True)]


def measure(
    setup: Setup, questions: Questions, served_ratios: Sequence[float], journal: Journal
) -> list[Answers]:
    """The answers of every setting and rank."""
    spoken = speak(setup, questions, served_ratios, journal)
    found = []
    for setting in setup.settings:
        for rank in ranks(setting):
            answer = partial(_offline, setup, questions, setting, rank)
            offline, _, kept = _timed(journal, f"{_title(setting, rank)}, offline", answer)
            split = len(questions.first)
            served = spoken.get((setting, rank))
            found.append(Answers(setting, rank, kept, offline[:split], offline[split:], served))
    return found


def speak(
    setup: Setup, questions: Questions, served_ratios: Sequence[float], journal: Journal
) -> dict[tuple[Setting, str], list[str]]:
    """A server's answers in real conversations by setting and rank, for the full model and pruning alone.

    What ranks is the server's, so each rank has one of its own; the full model is asked of the first.
    """
    found: dict[tuple[Setting, str], list[str]] = {}
    for rank in FASTV_RANKS:
        ranking = {"fastv_rank": rank, "assistant_header": setup.section["assistant_header"]}
        with setup.server(ranking) as server:
            for setting in setup.settings:
                full = setting.family == FULL and rank == FASTV_RANKS[0]
                if full or (setting.family == PRUNED and setting.ratio in served_ratios):
                    own = rank if rank in ranks(setting) else ""
                    answer = partial(server.answers, setting.level, questions.spoken)
                    found[setting, own] = _timed(journal, f"{_title(setting, own)}, served", answer)[0]
    return found


def _title(setting: Setting, rank: str) -> str:
    return " ".join(part for part in (setting.family, setting.name, rank) if part)


def _timed(journal: Journal, title: str, run: Callable[[], Found]) -> Found:
    began = time.monotonic()
    found: Found = journal.result(title, run)
    print(f"{title}: {found[1]:.0f} live, {found[2]:.0f} kept, {time.monotonic() - began:.0f} s", flush=True)
    return found


def _offline(setup: Setup, questions: Questions, setting: Setting, rank: str) -> Found:
    from benchmarks.accuracy.offline import OfflineModel, answer_ranked, everything, unmerged

    model = OfflineModel(setup.checkpoint, setup.section["fastv_layer"])
    image_tokens = everything if setting.thresholds is None else unmerged(setting.thresholds)
    # By picture, as they are answered.
    pairs = questions.pairs(rank)
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][1].picture)
    ordered = [pairs[i] for i in order]
    answers, live, kept = answer_ranked(model, image_tokens, setting.ratio, setup.images, ordered)
    by_place = dict(zip(order, answers, strict=True))
    return [by_place[i] for i in range(len(pairs))], live, kept


# ---- report ---------------------------------------------------------------------------------------


def summary(questions: Questions, found: Sequence[Answers], dtype: str) -> str:
    """How much was asked, and how far the server and transformers agree on first questions."""
    pictures = len({question.picture for question in questions.first})
    turns = [i for i, question in enumerate(questions.spoken) if not question.earlier]
    same = [
        answer == each.spoken[turn]
        for each in found
        if each.spoken is not None
        for turn, answer in zip(turns, each.first, strict=True)
    ]
    return (
        f"{len(questions.first)} conversations about {pictures} pictures with {len(questions.later)} later "
        f"questions ({len(set(questions.later))} different ones), served in {dtype}. Served and offline, "
        f"first questions got the same answer in {100 * sum(same) / len(same):.1f}% of {len(same)} cases."
    )


def offline_table(questions: Questions, found: Sequence[Answers]) -> str:
    """Markdown: of every setting and rank the share of right answers to first and later questions."""
    asked = counts(questions.later)
    heads = ["image tokens", "setting", "kept", "ranked by", f"first question ({len(questions.first)})"]
    heads += [
        f"later: {name} ({n})" if i == 0 else f"{name} ({n})" for i, (name, n) in enumerate(asked.items())
    ]
    heads += [f"turn_end less prompt_end: {name}" if i == 0 else name for i, name in enumerate(COMPARED)]
    lines = [line(heads), line(["---"] * 2 + ["--:", "---"] + ["--:"] * (len(heads) - 4))]
    for each in found:
        later = shares(questions.later, each.later)
        cells = [f"{100 * shares(questions.first, each.first)['headline']:.1f}"]
        cells += [f"{100 * later[name]:.1f}" for name in asked]
        other = _other_rank(found, each)
        gains = {} if other is None else _gains(questions, each, other)
        cells += [_percent(gains[name]) if gains else "" for name in COMPARED]
        lines.append(line([*_about(each), *cells]))
    return "\n".join(lines)


def served_table(questions: Questions, found: Sequence[Answers]) -> str:
    """Markdown: of what was served the share of right answers by turn of the real conversations.

    Then the share among those later turns that the full model answers rightly.
    """
    full = right(questions.spoken, _spoken(found[0]))
    known = [i for i, turn in enumerate(questions.spoken) if full[i] and turn.earlier]
    turns = _by_turn(questions, full)
    heads = ["image tokens", "setting", "kept", "ranked by"]
    heads += [f"turn {turn} ({len(hits)})" for turn, hits in turns.items()]
    heads += [f"later, full model right ({len(known)})", "turn_end less prompt_end there"]
    lines = [line(heads), line(["---"] * 2 + ["--:", "---"] + ["--:"] * (len(heads) - 4))]
    for each in found:
        if each.spoken is None:
            continue
        hits, other = right(questions.spoken, each.spoken), _other_rank(found, each)
        groups = [*_by_turn(questions, hits).values(), [hits[i] for i in known]]
        cells = [f"{100 * sum(group) / max(len(group), 1):.1f}" for group in groups]
        gain = "" if other is None else _gain_of_turns(questions, known, each, other)
        lines.append(line([*_about(each), *cells, gain]))
    return "\n".join(lines)


def _gain_of_turns(questions: Questions, known: Sequence[int], each: Answers, other: Answers) -> str:
    asked = [questions.spoken[i] for i in known]
    answers, others = ([_spoken(one)[i] for i in known] for one in (each, other))
    return _percent(difference(asked, answers, others, TASKS))


def _spoken(each: Answers) -> list[str]:
    if each.spoken is None:
        raise ValueError(f"{each.setting.family}, {each.setting.name} was not served")
    return each.spoken


def _by_turn(questions: Questions, hits: Sequence[bool]) -> dict[int, list[bool]]:
    """What holds of the turns of the real conversations, by their number from 1 on."""
    turns: dict[int, list[bool]] = {}
    for question, hit in zip(questions.spoken, hits, strict=True):
        turns.setdefault(len(question.earlier) + 1, []).append(hit)
    return turns


def _about(each: Answers) -> list[str]:
    return [each.setting.family, each.setting.name, f"{each.kept:.0f}", each.rank]


def _other_rank(found: Sequence[Answers], each: Answers) -> Answers | None:
    """Of answers ranked by the turn's end those that the prompt's end ranked; else None."""
    if each.rank != TURN_END:
        return None
    return next(one for one in found if one.setting == each.setting and one.rank == PROMPT_END)


def _gains(questions: Questions, each: Answers, other: Answers) -> dict[str, tuple[float, float]]:
    """By the names of COMPARED the difference, and half of its 95% interval."""
    found = {}
    for name, (tasks, there) in COMPARED.items():
        chosen = [i for i, question in enumerate(questions.later) if question.cells or not there]
        asked = [questions.later[i] for i in chosen]
        answers, others = ([one.later[i] for i in chosen] for one in (each, other))
        found[name] = difference(asked, answers, others, tasks)
    return found


def _percent(gain: tuple[float, float]) -> str:
    mean, half = gain
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def results(questions: Questions, found: Sequence[Answers]) -> list[dict[str, Any]]:
    """Figures for the JSON file: shares of first and later questions, and of each turn that was served."""
    made = []
    for each in found:
        about = {"family": each.setting.family, "name": each.setting.name, "ratio": each.setting.ratio}
        one = about | {"rank": each.rank, "kept": each.kept}
        one |= {name: shares(getattr(questions, name), getattr(each, name)) for name in ("first", "later")}
        other = _other_rank(found, each)
        if other is not None:
            one["turn_end_less_prompt_end"] = _gains(questions, each, other)
        if each.spoken is not None:
            turns = _by_turn(questions, right(questions.spoken, each.spoken))
            one["served_turns"] = {turn: sum(hits) / len(hits) for turn, hits in turns.items()}
        made.append(one)
    return made


def main() -> None:
    """Read the command line, measure, write everything."""
    options = _options()
    insert(options.page.read_text(), "", MARK)  # A page without marks is to fail now, not at the end.
    options.out.mkdir(parents=True, exist_ok=True)
    # A server must not outlive the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    setup, questions = _prepare(options)
    journal = Journal(options.out / "conversations.partial.jsonl", [*setup.work, repr(questions.spoken)])
    ratios = [float(ratio) for ratio in options.served_ratios.split(",") if ratio]
    found = measure(setup, questions, ratios, journal)
    _write(options, questions, found)
    journal.remove()


def _prepare(options: argparse.Namespace) -> tuple[Setup, Questions]:
    from transformers import AutoTokenizer

    images, asked = held_out(options.checkpoint, options.pictures)
    setup = Setup(
        checkpoint=options.checkpoint,
        images=images,
        asked=asked,
        dtype="float32",
        log=options.out / "conversations-server.log",
        levels=options.levels.split(","),
        ratios=[float(ratio) for ratio in options.ratios.split(",")],
        both_ratios=[float(ratio) for ratio in options.both_ratios.split(",")],
    )
    return setup, Questions.of(talks(asked), AutoTokenizer.from_pretrained(options.checkpoint))


def _write(options: argparse.Namespace, questions: Questions, found: Sequence[Answers]) -> None:
    parts = (
        summary(questions, found, "float32"),
        "Later questions as questions of their own (offline):",
        offline_table(questions, found),
        "Real conversations (served):",
        served_table(questions, found),
    )
    options.page.write_text(insert(options.page.read_text(), "\n\n".join(parts), MARK))
    file = options.out / "conversations.json"
    report = {
        "pictures": options.pictures,
        "conversations": len(questions.first),
        "later_questions": counts(questions.later) | {"all": len(questions.later)},
        "results": results(questions, found),
    }
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.page} and {file} are written", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "llava-hybrid")
    parser.add_argument("--pictures", type=int, default=40, help="up to three conversations are held on each")
    parser.add_argument("--levels", default="low", help="of the checkpoint, for their thresholds")
    parser.add_argument("--ratios", default="0.5,0.75,0.9", help="of pruning alone")
    parser.add_argument("--both-ratios", default="0.5", help="of pruning after merging")
    parser.add_argument("--served-ratios", default="", help="those of --ratios to serve as well")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
