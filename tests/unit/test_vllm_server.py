"""The launcher of servers, with another program in the place of vLLM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_server import VllmServer

WAITS = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that were started, each of a program that waits."""
    processes: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_other(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        processes.append(start(WAITS, stdin=subprocess.PIPE, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start_other)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_server_ends_when_waiting_for_it_is_broken_off(
    started: list[subprocess.Popen[bytes]],
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken_off(self: VllmServer, path: str) -> str:
        raise error

    monkeypatch.setattr(VllmServer, "_get", broken_off)
    with pytest.raises(error), VllmServer(tmp_path, tmp_path / "log", {}):
        pytest.fail("it is not ready")
    assert started[0].returncode is not None


def test_a_server_that_ends_says_its_last_lines(
    started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    server = VllmServer(tmp_path, tmp_path / "log", {})
    server.log.write_text("no such model")
    assert started[0].stdin is not None
    started[0].stdin.close()
    with pytest.raises(RuntimeError, match="the server did not start:\nno such model"):
        server.ready()


def test_pieces_of_an_answer_that_is_streamed(
    started: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [
        b'data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n',
        b'data: {"error": "out of memory"}\n\n',
    ]
    monkeypatch.setattr("urllib.request.urlopen", lambda request: BytesIO(answers.pop(0)))
    server = VllmServer(tmp_path, tmp_path / "log", {})
    assert list(server.stream("/v1/completions", {})) == [{"a": 1}, {"a": 2}]
    with pytest.raises(RuntimeError, match="the server broke off: out of memory"):
        list(server.stream("/v1/completions", {}))
