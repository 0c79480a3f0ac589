"""A server of many levels: its answers, and its token counts, at each."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from benchmarks.accuracy.questions import CUT, Asked
from benchmarks.vllm_server import VllmServer
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


class LevelServer:
    """A server whose levels are asked one after the other. As a context it is gone behind it.

    It starts when it is first asked, so that nothing starts where all answers are known.

    Args:
        checkpoint: folder to serve.
        override: of its `hybrid` section, with the levels.
        images: the pictures.
        options: more options of `vllm serve`.
        log: file for the server's output.

    """

    def __init__(
        self,
        checkpoint: Path,
        override: dict[str, Any],
        images: list[Image.Image],
        options: Sequence[str],
        log: Path,
    ) -> None:
        self._start = partial(VllmServer, checkpoint, log, {"hybrid": override}, [*_OPTIONS, *options])
        self._images = images
        self._running: tuple[VllmServer, _Client] | None = None
        self._stack = ExitStack()

    def answers(self, level: str, asked: list[Asked]) -> tuple[list[str], float, float]:
        """Ask everything at a level.

        Returns:
            The answers, and the average live and kept tokens of a request as the server counted them. It
            counts all that it was asked at this level.

        """
        if self._running is None:
            server = self._stack.enter_context(self._start())
            self._running = server, _Client(server.url, self._images)
        server, client = self._running
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda question: client.answer(question, level), asked))
        seen = server.reduced(level)
        return found, seen["live_tokens"] / seen["images"], seen["kept_tokens"] / seen["images"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = None
        self._stack.__exit__(kind, error, trace)


class _Client:
    """Chats with a server about pictures."""

    def __init__(self, address: str, images: list[Image.Image]) -> None:
        from openai import OpenAI

        self._openai = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=_TIMEOUT)
        self._urls = [_data_url(image) for image in images]

    def answer(self, question: Asked, level: str) -> str:
        """The answer's text at a level; one that was cut off ends in CUT.

        Raises:
            RuntimeError: the server gave the model other tokens than training did.

        """
        reply = self._ask(question, level)
        if reply.prompt_token_ids != [*question.before, *[IMAGE_ID] * SHAPE.patches, *question.after]:
            raise RuntimeError(f"the server's prompt for {question.text!r} is not training's")
        choice = reply.choices[0]
        text = (choice.message.content or "").strip()
        return text if choice.finish_reason == "stop" else text + CUT

    def _ask(self, question: Asked, level: str) -> Any:
        messages: list[Any] = question.messages
        picture = {"type": "image_url", "image_url": {"url": self._urls[question.picture], "detail": level}}
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
