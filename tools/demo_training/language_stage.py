"""Later stages: projector and decoder, on a tower that stands still."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_training.alignment import Words, alignment, shown_patches
from tools.demo_training.batches import Batch, dense_batch
from tools.demo_training.finder import Finder
from tools.demo_training.lessons import Pace
from tools.demo_training.network import TowerFeatures, normalised
from tools.demo_training.packed_decoder import PackedDecoder
from tools.demo_training.prompts import NO_LOSS, Prompts
from tools.demo_training.questions import TASKS, ask
from tools.demo_training.tower_stage import HELD_OUT
from vllm_hybrid.demo.scenes import draw_scene

_EXAM_BATCHES = 6
# Batches whose prompts begin without <s>: transformers puts it there, vLLM's chats leave it out.
_BARE_SHARE = 0.5
_FINDER_SHARE, _ALIGNMENT_SHARE = 1.0, 0.2


@dataclass(frozen=True)
class Asking:
    """Questions asked of a picture, tokens they may take, share of batches in which patches are averaged.

    ``side`` is that of the squares of patches that are averaged then.
    """

    questions: int
    tokens: int
    averaged: float
    side: int = 2


def questions_on_scenes(prompts: Prompts, seeds: list[list[int]], questions: int, tokens: int) -> Batch:
    """The scenes of the seeds, their dense labels, and packed questions on each.

    Args:
        prompts: the prompt format.
        seeds: one for each scene.
        questions: on each, at most.
        tokens: that they may take up.

    """
    scenes = [draw_scene(seed) for seed in seeds]
    asked = [ask(scene, questions, [*seed, 1]) for scene, seed in zip(scenes, seeds, strict=True)]
    return dense_batch(scenes) | prompts.pack(asked, tokens)


class LanguageLesson:
    """Questions on pictures as the model is served them."""

    def __init__(
        self, name: str, model: Any, prompts: Prompts, pace: Pace, asking: Asking, finder: Finder
    ) -> None:
        self.name, self.pace = name, pace
        self._asking, self._finder, self._prompts = asking, finder, prompts
        self._words = Words(prompts)
        self._features, self._decoder = TowerFeatures(model), PackedDecoder(model, prompts.head)

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The projector's, the decoder's and the finder's."""
        finder = [(f"finder.{name}", p) for name, p in self._finder.named_parameters()]
        return [*self._decoder.named_parameters(), *finder]

    def batch(self, seed: list[int]) -> Batch:
        """Pictures, dense labels, packed questions and the side of the squares of patches to average."""
        chance, other = torch.rand(2, 1, generator=torch.Generator().manual_seed(seed[-1]))
        side = torch.where(chance < self._asking.averaged, self._asking.side, 1)
        seeds = [[*seed, i] for i in range(self.pace.pictures)]
        asking = self._asking
        asked = questions_on_scenes(self._prompts, seeds, asking.questions, asking.tokens)
        return asked | {"side": side, "bare": other < _BARE_SHARE}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of the answers' tokens, and shares of the finder's and the alignment's losses."""
        with torch.no_grad():
            patches = self._features(normalised(batch["pixels"]))[:, 1:]
        logits, targets, halfway = self._decoder(patches, batch)
        answer = functional.cross_entropy(logits, targets)
        finding, found = self._finder(halfway, batch["cells"][batch["described"]])
        loss = answer + _FINDER_SHARE * finding + _ALIGNMENT_SHARE * self._alignment(patches, batch)
        figures = {
            "tokens": float((logits.argmax(-1) == targets).float().mean()),
            "found": found,
            "answer": float(answer.detach()),
        }
        return loss, figures

    def _alignment(self, patches: Tensor, batch: Batch) -> Tensor:
        shown = shown_patches(batch)
        projected = self._decoder.projector(patches[shown[:, 0], shown[:, 1]])
        return alignment(projected, shown, batch, self._words, self._decoder.decoder.embed_tokens.weight)

    @torch.no_grad()
    def examine(self, rank: int) -> dict[str, tuple[float, int]]:
        """Answers all of whose tokens are the likeliest, by task, as the lesson's pictures are given."""
        return examine(
            self._features, self._decoder, [self.batch([HELD_OUT, rank, n]) for n in range(_EXAM_BATCHES)]
        )


@torch.no_grad()
def examine(
    features: TowerFeatures, decoder: PackedDecoder, batches: Iterable[Batch], blank: bool = False
) -> dict[str, tuple[float, int]]:
    """Right answers and questions by task; ``blank`` shows a grey picture instead."""
    right, count = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    for batch in batches:
        pixels = normalised(batch["pixels"])
        seen = features(torch.zeros_like(pixels) if blank else pixels)[:, 1:]
        logits, targets, _ = decoder(seen, batch)
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
