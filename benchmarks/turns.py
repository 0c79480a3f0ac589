"""Conversations about a picture, turn after turn: the hybrid beside stock vLLM, with prefix caching and HTTP.

Every conversation has a picture of its own. A turn sends all that was said so far and a new question of 10
to 20 tokens; an answer has a fixed number of tokens. Some conversations go on at once, and where one ends
the next begins. A second pass says the same again, with the first pass's answers; single questions about
new pictures show what becomes slower where nothing repeats.

Of each server: hit rate (share of the prompts' tokens that the prefix cache had, by /metrics), requests/s,
seconds to the first token of each turn and cached tokens of its prompt (medians over conversations), and
the KV that a conversation holds: the share of the pool in use at the eighth token of the last turn's answer
while nothing else runs. Blocks that only the cache holds do not count there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint import answer_words, data_url  # noqa: E402
from benchmarks.engine import overrides  # noqa: E402
from benchmarks.run import begin, circumstances, there_and_back  # noqa: E402
from benchmarks.serve import NAME, POOL_BYTES, server_options  # noqa: E402
from benchmarks.vllm_server import VllmServer  # noqa: E402
from vllm_hybrid.checkpoint.assistant_header import find_assistant_header  # noqa: E402

# What engine.py calls the kinds that have another name here.
OTHER_NAMES = {"hybrid": "merging"}
# Numbers of conversations, and so pictures, that no pass has.
WARM_UP, NEW, ALONE = 100_000, 200_000, 300_000
FIRST_PICTURE = 1_000_000
# Of the answer during which the pool is looked at, and the token at which.
ALONE_TOKENS, LOOK_AT = 64, 8
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "grey", "white", "black", "brown")
SHAPES = ("circle", "square", "triangle", "rectangle", "star")
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Conversation:
    """A picture's seed and what is asked about it, a question for each turn."""

    picture: int
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """An answer, the seconds to its first token, the prompt's tokens and how many of them were cached."""

    answer: str
    first_token_s: float
    prompt_tokens: int
    cached_tokens: int


def conversation(number: int, turns: int) -> Conversation:
    """The conversation of a number; no two numbers have the same picture."""
    draw = random.Random(number)
    return Conversation(FIRST_PICTURE + number, tuple(question(draw) for _ in range(turns)))


def question(draw: random.Random) -> str:
    """A question of 10 to 20 tokens."""
    things = [f"{draw.choice(COLOURS)} {draw.choice(SHAPES)}" for _ in range(2)]
    return f"Is the {things[0]} on the {draw.choice(SIDES)} larger than the {things[1]} beside it?"


def messages(image: str, questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, Any]]:
    """What is sent for the turn behind some answers.

    Args:
        image: the picture as a data URL.
        questions: of the conversation.
        answers: those to its first questions.

    """
    picture = {"type": "image_url", "image_url": {"url": image}}
    said: list[dict[str, Any]] = []
    for turn, text in enumerate(questions[: len(answers) + 1]):
        parts: list[dict[str, Any]] = [] if turn else [picture]
        said.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
        if turn < len(answers):
            said.append({"role": "assistant", "content": answers[turn]})
    return said


@dataclass(frozen=True)
class Client:
    """Asks a server.

    Attributes:
        server: whom.
        words: token ids that answers are made of.
        tokens: of an answer.

    """

    server: VllmServer
    words: Sequence[int]
    tokens: int

    def ask(
        self, said: list[dict[str, Any]], tokens: int, at_token: Callable[[int], None] = lambda number: None
    ) -> Turn:
        """One answer of so many tokens; ``at_token`` is called with the number of each that has come."""
        content = {
            **{"model": NAME, "messages": said, "temperature": 0, "max_tokens": tokens, "ignore_eos": True},
            **{"allowed_token_ids": self.words, "stream": True, "stream_options": {"include_usage": True}},
        }
        began, first, pieces, usage = time.perf_counter(), 0.0, list[str](), dict[str, Any]()
        for event in self.server.stream("/v1/chat/completions", content):
            usage = event.get("usage") or usage
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if text:
                first = first or time.perf_counter() - began
                pieces.append(text)
                at_token(len(pieces))
        if usage["completion_tokens"] != tokens:
            raise RuntimeError(f"the answer has {usage['completion_tokens']} tokens, not {tokens}")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        # Stripped, the answer becomes the tokens that were generated: the template brings its space.
        return Turn("".join(pieces).strip(), first, usage["prompt_tokens"], cached)

    def talk(self, about: Conversation, answers: Sequence[str] = ()) -> list[Turn]:
        """All turns of a conversation; where answers are given, these count as what was said."""
        image, turns = data_url(about.picture), list[Turn]()
        for number in range(len(about.questions)):
            so_far = answers[:number] if answers else [turn.answer for turn in turns]
            turns.append(self.ask(messages(image, about.questions, so_far), self.tokens))
        return turns

    def kv_share(self, about: Conversation) -> float:
        """The share of the pool that a conversation holds in its last turn, while it is the only one."""
        *before, _ = self.talk(about)
        shares: list[float] = []

        def look(number: int) -> None:
            if number == LOOK_AT:
                shares.append(self.server.metrics()["vllm:kv_cache_usage_perc"])

        answers = [turn.answer for turn in before]
        self.ask(messages(data_url(about.picture), about.questions, answers), ALONE_TOKENS, look)
        return shares[0]


def hit_rate(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The share of prompt tokens between two readings of /metrics that the prefix cache had."""
    hits, queries = (
        after[name] - before[name]
        for name in ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    )
    return hits / queries if queries else 0.0


def run_pass(
    client: Client, talks: Sequence[Conversation], at_once: int, said: Sequence[Sequence[Turn]] = ()
) -> tuple[dict[str, Any], list[list[Turn]]]:
    """Hold conversations, so many at once, saying again what was said, if anything was.

    Returns:
        What was measured, and every conversation's turns.

    """
    answers: list[list[str]] = [[turn.answer for turn in one] for one in said] or [[]] * len(talks)
    before, began = client.server.metrics(), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        held = list(pool.map(client.talk, talks, answers))
    took = time.perf_counter() - began
    by_turn = list(zip(*held, strict=True))
    measured = {
        "hit_rate": hit_rate(before, client.server.metrics()),
        "requests_per_s": sum(map(len, held)) / took,
        **{
            name: [statistics.median(getattr(turn, name) for turn in turns) for turns in by_turn]
            for name in ("first_token_s", "cached_tokens", "prompt_tokens")
        },
    }
    return measured, held


def measure(client: Client, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one server: by the name of the load, and what a conversation holds."""
    talks = [conversation(number, args.turns) for number in range(args.conversations)]
    run_pass(client, [conversation(WARM_UP + i, 2) for i in range(args.at_once)], args.at_once)
    loads: dict[str, Any] = {}
    loads["pass 1"], said = run_pass(client, talks, args.at_once)
    for number in range(2, args.passes + 1):
        loads[f"pass {number}"], _ = run_pass(client, talks, args.at_once, said)
    new = [conversation(NEW + i, 1) for i in range(args.conversations)]
    loads["new pictures"], _ = run_pass(client, new, args.at_once)
    return {"loads": loads, "kv_share": client.kv_share(conversation(ALONE, args.turns))}


def measure_kind(kind: str, args: argparse.Namespace, section: dict[str, Any]) -> dict[str, Any]:
    """Start a kind of server and measure it. A kind such as stock-32 is stock with blocks of 32 tokens."""
    name, _, block_size = kind.partition("-")
    options = [*server_options(prefix_caching=True), "--enable-prompt-tokens-details"]
    options += [f"--block-size={block_size}"] if block_size else []
    words, log = answer_words(args.checkpoint), args.out / f"turns-{kind}.log"
    override = overrides(OTHER_NAMES.get(name, name), section)
    with VllmServer(args.checkpoint, log, override, options) as server:
        return measure(Client(server, words, args.answer_tokens), args)


def medians(rounds: Sequence[Any]) -> Any:
    """One value of several of the same shape, each number the median of theirs."""
    if isinstance(rounds[0], dict):
        return {key: medians([one[key] for one in rounds]) for key in rounds[0]}
    if isinstance(rounds[0], list):
        return [medians(values) for values in zip(*rounds, strict=True)]
    return statistics.median(rounds)


def table(results: Mapping[str, Any]) -> str:
    """Markdown: hit rate and requests/s of every load of every server, and its KV, against the first one."""
    first, base = next(iter(results.items()))
    lines = [
        f"| server | load | hit rate | requests/s | against {first} | KV of a conversation, MB |",
        "|---|---|---|---|---|---|",
    ]
    for kind, result in results.items():
        kv = f"{result['kv_share'] * POOL_BYTES / 1e6:.1f}"
        for load, got in result["loads"].items():
            ratio = got["requests_per_s"] / base["loads"][load]["requests_per_s"]
            figures = f"{got['hit_rate']:.3f} | {got['requests_per_s']:.2f} | {ratio:.2f} | {kv}"
            lines.append(f"| {kind} | {load} | {figures} |")
            kv = ""
    return "\n".join(lines)


def turn_table(results: Mapping[str, Any]) -> str:
    """Markdown: seconds to the first token of every turn, and cached tokens of its prompt."""
    turns = max(len(got["first_token_s"]) for result in results.values() for got in result["loads"].values())
    heads = ["server", "load", *(f"turn {number + 1}" for number in range(turns))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind, result in results.items():
        for load, got in result["loads"].items():
            figures = zip(got["first_token_s"], got["cached_tokens"], got["prompt_tokens"], strict=True)
            cells = [f"{seconds:.2f} ({cached:.0f} of {all_:.0f})" for seconds, cached, all_ in figures]
            cells += [""] * (turns - len(cells))
            lines.append(f"| {' | '.join([kind, load, *cells])} |")
    return "First token, s (cached tokens of the prompt's):\n\n" + "\n".join(lines)


def write_report(measured: Mapping[str, Sequence[dict[str, Any]]], out: Path) -> str:
    """Write ``turns.json`` and ``turns.md`` of all kinds that were measured; returns the tables."""
    results = {kind: medians(rounds) for kind, rounds in measured.items() if rounds}
    report = circumstances() | {"results": results, "rounds": measured}
    (out / "turns.json").write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    text = "\n\n".join([table(results), turn_table(results)])
    head = f"{report['date']}, {report['machine']['processor']}, {versions}; `{report['command']}`:"
    (out / "turns.md").write_text(f"{head}\n\n{text}\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kinds",
        default="stock,hybrid,turn_end,prompt_end",
        help="servers, the one to compare with first: stock, stock-N (blocks of N tokens), hybrid (merging, "
        "R = 0), turn_end and prompt_end (merging, and pruning ranked there), off",
    )
    parser.add_argument("--turns", type=int, default=6, help="of a conversation")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--conversations", type=int, default=32, help="in all")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--passes", type=int, default=2, help="with the same conversations")
    args = begin(parser)
    section = json.loads((args.checkpoint / "hybrid.json").read_text())
    section["assistant_header"] = find_assistant_header(args.checkpoint)
    kinds = args.kinds.split(",")
    measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind in there_and_back(kinds, args.rounds):
        measured[kind].append(measure_kind(kind, args, section))
        # A server that fails later costs nothing that was measured before.
        text = write_report(measured, args.out)
    print(text)


if __name__ == "__main__":
    main()
