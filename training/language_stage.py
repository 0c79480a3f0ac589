"""Later stages: the decoder, on a tower that stands still or learns along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import Batch, dense_batch
from .dense_loss import DenseHeads
from .lessons import Pace
from .network import TowerFeatures, normalised
from .packed_decoder import PackedDecoder
from .prompts import NO_LOSS, Prompts
from .questions import TASKS, ask
from .scenes import draw_scene
from .tower_stage import HELD_OUT, tower_parameters

_EXAM_BATCHES = 6
_DENSE_SHARE = 0.3


@dataclass(frozen=True)
class Asking:
    """Questions asked of a picture, tokens they may take, share of batches with averaged patches."""

    questions: int
    tokens: int
    pooled: float


class LanguageLesson:
    """Questions on pictures as the model is served them, answers the only target."""

    def __init__(
        self,
        name: str,
        model: Any,
        prompts: Prompts,
        pace: Pace,
        asking: Asking,
        heads: DenseHeads | None = None,
    ) -> None:
        """Make the lesson; with ``heads`` the tower learns along and keeps its own lessons."""
        self.name, self.pace = name, pace
        self._asking, self._heads, self._prompts = asking, heads, prompts
        self._features, self._decoder = TowerFeatures(model), PackedDecoder(model, prompts.head)

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The decoder's and, if it learns along, the tower's."""
        tower = [] if self._heads is None else tower_parameters(self._features, self._heads)
        return [*self._decoder.named_parameters(), *tower]

    def batch(self, seed: list[int]) -> Batch:
        """Pictures, dense labels, packed questions and whether to average patches."""
        seeds = [[*seed, i] for i in range(self.pace.pictures)]
        scenes = [draw_scene(each) for each in seeds]
        asked = [
            ask(scene, self._asking.questions, [*each, 1]) for scene, each in zip(scenes, seeds, strict=True)
        ]
        chance = torch.rand(1, generator=torch.Generator().manual_seed(seed[-1]))
        packed = self._prompts.pack(asked, self._asking.tokens)
        return dense_batch(scenes) | packed | {"pooled": chance < self._asking.pooled}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of the answers' tokens, and a share of the tower's loss if it learns along."""
        pixels = normalised(batch["pixels"])
        with torch.set_grad_enabled(self._heads is not None and torch.is_grad_enabled()):
            features = self._features(pixels)
        logits, targets = self._decoder(features[:, 1:], batch, bool(batch["pooled"]))
        loss = functional.cross_entropy(logits, targets)
        figures = {
            "tokens": float((logits.argmax(-1) == targets).float().mean()),
            "answer": float(loss.detach()),
        }
        if self._heads is not None:
            dense, right = self._heads(features, batch, pixels)
            loss, figures = loss + _DENSE_SHARE * dense, figures | right
        return loss, figures

    @torch.no_grad()
    def examine(self, rank: int) -> dict[str, tuple[float, int]]:
        """Answers all of whose tokens are the likeliest, by task, as the lesson's pictures are given."""
        return examine(
            self._features, self._decoder, [self.batch([HELD_OUT, rank, n]) for n in range(_EXAM_BATCHES)]
        )


@torch.no_grad()
def examine(
    features: TowerFeatures, decoder: PackedDecoder, batches: list[Batch], blank: bool = False
) -> dict[str, tuple[float, int]]:
    """Right answers and questions by task; ``blank`` shows a grey picture instead."""
    right, count = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    for batch in batches:
        pixels = normalised(batch["pixels"])
        seen = features(torch.zeros_like(pixels) if blank else pixels)[:, 1:]
        logits, targets = decoder(seen, batch, bool(batch["pooled"]))
        wrong = torch.zeros(batch["targets"].shape)
        wrong[batch["targets"] != NO_LOSS] = (logits.argmax(-1) != targets).float()
        for row, blocks in enumerate(batch["blocks"]):
            for block in range(int(blocks.max()) + 1):
                own = blocks == block
                if own.any():
                    task = batch["tasks"][row][own][0]
                    right[task] += wrong[row][own].sum() == 0
                    count[task] += 1
    return {task: (float(right[i]), int(count[i])) for i, task in enumerate(TASKS)}
