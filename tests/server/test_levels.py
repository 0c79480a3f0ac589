"""Levels over a real server's APIs, asked with the stock `openai` client."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.support.engines import ServingReference, checkpoint, images, thresholds
from tests.support.reference import AtLevel, keep_count
from tests.support.tiny_checkpoints import PATCHES
from tests.support.vllm_server import Server, data_url, png

MODEL: dict[str, Any] = {"model": "tiny", "temperature": 0}
LEVELS = ("low", "mid", "high", "full")


def section() -> dict[str, Any]:
    merging = {"thresholds": list(thresholds())}
    return {
        "levels": {"low": {**merging, "fastv_ratio": 0.5}, "mid": merging, "high": {"fastv_ratio": 0.25}},
        "default_level": "mid",
        "detail": {"thumbnail": "low"},
        "fastv_layer": 2,
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(checkpoint(), tmp_path_factory.mktemp("levels") / "log", section())
    with running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as opened:
        yield opened


def url(index: int) -> str:
    return data_url(png(images(8)[index]))


def picture(index: int, **more: Any) -> dict[str, Any]:
    """A picture's part of a message, with more of what OpenAI's API says of it."""
    return {"type": "image_url", "image_url": {"url": url(index), **more}}


def ask(client: OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    content: list[Any] = [*parts, {"type": "text", "text": "What is here?"}]
    messages: list[Any] = [{"role": "user", "content": content}]
    return client.chat.completions.create(messages=messages, **(MODEL | {"max_tokens": 2} | options))


class Counting:
    """Images that the server counted at each level since the last look."""

    def __init__(self, server: Server) -> None:
        self.url = f"{server.url}/metrics"
        self.before = self._read()

    def _read(self) -> dict[str, int]:
        text = urllib.request.urlopen(self.url).read().decode()
        lines = re.findall(r'^vllm_hybrid:images_total\{.*level="([^"]+)".*\} (\S+)$', text, re.MULTILINE)
        return {level: int(float(count)) for level, count in lines}

    def new(self) -> dict[str, int]:
        now = self._read()
        grown = {level: n - self.before[level] for level, n in now.items() if n != self.before[level]}
        self.before = now
        return grown


@pytest.fixture
def counted(server: Server) -> Counting:
    found = Counting(server)
    assert set(found.before) == set(LEVELS)
    return found


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("detail", "level"),
    [
        ({}, "mid"),
        ({"detail": "auto"}, "mid"),
        ({"detail": "low"}, "low"),
        ({"detail": "high"}, "high"),
    ],
)
def test_details_of_chat_completions(
    client: OpenAI, counted: Counting, detail: dict[str, str], level: str
) -> None:
    ask(client, picture(0, **detail), picture(1, **detail))
    assert counted.new() == {level: 2}


def test_pictures_of_one_message_have_their_own(client: OpenAI, counted: Counting) -> None:
    ask(client, picture(0, detail="low"), picture(0, detail="high"), picture(0))
    assert counted.new() == {"low": 1, "mid": 1, "high": 1}


def test_a_detail_beside_the_picture_and_other_names(client: OpenAI, counted: Counting) -> None:
    """Where earlier servers looked for it; and what OpenAI's API does not know, but the section names."""
    ask(client, {**picture(2), "detail": "low"})
    ask(client, {**picture(2), "detail": "full"})
    ask(client, {**picture(2), "detail": "thumbnail"})
    assert counted.new() == {"low": 2, "full": 1}


def test_the_responses_api(client: OpenAI, counted: Counting) -> None:
    for detail, level in (("low", "low"), ("auto", "mid"), ("original", "full")):
        part: dict[str, Any] = {"type": "input_image", "image_url": url(3), "detail": detail}
        text = {"type": "input_text", "text": "What is here?"}
        message: Any = [{"role": "user", "content": [part, text]}]
        client.responses.create(model="tiny", input=message, max_output_tokens=2)
        assert counted.new() == {level: 1}
    part.pop("detail")
    xargs = {"vllm_xargs": {"hybrid_level": "high"}}
    client.responses.create(model="tiny", input=message, max_output_tokens=2, extra_body=xargs)
    assert counted.new() == {"high": 1}


def test_messages_of_anthropic_s_api(server: Server, counted: Counting) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": url(4).partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is here?"}]
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
    assert post(server, "/v1/messages", body)[0] == 200
    assert counted.new() == {"mid": 1}
    assert post(server, "/v1/messages", body | {"vllm_xargs": {"hybrid_level": "full"}})[0] == 200
    assert counted.new() == {"full": 1}
    status, error = post(server, "/v1/messages", body | {"vllm_xargs": {"hybrid_level": "best"}})
    assert status == 400 and "use low, mid, high or full" in json.dumps(error)


def test_a_request_s_level_goes_for_all_its_pictures(client: OpenAI, counted: Counting) -> None:
    xargs = {"vllm_xargs": {"hybrid_level": "full"}}
    ask(client, picture(0, detail="low"), picture(1), extra_body=xargs)
    assert counted.new() == {"full": 2}
    ask(client, picture(0, detail="low"), n=2, extra_body=xargs | {"use_beam_search": True})
    assert counted.new().keys() == {"full"}


@pytest.mark.parametrize("name", ["best", "LOW", ""])
def test_unknown_names_are_refused_in_one_sentence(client: OpenAI, name: str) -> None:
    with pytest.raises(BadRequestError, match=r"hybrid_level is .*use low, mid, high or full"):
        ask(client, picture(0), extra_body={"vllm_xargs": {"hybrid_level": name}})
    known = "use auto, original, low, mid, high, full or thumbnail"
    with pytest.raises(BadRequestError, match=rf"detail is .*{known}"):
        ask(client, {**picture(0), "detail": name})
    assert ask(client, extra_body={"vllm_xargs": {"hybrid_level": name}}).choices
    # The picture is answered for when it is asked for rightly.
    assert ask(client, picture(0)).choices


def test_a_detail_that_openai_s_api_has_not_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="detail is 'best'.*use auto, original, low, mid, high"):
        ask(client, picture(0, detail="best"))


def test_streams_are_refused_as_a_whole(client: OpenAI) -> None:
    """Not with an event inside a stream that began well."""
    with pytest.raises(BadRequestError, match="detail is 'best'"):
        ask(client, picture(0, detail="best"), stream=True)
    with pytest.raises(BadRequestError, match="hybrid_level is 'best'"):
        ask(client, picture(0), stream=True, extra_body={"vllm_xargs": {"hybrid_level": "best"}})


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "said",
    [3, True, ["low"], {"low": 1}, "x" * 10_000, "\ud800", "@low", nested(400)],
    ids=[
        "a number",
        "a truth",
        "a list",
        "an object",
        "a long text",
        "half a character",
        "a mark",
        "a deep list",
    ],
)
def test_odd_details_are_refused_shortly(server: Server, said: Any) -> None:
    content = [{**picture(0), "detail": said}, {"type": "text", "text": "What is here?"}]
    status, error = post(
        server, "/v1/chat/completions", {**MODEL, "messages": [{"role": "user", "content": content}]}
    )
    assert status == 400 and "use auto, original, low, mid, high" in error["error"]["message"]
    assert len(error["error"]["message"]) < 400


@pytest.mark.parametrize("said", ["full", ["full"], 1, {"hybrid_level": ["full"]}])
def test_odd_arguments_cost_no_other_api_an_error(server: Server, said: Any) -> None:
    body = {**MODEL, "messages": [{"role": "user", "content": "Hello."}], "vllm_xargs": said}
    status, reply = post(server, "/tokenize", body)
    assert status == 200 and reply["count"] > 1


def expected_cost(shown: list[tuple[int, str]]) -> list[dict[str, Any]]:
    reference = ServingReference(checkpoint(), section())
    ratios = {"low": 0.5, "mid": 0.0, "high": 0.25, "full": 0.0}
    costs = []
    for index, level in shown:
        live = reference.live(AtLevel(images(8)[index], level))
        kept = keep_count(live, ratios[level])
        costs.append({"level": level, "tokens": PATCHES, "live_tokens": live, "kept_tokens": kept})
    return costs


@pytest.mark.parametrize("stops", [{}, {"stop": ["e", "a", "i", " "]}], ids=["by length", "by a stop string"])
def test_a_response_tells_its_cost_where_asked(client: OpenAI, stops: dict[str, Any]) -> None:
    shown = [(0, "low"), (1, "full"), (0, "high")]
    parts = [
        picture(index, detail=level) if level != "full" else picture(index) | {"detail": level}
        for index, level in shown
    ]
    asks = {"extra_body": {"vllm_xargs": {"hybrid_cost": 1}}, "max_tokens": 8, **stops}
    answer = ask(client, *parts, **asks)
    cost = answer.kv_transfer_params["hybrid"]
    assert cost["images"] == expected_cost(shown)
    assert 0 < cost["kv_bytes"] < cost["kv_bytes_full"]
    chunks = [chunk.model_dump() for chunk in ask(client, *parts, stream=True, **asks)]
    told = [chunk["kv_transfer_params"]["hybrid"] for chunk in chunks if chunk.get("kv_transfer_params")]
    assert told == [cost]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == answer.choices[0].message.content


def test_a_level_that_drops_nothing_holds_what_the_full_model_holds(client: OpenAI) -> None:
    xargs = {"vllm_xargs": {"hybrid_cost": 1, "hybrid_level": "full"}}
    cost = ask(client, picture(5), extra_body=xargs).kv_transfer_params["hybrid"]
    assert cost["images"] == expected_cost([(5, "full")])
    # Blocks of the lower tier are larger, so that one may hold more unused slots.
    assert cost["kv_bytes_full"] <= cost["kv_bytes"] < 1.1 * cost["kv_bytes_full"]


def test_what_is_not_asked_for_is_not_told(client: OpenAI) -> None:
    assert ask(client, picture(0)).kv_transfer_params is None
    chunks = ask(client, picture(0), stream=True)
    assert not any(chunk.model_dump().get("kv_transfer_params") for chunk in chunks)
    with pytest.raises(BadRequestError, match="hybrid_cost is 'please'; give 1"):
        ask(client, picture(0), extra_body={"vllm_xargs": {"hybrid_cost": "please"}})


def test_other_apis_tell_costs_too(server: Server, client: OpenAI) -> None:
    part: dict[str, Any] = {"type": "input_image", "image_url": url(3), "detail": "low"}
    message: Any = [{"role": "user", "content": [part, {"type": "input_text", "text": "What is here?"}]}]
    xargs = {"vllm_xargs": {"hybrid_cost": 1}}
    response: Any = client.responses.create(
        model="tiny", input=message, max_output_tokens=2, extra_body=xargs
    )
    assert response.kv_transfer_params["hybrid"]["images"] == expected_cost([(3, "low")])
    source = {"type": "base64", "media_type": "image/png", "data": url(3).partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is here?"}]
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": content}], **xargs}
    status, reply = post(server, "/v1/messages", body)
    assert status == 200 and reply["kv_transfer_params"]["hybrid"]["images"] == expected_cost([(3, "mid")])


def test_the_picture_s_level_is_in_the_log_of_the_start(server: Server) -> None:
    log = server.output
    assert "Levels: low merges and drops 0.5, mid merges, high drops 0.25, full keeps all." in log
    assert "Pictures without a detail: mid; detail low: low; detail high: high." in log
