"""One engine behind two API server processes, asked with the stock `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import islice
from typing import Any

import psutil
import pytest

from benchmarks.vllm_server import reduced
from tests.support.engines import (
    CHOICE_MARGIN,
    MERGE_MARGIN,
    TOLERANCE,
    ServingReference,
    checkpoint,
    images,
    thresholds,
)
from tests.support.reference import AtLevel
from tests.support.tiny_checkpoints import PATCHES, prompt
from tests.support.vllm_server import Server, data_url, png
from vllm_hybrid.method.fastv import live_to_kept

LEVELS = ("low", "full")
RATIO = 0.5
QUESTION = "What is here?"


def section() -> dict[str, Any]:
    low = {"thresholds": list(thresholds()), "fastv_ratio": RATIO}
    return {"levels": {"low": low}, "default_level": "full", "fastv_layer": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("api_servers") / "log"
    with pytest.MonkeyPatch.context() as environment:
        # A connection is how a test knows a process, so none may end while nobody asks.
        environment.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "86400")
        running = Server(checkpoint(), log, section(), "--api-server-count=2")
    with running:
        yield running


class Process:
    """One of a server's API server processes, held by a connection that stays open.

    All of them listen on one socket, and whoever is free takes a new connection.
    """

    def __init__(self, server: Server) -> None:
        self.connection = HTTPConnection("127.0.0.1", server.port)
        self.get("/health")
        place = self.connection.sock.getsockname()
        self.pid = next(
            process.pid
            for process in psutil.Process(server.process.pid).children(recursive=True)
            for other in process.net_connections("tcp")
            if other.raddr and tuple(other.raddr) == place
        )

    def get(self, path: str) -> str:
        """The answer to a request without content."""
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def post(self, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of a chat completion."""
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(content), headers)
        reply = self.connection.getresponse()
        return reply.status, json.loads(reply.read())


@pytest.fixture(scope="module")
def processes(server: Server) -> Iterator[list[Process]]:
    """A connection to each of the two processes."""
    opened: list[Process] = []
    while len({process.pid for process in opened}) < 2:
        # At once, so that the process that took one is not always free to take the next.
        with ThreadPoolExecutor(8) as pool:
            opened += pool.map(lambda _: Process(server), range(8))
    yield list({process.pid: process for process in opened}.values())
    for process in opened:
        process.connection.close()


def chat(*parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": QUESTION}]
    usual = {"model": "tiny", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    return {**usual, "messages": [{"role": "user", "content": content}], **options}


def shown(index: int, **detail: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(images(8)[index])), **detail}}


def decided() -> dict[str, list[int]]:
    """By level, pictures of whose tokens rounding merges and drops no other ones."""
    reference = ServingReference(checkpoint(), section())
    ids = reference.prompt_ids(prompt(QUESTION))[1:]

    def is_decided(picture: AtLevel) -> bool:
        choices = reference.choices(ids, [picture]) if picture.level != "full" else []
        margins = all(choice.margin > CHOICE_MARGIN for choice in choices)
        return margins and reference.merge_margin(picture) > MERGE_MARGIN

    found = {
        level: list(islice((i for i, image in enumerate(images(8)) if is_decided(AtLevel(image, level))), 2))
        for level in LEVELS
    }
    assert all(found.values())
    return found


def test_both_processes_answer_as_the_reference(processes: list[Process]) -> None:
    """Each level's pictures, one after the other and all at once from both."""
    reference = ServingReference(checkpoint(), section())
    ids = reference.prompt_ids(prompt(QUESTION))[1:]
    asked = [(index, level) for level, indices in decided().items() for index in indices]
    asks = {"logprobs": True, "return_token_ids": True}

    def answers(process: Process) -> list[Any]:
        return [process.post(chat(shown(index), **asks | at(level))) for index, level in asked]

    def at(level: str) -> dict[str, Any]:
        return {"vllm_xargs": {"hybrid_cost": 1, "hybrid_level": level}}

    alone = [answers(process) for process in processes]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(answers, processes))
    for all_answers in (*alone, *together):
        for (index, level), (status, answer) in zip(asked, all_answers, strict=True):
            assert status == 200, answer
            (choice,) = answer["choices"]
            picture = AtLevel(images(8)[index], level)
            wanted = reference.score(ids, [picture], choice["token_ids"]).logprobs
            found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert found == pytest.approx(wanted.tolist(), abs=TOLERANCE)
            live = reference.live(picture)
            kept = live_to_kept(live, RATIO) if level == "low" else live
            cost = {"level": level, "tokens": PATCHES, "live_tokens": live, "kept_tokens": kept}
            assert answer["kv_transfer_params"]["hybrid"]["images"] == [cost]


def test_counters_of_both_processes_add_up(processes: list[Process]) -> None:
    """Whichever process the engine's counts come to, and whichever is asked."""
    reference = ServingReference(checkpoint(), section())

    def counts() -> list[dict[str, dict[str, float]]]:
        texts = [process.get("/metrics") for process in processes]
        return [{level: reduced(text, level) for level in LEVELS} for text in texts]

    before, same = counts()
    assert before == same
    # Pictures of their own, so that nothing is found in the prefix cache.
    pictures = {"low": (4, 5, 6), "full": (7,)}
    for level, indices in pictures.items():
        for place, index in enumerate(indices):
            content = chat(shown(index, detail="low") if level == "low" else shown(index))
            content["messages"][0]["content"][-1]["text"] = f"Is this picture {index} of {level}?"
            status, answer = processes[place % 2].post(content)
            assert status == 200, answer
    wanted = {level: dict(before[level]) for level in LEVELS}
    for level, indices in pictures.items():
        lives = [reference.live(AtLevel(images(8)[index], level)) for index in indices]
        keeps = [live_to_kept(live, RATIO) if level == "low" else live for live in lives]
        moved = {"images": len(lives), "patches": PATCHES * len(lives)}
        moved |= {"live_tokens": sum(lives), "kept_tokens": sum(keeps)}
        wanted[level] = {name: count + moved.get(name, 0) for name, count in wanted[level].items()}

    def without_blocks(one: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return {
            level: {name: count for name, count in of_level.items() if name != "blocks_given_back"}
            for level, of_level in one.items()
        }

    # Counts may come to the other process than the answer, so with one more answer they are there.
    for process in processes * 5:
        found = [without_blocks(one) for one in counts()]
        if found == [without_blocks(wanted)] * 2:
            break
        assert process.post(chat())[0] == 200
    assert found == [without_blocks(wanted)] * 2
    assert counts()[0]["low"]["blocks_given_back"] > before["low"]["blocks_given_back"]


def test_bad_requests_are_refused_by_both_and_their_pictures_served_by_either(
    processes: list[Process],
) -> None:
    refused = [
        (chat(shown(1, detail="best")), "detail is 'best'"),
        (chat(shown(2), vllm_xargs={"hybrid_level": "best"}), "use low or full"),
        (chat(shown(3), prompt_logprobs=1), "prompt_logprobs=1 is not supported"),
    ]
    for first, other in (processes, processes[::-1]):
        for content, sentence in refused:
            status, answer = first.post(content)
            assert status == 400 and sentence in answer["error"]["message"]
        for index in (1, 2, 3):
            said = [process.post(chat(shown(index))) for process in (other, first)]
            assert [status for status, _ in said] == [200, 200]
            assert said[0][1]["choices"] == said[1][1]["choices"]
