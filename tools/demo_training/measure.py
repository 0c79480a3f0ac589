"""Exact answers by task on held-out pictures, all patches seen.

    python -m tools.demo_training.measure CHECKPOINT

An answer is exact if each of its tokens, and the end, is the likeliest one after those before it: then it
would be written so, without sampling.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tools.demo_training.batches import Batch
from tools.demo_training.language_stage import examine, questions_on_scenes
from tools.demo_training.network import TowerFeatures
from tools.demo_training.packed_decoder import PackedDecoder
from tools.demo_training.prompts import Prompts
from tools.demo_training.questions import TASKS
from tools.demo_training.tower_stage import HELD_OUT

# Held-out pictures that no look during training has seen either.
_SERIES = 1000
HEADLINE = ("colour", "shape", "place", "presence", "glyph")
_QUESTIONS, _TOKENS, _AT_ONCE = 24, 256, 4

Shares = dict[str, dict[str, float]]


def measure(checkpoint: Path, pictures: int, blank: bool) -> Shares:
    """Share of exact answers by task on held-out pictures.

    Args:
        checkpoint: in the hub's LLaVA-1.5 format; it is run in float32.
        pictures: how many; of each, ten to fifteen questions are asked, and prompts begin with <s> for every
            other four pictures.
        blank: show a picture of one colour, the mean of the tower's normalisation, instead.

    Returns:
        right, asked and share by task, by "all" tasks and by the "headline" ones together.

    """
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = Prompts(checkpoint)
    batches = (
        _batch(prompts, first, min(_AT_ONCE, pictures - first)) for first in range(0, pictures, _AT_ONCE)
    )
    found = examine(TowerFeatures(model), PackedDecoder(model, prompts.head), batches, blank)
    groups = {task: (task,) for task in TASKS} | {"headline": HEADLINE, "all": TASKS}
    return {name: _share([found[task] for task in tasks]) for name, tasks in groups.items()}


def _batch(prompts: Prompts, first: int, count: int) -> Batch:
    seeds = [[HELD_OUT, _SERIES, number] for number in range(first, first + count)]
    bare = torch.tensor(first // _AT_ONCE % 2 == 1)
    asked = questions_on_scenes(prompts, seeds, _QUESTIONS, _TOKENS)
    return asked | {"side": torch.tensor(1), "bare": bare}


def _share(found: list[tuple[float, int]]) -> dict[str, float]:
    hits, total = sum(right for right, _ in found), sum(asked for _, asked in found)
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
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--blank-pictures", type=int, default=100)
    options = parser.parse_args()
    print(json.dumps(report(options.checkpoint, options.pictures, options.blank_pictures), indent=2))


if __name__ == "__main__":
    main()
