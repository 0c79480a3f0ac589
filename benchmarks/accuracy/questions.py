"""The questions: held-out pictures of the training's kind, which training has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tools.demo_training.measure import HEADLINE
from tools.demo_training.prompts import chat
from tools.demo_training.questions import TASKS, ask
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
        cells: where the things are that it speaks of.
        earlier: questions and answers of the same conversation before it.

    """

    picture: int
    task: str
    text: str
    answer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    longest: int
    cells: tuple[int, ...] = ()
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat up to the answer, with the picture in its first message."""
        return _messages(self.text, self.earlier)


def held_out(checkpoint: Path, pictures: int) -> tuple[list[Image.Image], list[Asked]]:
    """Pictures and up to PER_PICTURE questions on each.

    Args:
        checkpoint: whose tokenizer and prompt format to use.
        pictures: how many.

    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    images: list[Image.Image] = []
    asked: list[Asked] = []
    for number in range(pictures):
        seed = [HELD_OUT, _SERIES, number]
        scene = draw_scene(seed)
        images.append(Image.fromarray(scene.pixels))
        for question in ask(scene, PER_PICTURE, [*seed, 1]):
            ids = _token_ids(tokenizer, question.text, question.answer)
            asked.append(Asked(number, question.task, question.text, question.answer, *ids, question.cells))
    return images, asked


def after(question: Asked, earlier: Sequence[Asked], tokenizer: Any) -> Asked:
    """The question as a turn of a conversation in which others were asked and answered rightly before it."""
    said = tuple((each.text, each.answer) for each in earlier)
    before, behind, longest = _token_ids(tokenizer, question.text, question.answer, said)
    return replace(question, before=before, after=behind, longest=longest, earlier=said)


def _token_ids(
    tokenizer: Any, text: str, answer: str, earlier: Sequence[tuple[str, str]] = ()
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """``before``, ``after`` and ``longest`` of a question: its chat's ids, <s> in front, as in training."""
    messages = _messages(text, earlier)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(prompt)["input_ids"]
    image = ids.index(IMAGE_ID)
    longest = len(tokenizer(whole)["input_ids"]) - len(ids)
    return tuple(ids[:image]), tuple(ids[image + 1 :]), longest


def _messages(text: str, earlier: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A chat on a picture: earlier questions with their answers, and the text."""
    messages: list[dict[str, Any]] = []
    for question, answer in earlier:
        messages += [*chat(question), {"role": "assistant", "content": answer}]
    messages += chat(text)
    for later in messages[1:]:
        if later["role"] == "user":
            later["content"] = [part for part in later["content"] if part["type"] != "image"]
    return messages


def shares(asked: list[Asked], answers: list[str]) -> dict[str, float]:
    """Share of exact answers, of the headline tasks together and of each task that was asked for."""
    every = right(asked, answers)
    found = {}
    for name, tasks in GROUPS.items():
        hits = [hit for question, hit in zip(asked, every, strict=True) if question.task in tasks]
        if hits:
            found[name] = sum(hits) / len(hits)
    return found


def counts(asked: list[Asked]) -> dict[str, int]:
    """Questions of the headline tasks together and of each task that was asked for."""
    found = {name: sum(question.task in tasks for question in asked) for name, tasks in GROUPS.items()}
    return {name: count for name, count in found.items() if count}


def difference(
    asked: list[Asked], answers: list[str], others: list[str], tasks: Sequence[str] = HEADLINE
) -> tuple[float, float]:
    """Share of right answers among some less that among others, to the same questions of some tasks.

    Returns:
        The difference, and half of its 95% interval. Questions of one picture stand or fall together, so the
        pictures are what is drawn.

    """
    gains: dict[int, list[int]] = {}
    pairs = zip(asked, right(asked, answers), right(asked, others), strict=True)
    for question, hit, other in pairs:
        if question.task in tasks:
            gains.setdefault(question.picture, []).append(hit - other)
    total = sum(map(len, gains.values()))
    if total == 0:
        return 0.0, math.inf
    mean = sum(map(sum, gains.values())) / total
    spread = sum((sum(each) - mean * len(each)) ** 2 for each in gains.values())
    correction = len(gains) / max(len(gains) - 1, 1)
    return mean, 1.96 * math.sqrt(spread * correction) / total


def right(asked: list[Asked], answers: list[str]) -> list[bool]:
    """Which answers are right, to the letter."""
    return [answer.strip() == question.answer for question, answer in zip(asked, answers, strict=True)]
