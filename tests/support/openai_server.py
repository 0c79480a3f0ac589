"""A server for tests that answers as OpenAI's API does, without a model."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What to answer to the pictures and the text of a question; a number is an HTTP status to refuse with.
Answer = Callable[[list[str], str], "str | int"]


@dataclass
class FakeServer:
    """A running server.

    Attributes:
        models: names it serves.
        answer: what it says.
        requests: all chat requests so far, in the order they came.
        most_at_once: the most requests that were in flight together.

    """

    models: list[str]
    answer: Answer
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    port: int = 0
    root: str = "/checkpoints/a"
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def texts(self) -> list[str]:
        """The text of every question so far."""
        return [_parts(request)[1] for request in self.requests]

    def _chat(self, request: dict[str, Any]) -> str | int:
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.answer(*_parts(request))
        finally:
            with self._lock:
                self._now -= 1


class _Listening(ThreadingHTTPServer):
    def handle_error(self, *arguments: Any) -> None:
        """Say nothing of clients that left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*arguments)


def _parts(request: dict[str, Any]) -> tuple[list[str], str]:
    *pictures, text = request["messages"][0]["content"]
    return [part["image_url"]["url"] for part in pictures], text["text"]


@contextmanager
def fake_server(answer: Answer, *models: str) -> Iterator[FakeServer]:
    """Run a server on a free port of this machine."""
    state = FakeServer(list(models) or ["tiny"], answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "root": state.root} for name in state.models]
            self._send(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            said = state._chat(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(said, int):
                return self._send(said, {"error": {"message": f"refused with {said}", "code": said}})
            cut = said.endswith("...")
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": said},
                "finish_reason": "length" if cut else "stop",
            }
            usage = {"prompt_tokens": 600, "completion_tokens": 4, "total_tokens": 604}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            self._send(200, reply | {"usage": usage})

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    listening = _Listening(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    state.port = listening.server_port
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        listening.shutdown()
        listening.server_close()
