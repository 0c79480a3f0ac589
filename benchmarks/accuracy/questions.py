"""The questions: held-out pictures of the training's kind, which training has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tools.demo_training.measure import HEADLINE
from tools.demo_training.prompts import chat
from tools.demo_training.questions import TASKS, Question, ask
from tools.demo_training.tower_stage import HELD_OUT
from vllm_hybrid.demo.scenes import draw_scene
from vllm_hybrid.demo.tokenizer import IMAGE_ID

# Another series of held-out pictures than the one that training's own report uses.
_SERIES = 2000
PER_PICTURE = 10
GROUPS = {"headline": HEADLINE} | {task: (task,) for task in TASKS}
# What an answer ends in that was cut off; no right answer does.
CUT = "…"


@dataclass(frozen=True)
class Asked:
    """A question on a picture, as training would give it to the model.

    Attributes:
        picture: its number.
        task: what it asks for.
        text: its words.
        answer: the right answer.
        before: token ids in front of the image.
        after: token ids behind the image, up to the answer.
        longest: tokens of the right answer, its end included: what is longer is wrong.

    """

    picture: int
    task: str
    text: str
    answer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    longest: int


def held_out(checkpoint: Path, pictures: int) -> tuple[list[Image.Image], list[Asked]]:
    """Pictures and up to PER_PICTURE questions on each.

    Args:
        checkpoint: whose tokenizer and prompt format to use.
        pictures: how many.

    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    images, asked = [], []
    for number in range(pictures):
        seed = [HELD_OUT, _SERIES, number]
        scene = draw_scene(seed)
        images.append(Image.fromarray(scene.pixels))
        asked += [_asked(number, question, tokenizer) for question in ask(scene, PER_PICTURE, [*seed, 1])]
    return images, asked


def _asked(picture: int, question: Question, tokenizer: Any) -> Asked:
    """The question with its token ids: those of the chat's text, <s> in front, as training has them."""
    messages = chat(question.text)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": question.answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(prompt)["input_ids"]
    image = ids.index(IMAGE_ID)
    longest = len(tokenizer(whole)["input_ids"]) - len(ids)
    before, after = tuple(ids[:image]), tuple(ids[image + 1 :])
    return Asked(picture, question.task, question.text, question.answer, before, after, longest)


def shares(asked: list[Asked], answers: list[str]) -> dict[str, float]:
    """Share of exact answers, of the headline tasks together and of each task that was asked for."""
    right = _right(asked, answers)
    found = {}
    for name, tasks in GROUPS.items():
        hits = [hit for question, hit in zip(asked, right, strict=True) if question.task in tasks]
        if hits:
            found[name] = sum(hits) / len(hits)
    return found


def counts(asked: list[Asked]) -> dict[str, int]:
    """Questions of the headline tasks together and of each task that was asked for."""
    found = {name: sum(question.task in tasks for question in asked) for name, tasks in GROUPS.items()}
    return {name: count for name, count in found.items() if count}


def difference(asked: list[Asked], answers: list[str], others: list[str]) -> tuple[float, float]:
    """Headline share of some answers less that of others, to the same questions.

    Returns:
        The difference, and half of its 95% interval. Questions of one picture stand or fall together, so the
        pictures are what is drawn.

    """
    gains: dict[int, list[int]] = {}
    pairs = zip(asked, _right(asked, answers), _right(asked, others), strict=True)
    for question, hit, other in pairs:
        if question.task in HEADLINE:
            gains.setdefault(question.picture, []).append(hit - other)
    total = sum(map(len, gains.values()))
    if total == 0:
        return 0.0, math.inf
    mean = sum(map(sum, gains.values())) / total
    spread = sum((sum(each) - mean * len(each)) ** 2 for each in gains.values())
    correction = len(gains) / max(len(gains) - 1, 1)
    return mean, 1.96 * math.sqrt(spread * correction) / total


def _right(asked: list[Asked], answers: list[str]) -> list[bool]:
    return [answer.strip() == question.answer for question, answer in zip(asked, answers, strict=True)]
