"""Questions as token ids: several on one picture in one sequence, each as it would be served alone.

All prompts of one picture start alike, up to and with the picture; what follows it is a block of its own for
every question. Blocks do not see each other and start at the same position.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.demo_training.questions import TASKS, Question
from vllm_hybrid.demo.model import SHAPE
from vllm_hybrid.demo.scenes import PLACES
from vllm_hybrid.demo.tokenizer import IMAGE_ID, write_tokenizer

NO_LOSS = -100
PADDING = -1


@dataclass(frozen=True)
class Block:
    """A question's tokens after the picture, the answer and the end included.

    ``answer`` is where the answer starts, ``described`` the first token that knows what is asked about.
    """

    ids: list[int]
    answer: int
    described: int


class Prompts:
    """The served prompt format: chat template and tokenizer of the checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Take the tokenizer of a folder, which is written if it is not there."""
        from transformers import AutoTokenizer

        if not (folder / "chat_template.jinja").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_tokenizer(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.block = functools.lru_cache(maxsize=20000)(self._block)
        ids = self._ids(chat("?"), True)
        self.head = ids[: ids.index(IMAGE_ID)]

    def _ids(self, messages: list[dict[str, Any]], prompt: bool) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return self._tokenizer(text)["input_ids"]

    def last_token(self, text: str) -> int:
        """The id of a text's last token."""
        return self._tokenizer(text)["input_ids"][-1]

    def _block(self, text: str, answer: str, described: int = 0) -> Block:
        prompt = self._ids(chat(text), True)
        whole = self._ids([*chat(text), {"role": "assistant", "content": answer}], False)
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"the answer changes the prompt's tokens: {text!r}, {answer!r}")
        start = len(self.head) + 1
        known = self._ids(chat(text[:described]), True)
        # The cut prompt's end is not the whole one's; what both share ends with the description.
        differing = (i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b)
        shared = next(differing, len(prompt))
        return Block(whole[start:], len(prompt) - start, shared - 1 - start)

    def pack(self, questions: list[list[Question]], length: int) -> dict[str, Tensor]:
        """Blocks of each picture's questions side by side, as many as fit.

        Args:
            questions: of each picture, in order of preference.
            length: tokens for each picture.

        Returns:
            ids, positions (after the picture), blocks (number, -1 where there is none), targets (the next
            token where it is the answer's, else -100), tasks (number), int64 [pictures, length]; described
            (whether the token knows what is asked about and is not the answer's), bool [pictures, length];
            cells (whether a thing that is asked about is there), float32 [pictures, length, cells].

        """
        shape = (len(questions), length)
        ids, positions, targets = (np.zeros(shape, np.int64) for _ in range(3))
        blocks, tasks = np.full(shape, PADDING, np.int64), np.zeros(shape, np.int64)
        described, cells = np.zeros(shape, np.bool_), np.zeros((*shape, len(PLACES)), np.float32)
        targets[:] = NO_LOSS
        for row, asked in enumerate(questions):
            end = 0
            for number, question in enumerate(asked):
                block = self.block(question.text, question.answer, question.described)
                size = len(block.ids) - 1
                if end + size > length:
                    continue
                own = np.s_[row, end : end + size]
                ids[own], positions[own], blocks[own] = block.ids[:-1], np.arange(size), number
                targets[row, end + block.answer - 1 : end + size] = block.ids[block.answer :]
                tasks[own] = TASKS.index(question.task)
                described[row, end + block.described : end + block.answer] = True
                cells[row, end : end + size, question.cells] = 1
                end += size
        made: dict[str, np.ndarray] = {"ids": ids, "positions": positions, "blocks": blocks}
        made |= {"targets": targets, "tasks": tasks}
        made |= {"described": described, "cells": cells}
        return {name: torch.from_numpy(array) for name, array in made.items()}


def chat(text: str) -> list[dict[str, Any]]:
    """The messages of a question on a picture."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def text_start(head: list[int]) -> int:
    """Position of the first token after the picture."""
    return len(head) + SHAPE.patches
