"""Exact answers by task, through transformers alone: python -m training.measure CHECKPOINT."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .prompts import chat
from .questions import TASKS, Question, ask
from .scenes import draw_scene
from .tower_stage import HELD_OUT

# Held-out pictures that no look during training has seen either.
_SERIES = 1000
HEADLINE = ("colour", "shape", "place", "presence", "glyph")
_BLANK = (122, 116, 104)

Shares = dict[str, dict[str, float]]


class Answerer:
    """A checkpoint in float32 that answers as a server would, greedily."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self._processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self._model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self._model.eval()

    @torch.no_grad()
    def answer(self, picture: Image.Image, question: Question) -> str:
        """The answer's text; it is cut off where it is longer than the right one."""
        tokenizer = self._processor.tokenizer
        prompt = tokenizer.apply_chat_template(
            chat(question.text), tokenize=False, add_generation_prompt=True
        )
        inputs = self._processor(images=picture, text=prompt, return_tensors="pt")
        longest = len(tokenizer(question.answer)["input_ids"]) + 1
        made = self._model.generate(**inputs, do_sample=False, max_new_tokens=longest)
        return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def measure(checkpoint: Path, pictures: int, blank: bool, questions: int = 10) -> Shares:
    """Share of exact answers by task on held-out pictures.

    Args:
        checkpoint: in the hub's LLaVA-1.5 format.
        pictures: how many; of each, ``questions`` are asked.
        blank: show a picture of one colour, the mean of the tower's normalisation, instead.
        questions: of each picture at most.

    Returns:
        right, asked and share by task, by "all" tasks and by the "headline" ones together.

    """
    answerer = Answerer(checkpoint)
    right, asked = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for number in range(pictures):
        seed = [HELD_OUT, _SERIES, number]
        scene = draw_scene(seed)
        shown = Image.new("RGB", scene.pixels.shape[:2], _BLANK) if blank else Image.fromarray(scene.pixels)
        for question in ask(scene, questions, [*seed, 1]):
            asked[question.task] += 1
            right[question.task] += answerer.answer(shown, question) == question.answer
    groups = {task: (task,) for task in TASKS} | {"headline": HEADLINE, "all": TASKS}
    return {name: _share(tasks, right, asked) for name, tasks in groups.items()}


def _share(tasks: tuple[str, ...], right: dict[str, int], asked: dict[str, int]) -> dict[str, float]:
    hits, total = sum(right[task] for task in tasks), sum(asked[task] for task in tasks)
    return {"right": hits, "asked": total, "share": round(hits / max(total, 1), 4)}


def report(checkpoint: Path, pictures: int, blank_pictures: int) -> dict[str, Shares]:
    """Shares with the pictures and with blank ones."""
    return {
        "full": measure(checkpoint, pictures, blank=False),
        "blank": measure(checkpoint, blank_pictures, blank=True),
    }


def main() -> None:
    """Read the command line and print the shares as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--blank-pictures", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(report(options.checkpoint, options.pictures, options.blank_pictures), indent=2))


if __name__ == "__main__":
    main()
