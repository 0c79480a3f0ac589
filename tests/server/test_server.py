"""A real `vllm serve`, asked with the `openai` client."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from PIL import Image

from tests.support.engines import (
    CHOICE_MARGIN,
    MERGE_MARGIN,
    TOLERANCE,
    ServingReference,
    checkpoint,
    hybrid_section,
    images,
)
from tests.support.tiny_checkpoints import PATCHES, prompt
from tests.support.vllm_server import Server, data_url, png
from vllm_hybrid import cli
from vllm_hybrid.method.fastv import live_to_kept

QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--enable-mm-embeds", "--enable-scale-out", "--enable-prompt-tokens-details")
    with pytest.MonkeyPatch.context() as environment:
        # What empties caches is offered to developers only.
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")
        running = Server(checkpoint(), log, hybrid_section("both"), *options)
    with running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as opened:
        yield opened


def ask(client: OpenAI, *urls: str, text: str = QUESTION, **options: Any) -> Any:
    """One chat completion about these images, greedy unless told otherwise."""
    return ask_parts(client, *[image_part(url) for url in urls], {"type": "text", "text": text}, **options)


def ask_parts(client: OpenAI, *parts: Any, **options: Any) -> Any:
    """One chat completion about these content parts, greedy unless told otherwise."""
    usual: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    messages: list[Any] = [{"role": "user", "content": list(parts)}]
    return client.chat.completions.create(messages=messages, **(usual | options))


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def embeddings_part(embeddings: torch.Tensor) -> dict[str, Any]:
    """An image whose features a client computed."""
    buffer = io.BytesIO()
    torch.save(embeddings, buffer)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}


def chat(kind: str) -> tuple[ServingReference, list[int]]:
    """The reference, and the prompt of QUESTION about an image: the chat template's has no <s>."""
    reference = ServingReference(checkpoint(), hybrid_section(kind))
    return reference, reference.prompt_ids(prompt(QUESTION))[1:]


def decided_pictures(kind: str) -> Iterator[Image.Image]:
    """Pictures of whose tokens rounding drops no other ones when asked QUESTION."""
    reference, ids = chat(kind)
    for picture in images(8):
        if (
            reference.merge_margin(picture) > MERGE_MARGIN
            and reference.choices(ids, [picture])[0].margin > CHOICE_MARGIN
        ):
            yield picture


def said(answer: Any) -> str:
    return answer.choices[0].message.content


def url(index: int = 0) -> str:
    return data_url(png(images(8)[index]))


def test_an_image_costs_the_prompt_576_tokens(client: OpenAI) -> None:
    reference = ServingReference(checkpoint(), hybrid_section("both"))
    counted = [ask(client, *[url(i) for i in range(n)]).usage.prompt_tokens for n in range(3)]
    ids = [reference.prompt_ids(prompt(QUESTION, n)) for n in range(3)]
    placeholder = reference.config.image_token_index
    assert [sequence.count(placeholder) for sequence in ids] == [0, PATCHES, 2 * PATCHES]
    assert [n - counted[0] for n in counted] == [len(sequence) - len(ids[0]) for sequence in ids]


def test_a_prompt_asked_again_is_found_in_the_prefix_cache(server: Server, client: OpenAI) -> None:
    """Until the cache is emptied, and with the same answer every time."""
    content = image_part(url(4)), {"type": "text", "text": "Is this asked for the first time?"}

    def asked() -> tuple[int, str]:
        answer = ask_parts(client, *content)
        return answer.usage.prompt_tokens_details.cached_tokens, said(answer)

    before = prefix_hits(server)
    (first, text), (again, same) = asked(), asked()
    assert first < PATCHES < again and text == same
    assert prefix_hits(server) == before + first + again
    for cache in ("prefix", "mm", "encoder"):
        urllib.request.urlopen(
            urllib.request.Request(f"{server.url}/reset_{cache}_cache", method="POST")
        ).close()
    assert asked() == (0, text)


def prefix_hits(server: Server) -> float:
    """Positions found in the prefix cache so far, as /metrics says."""
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    counts = [line.split()[-1] for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
    return sum(map(float, counts))


def test_different_images_get_different_answers(client: OpenAI) -> None:
    answers = {said(ask(client, url(i), max_tokens=16)) for i in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_says_the_same(client: OpenAI, count: int) -> None:
    urls = [url(i) for i in range(count)]
    whole = said(ask(client, *urls))
    pieces = [c.choices[0].delta.content or "" for c in ask(client, *urls, stream=True) if c.choices]
    assert "".join(pieces) == whole != ""


def test_a_seed_repeats_a_sample_and_n_makes_several(client: OpenAI) -> None:
    options: dict[str, Any] = {"n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    first, again = (ask(client, url(), **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(texts) == 2
    assert texts == [choice.message.content for choice in again.choices]


def test_a_stop_string_ends_the_answer(client: OpenAI) -> None:
    whole = said(ask(client, url(), max_tokens=12))
    stop = whole[len(whole) // 2 :][:3]
    stopped = ask(client, url(), max_tokens=12, stop=[stop])
    assert said(stopped) == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_the_tokens(client: OpenAI) -> None:
    answer = ask(client, url(), logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("data:image/png;base64,!!!!", "Non-base64 digit found"),
        (data_url(png(Image.effect_noise((64, 64), 50))[:200]), "image file is truncated"),
        (data_url(b"no picture at all"), "cannot identify image file"),
    ],
    ids=["broken base64", "truncated PNG", "text file"],
)
def test_a_bad_image_is_refused_and_others_go_on(client: OpenAI, broken: str, message: str) -> None:
    wanted = said(ask(client, url()))
    with ThreadPoolExecutor() as pool:
        good = pool.submit(ask, client, url())
        with pytest.raises(BadRequestError, match=message):
            ask(client, broken)
        assert said(good.result()) == wanted


def test_a_picture_that_would_take_all_memory_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="a picture of 1 x 200000 grows to"):
        ask(client, data_url(png(Image.new("RGB", (1, 200_000)))))


def test_a_prompt_that_is_too_long_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="4096"):
        ask(client, *[url(i) for i in range(3)], text="word " * 3000)


def test_prompt_log_probabilities_are_refused_in_one_sentence(client: OpenAI) -> None:
    sentence = "prompt_logprobs=1 is not supported with reduced image tokens"
    with pytest.raises(BadRequestError, match=sentence):
        ask(client, url(), extra_body={"prompt_logprobs": 1})
    with pytest.raises(BadRequestError, match=sentence):
        client.completions.create(model="tiny", prompt="Hello", echo=True, logprobs=1, max_tokens=1)
    assert said(ask(client, url()))


def test_embeddings_of_no_whole_image_are_refused_and_the_server_goes_on(client: OpenAI) -> None:
    whole = torch.randn(PATCHES, 128)
    broken = whole.clone()
    broken[3, 5] = torch.nan
    wrong = [whole[:100], torch.randn(PATCHES + 1, 128), whole[:, :64], broken]
    # Beside floating-point numbers vLLM would take others for such.
    for parts in [[whole.long()], *([part] for part in wrong), *([whole, part] for part in wrong)]:
        with pytest.raises(BadRequestError, match="image_embeds of an image|hidden dimension mismatch"):
            ask_parts(client, *map(embeddings_part, parts), {"type": "text", "text": QUESTION})
    part = embeddings_part(whole)
    with pytest.raises(BadRequestError, match="image_embeds of an image is an object"):
        named = part | {"image_embeds": {"image_embeds": part["image_embeds"]}}
        ask_parts(client, named, {"type": "text", "text": QUESTION})
    assert said(ask(client, url()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embeddings_are_served_unmerged_and_pruned(client: OpenAI, dtype: torch.dtype) -> None:
    reference, ids = chat("fastv")
    picture = next(decided_pictures("fastv"))
    features = embeddings_part(reference.encode(picture)[0].to(dtype))
    answer = ask_parts(
        client,
        features,
        {"type": "text", "text": QUESTION},
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    assert answer.prompt_token_ids == ids
    wanted = reference.score(ids, [picture], answer.choices[0].token_ids).logprobs
    found = [entry.logprob for entry in answer.choices[0].logprobs.content]
    assert found == pytest.approx(wanted.tolist(), abs=TOLERANCE)


def test_the_picture_of_a_refused_request_can_be_asked_about(client: OpenAI) -> None:
    picture = data_url(png(Image.effect_noise((200, 300), 90)))
    with pytest.raises(BadRequestError, match="prompt_logprobs=1 is not supported"):
        ask(client, picture, extra_body={"prompt_logprobs": 1})
    assert said(ask(client, picture))


def test_features_that_a_client_made_are_looked_at(server: Server, client: OpenAI) -> None:
    """By vLLM's token API; the features are those that a server rendered, but for their places."""
    message = {"role": "user", "content": [image_part(url(6)), {"type": "text", "text": QUESTION}]}
    rendered = server.post("/v1/chat/completions/render", {"model": "tiny", "messages": [message]})
    request = rendered | {"sampling_params": {"max_tokens": 8, "temperature": 0}}
    (place,) = request["features"]["mm_placeholders"]["image"]
    assert place["length"] == PATCHES
    for length in (100, PATCHES - 1):
        place["length"] = length
        request["features"]["mm_hashes"]["image"] = [f"of {length}"]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.post("/inference/v1/generate", request)
    place["length"] = PATCHES
    request["features"]["mm_hashes"]["image"] = ["whole"]
    (choice,) = server.post("/inference/v1/generate", request)["choices"]
    answer = ask(client, url(6), extra_body={"return_token_ids": True})
    assert choice["token_ids"] == answer.choices[0].token_ids


def test_one_beam_is_the_greedy_answer(client: OpenAI) -> None:
    """What is dropped of an image is the prompt's choice, not that of what the beam has chosen since."""
    for picture in decided_pictures("both"):
        greedy, beam = (
            ask(
                client,
                data_url(png(picture)),
                logprobs=True,
                extra_body={"use_beam_search": searched, "ignore_eos": True},
            )
            for searched in (False, True)
        )
        wanted, found = ([e.logprob for e in a.choices[0].logprobs.content] for a in (greedy, beam))
        assert found == pytest.approx(wanted, abs=TOLERANCE)
        assert said(beam).strip() == said(greedy).strip()


def test_many_clients_get_the_answers_they_would_get_alone(client: OpenAI) -> None:
    asked = [(url(i % 8), f"Question {i % 16}?") for i in range(32)]
    alone = {pair: said(ask(client, pair[0], text=pair[1])) for pair in asked[:16]}
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda pair: said(ask(client, pair[0], text=pair[1])), asked))
    assert together == [alone[pair] for pair in asked]


def wait_until_idle(server: Server, client: OpenAI) -> None:
    """Wait for a request-free server with an empty KV cache; fail when it does not get there.

    The server is given steps to get there, not time: each round is a request answered from first to last.
    """
    for _ in range(50):
        seen = server.metrics()
        if seen["vllm:num_requests_running"] == 0 == seen["vllm:kv_cache_usage_perc"]:
            return
        client.completions.create(model="tiny", prompt="Hello", max_tokens=1)
        time.sleep(0.1)
    raise AssertionError("requests or KV blocks are left over")


def test_a_client_that_leaves_leaves_nothing_behind(server: Server, client: OpenAI) -> None:
    # So long that the server notices in time that nobody waits, however busy the machine is.
    generated, long_answer = "vllm:generation_tokens_total", 3400
    before = server.metrics()[generated]
    stream = ask(client, url(), stream=True, max_tokens=long_answer, extra_body={"ignore_eos": True})
    next(stream)
    while (seen := server.metrics())["vllm:kv_cache_usage_perc"] == 0:
        assert seen[generated] - before < long_answer, "the request never held a block"
    stream.close()
    wait_until_idle(server, client)
    assert server.metrics()[generated] - before < long_answer, "the answer was completed for nobody"


def test_the_counters_say_what_was_reduced(server: Server, client: OpenAI) -> None:
    """One request decodes on; the other ends in the very step that filled its images."""
    pictures = images(8)[5:8]
    section = hybrid_section("both")
    reference = ServingReference(checkpoint(), section)
    live = [reference.live(image) for image in pictures]
    before = server.metrics()
    urls = [data_url(png(image)) for image in pictures]
    ask(client, urls[0], text="How many?", max_tokens=6, extra_body={"ignore_eos": True})
    ask(client, *urls[1:], text="Which?", max_tokens=1)
    wait_until_idle(server, client)
    after = server.metrics()
    wanted = {
        "images": 3,
        "patches": 3 * PATCHES,
        "live_tokens": sum(live),
        "kept_tokens": sum(live_to_kept(n, section["fastv_ratio"]) for n in live),
    }
    names = {name: f"vllm_hybrid:{name}_total" for name in [*wanted, "blocks_given_back"]}
    moved = {name: after[sample] - before[sample] for name, sample in names.items()}
    assert moved.pop("blocks_given_back") > 0
    assert moved == wanted


def test_eval_gets_the_answers_that_clients_get(
    server: Server, client: OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    contents = [base64.b64encode(png(image)).decode() for image in images(8)[:3]]
    rows = [f"{at}\t{content}\t{QUESTION}\tno answer is right" for at, content in enumerate(contents)]
    (tmp_path / "Toy.tsv").write_text("\n".join(["index\timage\tquestion\tanswer", *rows]) + "\n")
    options = ["--data", tmp_path / "Toy.tsv", "--url", server.url, "--out", tmp_path / "out"]
    options += ["--prompt", "{question}", "--max-tokens", 8]
    monkeypatch.setattr("sys.argv", ["vllm-hybrid", "eval", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    lines = (tmp_path / "out" / "Toy" / "tiny" / "predictions.jsonl").read_text().splitlines()
    answers = {line["index"]: line["prediction"] for line in map(json.loads, lines)}
    assert answers == {str(at): said(ask(client, url(at))).strip() for at in range(3)}


def test_a_wrong_section_stops_the_server_at_start(tmp_path: Any) -> None:
    failing = Server(checkpoint(), tmp_path / "log", {"fastv_ratio": 2})
    try:
        assert failing.process.wait() != 0
    finally:
        failing.kill()
    sentence = "hybrid.fastv_ratio is 2; give a number from 0 up to but not including 1"
    *before, last = failing.output.splitlines()
    assert last == f"vllm-hybrid: error: {sentence}"
    assert "ERROR" in before[-1] and before[-1].endswith(f"vllm-hybrid: {sentence}")
    assert "Traceback" not in failing.output


def test_an_interrupt_ends_the_server_cleanly(server: Server) -> None:
    """Last, because the server is gone after it."""
    assert server.interrupt() == 0
    assert "vllm_hybrid/" not in server.output
