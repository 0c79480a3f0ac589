"""The stages of training and the modules that go through them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .dense_loss import DenseHeads
from .lessons import Lesson, Pace
from .network import new_model
from .tower_stage import TowerLesson


class Student:
    """The model and the heads that only training needs."""

    def __init__(self, seed: int) -> None:
        self.model: Any = new_model(seed)
        self.heads = DenseHeads()

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "heads": self.heads}

    def state_dict(self) -> dict[str, Any]:
        """Weights of both."""
        return {name: module.state_dict() for name, module in self._modules().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take weights that :meth:`state_dict` gave."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])


def curriculum(student: Student) -> list[Lesson]:
    """All stages in order."""
    model, heads = student.model, student.heads
    return [
        TowerLesson("small pictures", model, heads, Pace(2000, 4e-3, 16, decay=0.2), side=168),
        TowerLesson("whole pictures", model, heads, Pace(1500, 1.5e-3, 4, decay=0.4), side=336),
    ]
