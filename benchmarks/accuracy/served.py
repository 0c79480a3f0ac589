"""Answers and token counts of one running server."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.accuracy.questions import CUT, Asked
from benchmarks.vllm_server import VllmServer
from vllm_hybrid.config import KNOWN_KEYS
from vllm_hybrid.demo.model import SHAPE
from vllm_hybrid.demo.tokenizer import IMAGE_ID

_AT_ONCE = 16
_TIMEOUT = 900
# Graphs and compiled code are not worth their time for some hundred requests.
_NAME = "bench"
_OPTIONS = (
    "--served-model-name",
    _NAME,
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--kv-cache-memory-bytes",
    str(512 << 20),
)


def serve_and_ask(
    checkpoint: Path,
    section: dict[str, Any] | None,
    images: list[Image.Image],
    asked: list[Asked],
    options: Sequence[str],
    log: Path,
) -> tuple[list[str], float, float]:
    """Start a server with a hybrid section, ask everything, stop it.

    Args:
        checkpoint: folder to serve.
        section: the hybrid section to serve it with; None for the full model.
        images: the pictures.
        asked: the questions.
        options: more options of `vllm serve`.
        log: file for the server's output.

    Returns:
        The answers, and the average live and kept tokens of a request as the server counted them.

    """
    # An override changes the keys that it names, so the checkpoint's own are taken away by name.
    override = None if section is None else dict.fromkeys(KNOWN_KEYS) | section
    with VllmServer(checkpoint, log, {"hybrid": override}, [*_OPTIONS, *options]) as server:
        client = _Client(server.url, images)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = list(pool.map(client.answer, asked))
        if section is None:
            return answers, float(SHAPE.patches), float(SHAPE.patches)
        seen = server.reduced()
        return answers, seen["live_tokens"] / seen["images"], seen["kept_tokens"] / seen["images"]


class _Client:
    """Chats with a server about pictures."""

    def __init__(self, address: str, images: list[Image.Image]) -> None:
        from openai import OpenAI

        self._openai = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=_TIMEOUT)
        self._urls = [_data_url(image) for image in images]

    def answer(self, question: Asked) -> str:
        """The answer's text; one that was cut off ends in CUT.

        Raises:
            RuntimeError: the server gave the model other tokens than training did.

        """
        reply = self._ask(question)
        if reply.prompt_token_ids != [*question.before, *[IMAGE_ID] * SHAPE.patches, *question.after]:
            raise RuntimeError(f"the server's prompt for {question.text!r} is not training's")
        choice = reply.choices[0]
        text = (choice.message.content or "").strip()
        return text if choice.finish_reason == "stop" else text + CUT

    def _ask(self, question: Asked) -> Any:
        messages: list[Any] = question.messages
        picture = {"type": "image_url", "image_url": {"url": self._urls[question.picture]}}
        parts = messages[0]["content"]
        messages[0]["content"] = [picture if part["type"] == "image" else part for part in parts]
        return self._openai.chat.completions.create(
            model=_NAME,
            messages=messages,
            max_tokens=question.longest,
            temperature=0,
            # Training's prompts begin with <s>, which vLLM leaves out of chats unless it is told otherwise.
            extra_body={"add_special_tokens": True, "return_token_ids": True},
        )


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
