"""Train from scratch, stage after stage, resuming where it ended.

python -m tools.demo_training.run --state DIR
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from tools.demo_training.batches import batches
from tools.demo_training.curriculum import Student, curriculum
from tools.demo_training.finish import finish
from tools.demo_training.lessons import Lesson
from tools.demo_training.optimizer import Optimizer, rate_at
from tools.demo_training.prompts import Prompts
from tools.demo_training.state import StateFolder
from tools.demo_training.team import Team, run_team
from tools.demo_training.tower_stage import TRAIN

_LOG_EVERY, _EXAM_EVERY, _SAVE_EVERY = 25, 100, 120.0
# A step that took longer was stopped by somebody and does not count as work.
_LONGEST_STEP = 10.0


class Run:
    """One process's part of a training run, from the state that was saved last."""

    def __init__(self, folder: StateFolder, prompts: Prompts, team: Team, seed: int, minutes: float) -> None:
        self._folder, self._prompts, self._team = folder, prompts, team
        self._budget = minutes * 60
        self._spent = 0.0
        self._ending = False
        self._saved = time.monotonic()
        state = folder.load() or {"seed": seed, "stage": 0, "step": 0, "spent": 0.0}
        self._state: dict[str, Any] = state
        self._student = Student(state["seed"])
        if "student" in state:
            self._student.load_state_dict(state["student"])
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, *_: object) -> None:
        self._ending = True

    def finish(self) -> bool:
        """Go through the stages that are left; returns whether all are done."""
        lessons = curriculum(self._student, self._prompts)
        while self._state["stage"] < len(lessons):
            if not self._teach(lessons[self._state["stage"]]):
                return False
            self._state |= {"stage": self._state["stage"] + 1, "step": 0, "optimizer": None}
            self._save()
        return True

    def _teach(self, lesson: Lesson) -> bool:
        stage, first, pace = self._state["stage"], self._state["step"], lesson.pace
        optimizer = Optimizer(lesson.parameters(), self._team)
        if self._state.get("optimizer"):
            optimizer.load_state_dict(self._state["optimizer"])
        make = _Maker(lesson, [TRAIN, self._state["seed"], stage, self._team.rank])
        began, recent = time.monotonic(), Averages()
        for step, batch in enumerate(batches(make, range(first, pace.steps)), first):
            loss, figures = lesson.loss(batch)
            loss.backward()
            enough = self._ending or self._spent > self._budget
            stop = optimizer.step(rate_at(step, pace.steps, pace.rate, decay=pace.decay), enough)
            now = time.monotonic()
            self._spent += min(now - began, _LONGEST_STEP)
            self._state["spent"] += min(now - began, _LONGEST_STEP)
            began = now
            recent.add(figures | {"loss": float(loss.detach())})
            self._state |= {"step": step + 1, "optimizer": optimizer}
            self._report(lesson, step + 1, recent)
            if stop or now - self._saved > _SAVE_EVERY:
                self._save()
            if stop:
                return False
        return True

    def _report(self, lesson: Lesson, step: int, recent: Averages) -> None:
        if step % _LOG_EVERY == 0 and self._team.leads:
            minutes = self._state["spent"] / 60
            self._folder.log(f"{lesson.name} {step}/{lesson.pace.steps} {minutes:.1f} min {recent.take()}")
        if step % _EXAM_EVERY == 0 or step == lesson.pace.steps:
            self._examine(lesson, step)

    def _examine(self, lesson: Lesson, step: int) -> None:
        sums = lesson.examine(self._team.rank)
        table = self._team.sum(torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64))
        shares = {
            name: right / max(count, 1) for name, (right, count) in zip(sorted(sums), table, strict=True)
        }
        if self._team.leads:
            line = " ".join(f"{name} {100 * float(share):.1f}" for name, share in shares.items())
            self._folder.log(f"{lesson.name} {step} held out: {line}")

    def _save(self) -> None:
        self._saved = time.monotonic()
        if not self._team.leads:
            return
        optimizer = self._state.get("optimizer")
        state = self._state | {"student": self._student.state_dict()}
        if isinstance(optimizer, Optimizer):
            state["optimizer"] = optimizer.state_dict()
        self._folder.save(state)


class _Maker:
    """Makes a lesson's batch of a step."""

    def __init__(self, lesson: Lesson, seed: list[int]) -> None:
        self._lesson, self._seed = lesson, seed

    def __call__(self, step: int) -> Any:
        return self._lesson.batch([*self._seed, step])


class Averages:
    """Means of figures since they were last taken."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, figures: dict[str, float]) -> None:
        """Add one value of each figure."""
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> str:
        """The means as text; starts anew."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values = {}
        return " ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def train(state: Path, minutes: float, processes: int, seed: int) -> bool:
    """Train for so many minutes of work or to the end; returns whether the end is reached."""
    folder = StateFolder(state)
    folder.claim()
    (state / "pid").write_text(f"{os.getpid()}\n")
    # The tokenizer's own threads do not survive the forks that follow.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prompts = Prompts(state / "tokenizer")
    ended = []

    def work(team: Team) -> None:
        run = Run(folder, prompts, team, seed, minutes)
        ended.append(run.finish())

    run_team(processes, work)
    return ended[0]


def main() -> None:
    """Read the command line, train, and at the end measure and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--state", type=Path, default=Path("tools/demo_training/state"), help="checkpoint and log"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="of work, then save and end")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each; changes the batches")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        done = train(options.state, options.minutes, options.processes, options.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if done:
        finish(StateFolder(options.state))


if __name__ == "__main__":
    main()
