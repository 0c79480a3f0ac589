"""The stages of training and the modules that go through them."""

from __future__ import annotations

from typing import Any

from torch import nn

from tools.demo_training.dense_loss import DenseHeads
from tools.demo_training.finder import Finder
from tools.demo_training.language_stage import Asking, LanguageLesson
from tools.demo_training.lessons import Lesson, Pace
from tools.demo_training.network import new_model
from tools.demo_training.prompts import Prompts
from tools.demo_training.tower_stage import TowerLesson


class Student:
    """The model and the heads that only training needs."""

    def __init__(self, seed: int) -> None:
        self.model: Any = new_model(seed)
        self.heads, self.finder = DenseHeads(), Finder()

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "heads": self.heads, "finder": self.finder}

    def state_dict(self) -> dict[str, Any]:
        """Weights of all."""
        return {name: module.state_dict() for name, module in self._modules().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take weights that :meth:`state_dict` gave."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])


def curriculum(student: Student, prompts: Prompts) -> list[Lesson]:
    """All stages in order: what patches show, then what is asked about it.

    The decoder learns first on averages of 3 x 3 patches, a ninth of the image tokens, then on averages of
    2 x 2 and on all patches.
    """
    model, heads, finder = student.model, student.heads, student.finder
    few = Asking(questions=24, tokens=224, averaged=1.0, side=3)
    both = Asking(questions=24, tokens=256, averaged=0.7, side=2)
    return [
        TowerLesson("small pictures", model, heads, Pace(600, 4e-3, 16), side=168),
        TowerLesson("whole pictures", model, heads, Pace(400, 3e-3, 4, decay=0.5), side=336),
        LanguageLesson("questions", model, prompts, Pace(1000, 2.5e-3, 8, decay=0.5), few, finder),
        LanguageLesson("all patches", model, prompts, Pace(310, 2e-3, 8, decay=0.8), both, finder),
    ]
