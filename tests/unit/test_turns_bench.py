"""The conversation benchmark's conversations, counting and tables, beside a server that is none."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.checkpoint import answer_words, data_url
from benchmarks.engine import overrides
from benchmarks.turns import (
    Client,
    Conversation,
    Turn,
    conversation,
    hit_rate,
    medians,
    messages,
    run_pass,
    table,
    turn_table,
    write_report,
)
from benchmarks.vllm_server import summed_samples
from vllm_hybrid.demo.tokenizer import write_tokenizer

METRICS = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{{engine="0",model_name="bench"}} {queries}
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{{engine="0",model_name="bench"}} {hits}
vllm:prefix_cache_hits_total{{engine="1",model_name="bench"}} 0.0
"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


# ---- conversations --------------------------------------------------------------------------------


def test_conversations_are_the_same_every_time_and_have_a_picture_each(tokenizer: Any) -> None:
    talks = [conversation(number, 6) for number in range(32)]
    assert talks == [conversation(number, 6) for number in range(32)]
    assert len({talk.picture for talk in talks}) == len({talk.questions for talk in talks}) == 32
    for talk in talks:
        for text in talk.questions:
            assert 10 <= len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 20


def test_a_turn_sends_all_that_was_said() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:x"}}
    first = {"role": "user", "content": [picture, {"type": "text", "text": "a?"}]}
    assert messages("data:x", ["a?", "b?", "c?"], []) == [first]
    assert messages("data:x", ["a?", "b?", "c?"], ["A"]) == [
        first,
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": [{"type": "text", "text": "b?"}]},
    ]


def test_pictures_are_sent_as_png() -> None:
    head, data = data_url(3).split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (336, 336)
    assert data_url(3) != data_url(4)


def test_answers_become_the_same_tokens_when_they_are_sent_back(tmp_path: Path, tokenizer: Any) -> None:
    words = answer_words(tmp_path)
    assert len(words) > 100
    header = "USER: Which? ASSISTANT:"
    before, ids = tokenizer(header)["input_ids"], [*words, *reversed(words)]
    text = tokenizer.decode([*before, *ids], skip_special_tokens=True).removeprefix(header)
    assert text[0] == " " and tokenizer(f"{header} {text.strip()}</s>")["input_ids"] == [*before, *ids, 2]


class Answers:
    """A server that answers with the number of messages, and counts as one whose cache has half of it all."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []

    def stream(self, _: str, content: dict[str, Any]) -> Any:
        said = content["messages"]
        self.asked.append(said)
        for word in ("", f" {len(said)}", " so"):
            yield {"choices": [{"delta": {"content": word}}]}
        details = {"cached_tokens": 5 * len(said)}
        usage = {"completion_tokens": 2, "prompt_tokens": 10 * len(said), "prompt_tokens_details": details}
        yield {"choices": [], "usage": usage}

    def metrics(self) -> dict[str, float]:
        sent = sum(map(len, self.asked))
        text = METRICS.format(queries=10.0 * sent, hits=5.0 * sent)
        return summed_samples(text) | {"vllm:kv_cache_usage_perc": 0.25}


def test_a_pass_and_the_same_again() -> None:
    server: Any = Answers()
    client = Client(server, [7], 2)
    talks = [Conversation(number, ("a?", "b?")) for number in (1, 2, 3)]
    measured, said = run_pass(client, talks, 2)
    assert [[turn.answer for turn in one] for one in said] == [["1 so", "3 so"]] * 3
    assert measured["hit_rate"] == 0.5 and measured["requests_per_s"] > 0
    assert measured["cached_tokens"] == [5, 15] and measured["prompt_tokens"] == [10, 30]
    assert len(measured["first_token_s"]) == 2 and all(s > 0 for s in measured["first_token_s"])
    # What was said then is sent, whatever the answers are now.
    other = [[Turn("one", 0, 0, 0), Turn("two", 0, 0, 0)]] * 3
    server.asked.clear()
    run_pass(client, talks, 1, other)
    assert [asked[1]["content"] for asked in server.asked if len(asked) == 3] == ["one"] * 3


def test_an_answer_of_another_length_is_no_measurement() -> None:
    server: Any = Answers()
    with pytest.raises(RuntimeError, match="has 2 tokens, not 3"):
        Client(server, [7], 3).talk(conversation(0, 1))


# ---- figures --------------------------------------------------------------------------------------


def test_hit_rate_is_of_the_tokens_between_two_readings() -> None:
    before = summed_samples(METRICS.format(queries=1000.0, hits=100.0))
    after = summed_samples(METRICS.format(queries=3000.0, hits=1600.0))
    assert hit_rate(before, after) == 0.75
    assert hit_rate(before, before) == 0


def test_rounds_become_medians() -> None:
    rounds = [{"a": {"b": value}, "c": [value, 2 * value]} for value in (1.0, 3.0, 8.0)]
    assert medians(rounds) == {"a": {"b": 3.0}, "c": [3.0, 6.0]}


def _result(rate: float, turns: list[float], share: float) -> dict[str, Any]:
    first = {"hit_rate": 0.5, "requests_per_s": rate, "first_token_s": turns}
    first |= {"cached_tokens": [0.0] * len(turns), "prompt_tokens": [612.0] * len(turns)}
    single = {name: value[:1] if isinstance(value, list) else value for name, value in first.items()}
    return {"loads": {"pass 1": first, "new pictures": single}, "kv_share": share}


def test_tables_stand_beside_the_first_server() -> None:
    results = {"stock": _result(2.0, [0.4, 0.1], 0.01), "hybrid": _result(5.0, [0.2, 0.2], 0.0025)}
    lines = table(results).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "against stock" in lines[0]
    assert lines[2] == "| stock | pass 1 | 0.500 | 2.00 | 1.00 | 32.2 |"
    assert lines[4:] == [
        "| hybrid | pass 1 | 0.500 | 5.00 | 2.50 | 8.1 |",
        "| hybrid | new pictures | 0.500 | 5.00 | 2.50 |  |",
    ]
    lines = turn_table(results).splitlines()[2:]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0] == "| server | load | turn 1 | turn 2 |"
    assert lines[2] == "| stock | pass 1 | 0.40 (0 of 612) | 0.10 (0 of 612) |"
    assert lines[3] == "| stock | new pictures | 0.40 (0 of 612) |  |"


def test_what_was_measured_so_far_is_written(tmp_path: Path) -> None:
    rounds = [_result(rate, [0.5], 0.01) for rate in (2.0, 4.0)]
    text = write_report({"stock": rounds, "hybrid": []}, tmp_path)
    assert "| stock | pass 1 | 0.500 | 3.00 | 1.00 | 32.2 |" in text
    assert (tmp_path / "turns.md").read_text().endswith(f"`:\n\n{text}\n")
    report = json.loads((tmp_path / "turns.json").read_text())
    assert report["rounds"] == {"stock": rounds, "hybrid": []} and list(report["results"]) == ["stock"]
    assert {"command", "date", "machine", "versions"} < report.keys()


def test_kinds_of_ranking() -> None:
    section = {"thresholds": [0.9], "fastv_ratio": 0.5, "assistant_header": [3]}
    assert overrides("turn_end", section)["hybrid"] == section | {"fastv_rank": "turn_end"}
    assert overrides("prompt_end", section)["hybrid"] == section | {"fastv_rank": "prompt_end"}
    assert overrides("merging", section)["hybrid"] == {"thresholds": [0.9]}
