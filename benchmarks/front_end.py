"""What a request costs the API server, by CPU seconds: the hybrid beside stock vLLM.

Every kind of server is a real `vllm serve` of the demo model whose engine runs no model (`stub_engine.py`),
so that what is measured is reading pictures, preparing them, checking requests, scheduling and answering.
All kinds are up together. In every round all get the same requests, one kind after the other, there and
back; every request has a JPEG of its own, so that no cache knows it.

Reported are medians over rounds, with the lowest and the highest: CPU seconds (user and system) of the API
server's processes and of the engine core for a request, and requests/s, which on few cores is what the
client, the engine and all API servers together get.

`front-end`: stock and hybrid with one and two API servers. `front-end-options`: the hybrid with options of
vLLM. --render writes the tables again from what was measured; --page also puts them into a page.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import overrides  # noqa: E402
from benchmarks.gpu.prediction.predictions import refreshed  # noqa: E402
from benchmarks.run import HERE, circumstances  # noqa: E402
from benchmarks.vllm_server import VllmServer  # noqa: E402

NAME = "front"
SIDES = (336, 1024)
ANSWER_TOKENS = 4
QUESTION = "What is in the picture, and where is the white circle? Answer in one short sentence."
EXECUTOR = "benchmarks.stub_engine.StubExecutor"
# Where pictures of warm-ups begin; rounds begin at 0.
WARM_UP = 1 << 20
# Requests/s that one H100 should reach: a round number, and what docs/predictions.md expects of prefill.
RATES = (100, 300)
# What of a core a process is planned to use: at a full one requests wait for each other.
FILLED = 0.7


@dataclass(frozen=True)
class Kind:
    """A kind of server.

    Attributes:
        model: "stock" or "hybrid".
        options: more arguments of `vllm serve`.
        environment: more variables of its processes.
        beside: the kind that it is compared with.

    """

    model: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    beside: str = "hybrid"


TWO = "--api-server-count=2"
KINDS: Mapping[str, Kind] = {
    "stock": Kind("stock", beside="stock"),
    "hybrid": Kind("hybrid", beside="stock"),
    "stock-2": Kind("stock", (TWO,), beside="stock"),
    "hybrid-2": Kind("hybrid", (TWO,), beside="stock-2"),
    "hybrid-pil": Kind("hybrid", ('--mm-processor-kwargs={"backend": "pil"}',)),
    "hybrid-shm": Kind("hybrid", ("--mm-processor-cache-type=shm",)),
    "hybrid-uncached": Kind("hybrid", ("--mm-processor-cache-gb=0",)),
    "hybrid-threads": Kind("hybrid", (), (("OMP_NUM_THREADS", "1"),)),
    "hybrid-renderers": Kind("hybrid", ("--renderer-num-workers=2",)),
}
REPORTS = {
    "front-end": ("stock", "hybrid", "stock-2", "hybrid-2"),
    "front-end-options": (
        "hybrid",
        "hybrid-pil",
        "hybrid-shm",
        "hybrid-uncached",
        "hybrid-threads",
        "hybrid-renderers",
    ),
}
OPTIONS = (
    *("--served-model-name", NAME, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048"),
    *("--max-num-seqs", "64", "--max-num-batched-tokens", "16384"),
    *("--kv-cache-memory-bytes", str(256 << 20), "--enable-prefix-caching"),
    # Pictures never come twice; a small cache is full before the first round ends, as a large one some day.
    *("--mm-processor-cache-gb", "0.1", "--distributed-executor-backend", EXECUTOR),
    *("--limit-mm-per-prompt", '{"image": 1}', "--disable-uvicorn-access-log"),
)

# ---- what is asked --------------------------------------------------------------------------------


@cache
def _ground(side: int, number: int) -> Any:
    """A picture that compresses as photographs do: soft shapes, edges, and a little noise."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(number)
    soft = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    fine = Image.fromarray(draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    mixed = 0.8 * np.asarray(soft.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    mixed += 0.2 * np.asarray(fine.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    mixed += draw.normal(0, 4, (side, side, 1)).astype(np.float32)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def picture(side: int, number: int) -> bytes:
    """A JPEG of side x side pixels; no two numbers have the same pixels."""
    from PIL import ImageDraw

    draw = random.Random(number)
    image = _ground(side, number % 8).copy()
    canvas = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, size = draw.randrange(side), draw.randrange(side), draw.randrange(side // 20, side // 4)
        colour = draw.randrange(256), draw.randrange(256), draw.randrange(256)
        canvas.ellipse((x, y, x + size, y + size), fill=colour)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def body(side: int, number: int) -> bytes:
    """The chat completion that asks about a picture."""
    url = f"data:image/jpeg;base64,{base64.b64encode(picture(side, number)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    content = {
        **{"model": NAME, "messages": [{"role": "user", "content": parts}], "temperature": 0},
        **{"max_tokens": ANSWER_TOKENS, "ignore_eos": True},
    }
    return json.dumps(content).encode()


def send(port: int, bodies: Sequence[bytes], at_once: int) -> float:
    """Send requests, so many at once, each over a connection of its own; returns the seconds.

    Raises:
        RuntimeError: a request is refused, or answered with another number of tokens.

    """

    def ask(content: bytes) -> None:
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        answer = json.loads(reply.read())
        connection.close()
        if reply.status != 200 or answer["usage"]["completion_tokens"] != ANSWER_TOKENS:
            raise RuntimeError(f"the server answered {reply.status}: {str(answer)[:300]}")

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(ask, bodies))
    return time.perf_counter() - began


# ---- what it costs --------------------------------------------------------------------------------


def role_of(name: str, is_first: bool) -> str:
    """What a process of a server is, by its name: "api", "engine" or "other".

    Args:
        name: as vLLM calls it.
        is_first: whether it is the process that was started: the API server where there is one of them, or
            else what starts and watches them.

    """
    if "EngineCore" in name:
        return "engine"
    return "api" if is_first or "APIServer" in name or "ApiServer" in name else "other"


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU seconds, user and system, that the processes of a server have used so far, by their role."""
    first = psutil.Process(pid)
    seconds = {"api": 0.0, "engine": 0.0, "other": 0.0}
    for process in (first, *first.children(recursive=True)):
        name = " ".join(process.cmdline())
        used = process.cpu_times()
        seconds[role_of(name, process.pid == pid)] += used.user + used.system
    return seconds


def measure(server: VllmServer, bodies: Sequence[bytes], at_once: int) -> dict[str, float]:
    """CPU milliseconds a request by role, and requests/s."""
    before = cpu_seconds(server.process.pid)
    took = send(server.port, bodies, at_once)
    after = cpu_seconds(server.process.pid)
    cost = {f"{role}_ms": (after[role] - before[role]) * 1e3 / len(bodies) for role in after}
    return cost | {"requests_per_s": len(bodies) / took}


def take_rounds(
    kinds: Sequence[str],
    sides: Sequence[int],
    rounds: int,
    requests: int,
    measured: Callable[[str, Sequence[bytes]], dict[str, float]],
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Measure all kinds on the same requests, round after round, every other one backwards.

    Returns:
        What was measured, by kind, side and round.

    """
    found: dict[str, dict[str, list[dict[str, float]]]] = {k: {str(s): [] for s in sides} for k in kinds}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for side in sides:
            bodies = [body(side, number * requests + place) for place in range(requests)]
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                found[kind][str(side)].append(measured(kind, bodies))
    return found


# ---- servers --------------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> Path:
    """Write the demo model with levels whose thresholds nobody reads, unless it is there."""
    from vllm_hybrid.checkpoint.writing import write_json, write_processor, write_weights
    from vllm_hybrid.demo.model import FASTV_LAYER, FASTV_RATIO, LEVELS, SHAPE, config, trained_weights
    from vllm_hybrid.demo.tokenizer import write_tokenizer

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_processor(folder)
    write_weights(folder, trained_weights())
    setting = {"thresholds": [0.9] * (SHAPE.vision_layers - 1), "fastv_ratio": FASTV_RATIO}
    section = {"levels": dict.fromkeys(LEVELS, setting), "default_level": "mid", "fastv_layer": FASTV_LAYER}
    write_json(folder / "config.json", config(section))
    return folder


def start(kind: str, checkpoint: Path, log: Path) -> VllmServer:
    """Start a server of a kind."""
    told = KINDS[kind]
    section = json.loads((checkpoint / "config.json").read_text())["hybrid"]
    root = str(HERE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | dict(told.environment)
    override = overrides(told.model, section)
    return VllmServer(checkpoint, log, override, [*OPTIONS, *told.options], environment)


def run(kinds: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Start all kinds of servers, and measure them."""
    checkpoint = write_checkpoint(args.checkpoint)
    with ExitStack() as up:
        servers: dict[str, VllmServer] = {}
        for kind in kinds:
            servers[kind] = start(kind, checkpoint, args.out / f"{args.report}-{kind}.log")
            # Ends it behind this block, also where another does not start.
            up.push(servers[kind])
        for kind, server in servers.items():
            server.ready()
            print(f"{kind} is up", flush=True)
        for side in args.sides:
            bodies = [body(side, WARM_UP + place) for place in range(args.requests)]
            for server in servers.values():
                send(server.port, bodies, args.at_once)
        found = take_rounds(
            kinds,
            args.sides,
            args.rounds,
            args.requests,
            lambda kind, bodies: measure(servers[kind], bodies, args.at_once),
        )
    sizes = {str(side): len(picture(side, 0)) for side in args.sides}
    load = {"requests": args.requests, "rounds": args.rounds, "at_once": args.at_once}
    return {"load": load, "cores": os.cpu_count(), "jpeg_bytes": sizes, "rounds": found}


# ---- report ---------------------------------------------------------------------------------------

FIGURES = ("api_ms", "engine_ms", "requests_per_s")


def summary(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians, lowest and highest of every figure, and the ratio of API servers' CPU to the other kind's.

    Ratios are those of single rounds, in which both kinds got the same requests; their median counts. A kind
    whose counterpart was not measured has none.
    """
    results: dict[str, dict[str, dict[str, Any]]] = {}
    rounds = found["rounds"]
    for kind, by_side in rounds.items():
        results[kind] = {}
        for side, ones in by_side.items():
            figures: dict[str, Any] = {}
            for name in FIGURES:
                values = [one[name] for one in ones]
                figures[name] = {
                    **{"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
                }
            beside = KINDS[kind].beside
            if beside in rounds:
                others = rounds[beside][side]
                ratios = [one["api_ms"] / other["api_ms"] for one, other in zip(ones, others, strict=True)]
                figures["ratio"] = {"beside": beside, "median": statistics.median(ratios), "all": ratios}
            results[kind][side] = figures
    return results


def processes(api_ms: float, rate: int) -> int:
    """API servers for a rate of requests/s, each filled to FILLED of a core."""
    # Rounded, so that what fills a whole number of them in decimal numbers takes no further one.
    return max(1, math.ceil(round(rate * api_ms / 1e3 / FILLED, 6)))


def _spread(figure: Mapping[str, float], digits: int) -> str:
    low, high = (f"{figure[name]:.{digits}f}" for name in ("lowest", "highest"))
    return f"{figure['median']:.{digits}f} ({low} to {high})"


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for every kind and size of picture."""
    heads = ["server", "picture", "API servers, CPU ms a request", "against", "engine core, CPU ms"]
    heads += ["requests/s", *(f"API servers for {rate}/s" for rate in RATES)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind, by_side in summary(found).items():
        for side, figures in by_side.items():
            ratio = figures.get("ratio", {"beside": kind})
            against = "" if ratio["beside"] == kind else f"{ratio['median']:.2f}x {ratio['beside']}"
            cells = [kind, f"{side} px", _spread(figures["api_ms"], 1), against]
            cells += [_spread(figures["engine_ms"], 1), _spread(figures["requests_per_s"], 0)]
            cells += [str(processes(figures["api_ms"]["median"], rate)) for rate in RATES]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(report: Mapping[str, Any]) -> str:
    """What was measured, on what, how, and its table."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    load, machine = report["load"], report["machine"]["processor"]
    sizes = " and ".join(f"{size // 1000} kB at {side} px" for side, size in report["jpeg_bytes"].items())
    head = f"{report['date']}, {machine}, {report['cores']} cores, {versions}; `{report['command']}`:"
    tail = (
        f"Medians over {load['rounds']} rounds (lowest to highest) of {load['requests']} requests each, "
        f"{load['at_once']} at once, {ANSWER_TOKENS} answer tokens, a JPEG of its own in each ({sizes}). "
        f"Requests/s are those of client, engine core and API servers together on {report['cores']} cores. "
        f"API servers for a rate: rate x CPU time / {FILLED}, rounded up."
    )
    return f"{head}\n\n{table(report)}\n\n{tail}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--report", choices=tuple(REPORTS), default="front-end")
    parser.add_argument("--kinds", help=f"of {', '.join(KINDS)}; left out, those of the report")
    parser.add_argument("--requests", type=int, default=96, help="of each kind and size in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--sides", type=lambda text: [int(side) for side in text.split(",")], default=SIDES)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint" / "front-end")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the tables again")
    parser.add_argument("--page", type=Path, help="a page with a table under '## HEADING'")
    parser.add_argument("--heading", help="under which --page gets the table")
    args = parser.parse_args()
    kinds = args.kinds.split(",") if args.kinds else REPORTS[args.report]
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    if bool(args.page) != bool(args.heading):
        parser.error("--page and --heading go together")
    args.out.mkdir(parents=True, exist_ok=True)
    # Servers must not outlive the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    file = args.out / f"{args.report}.json"
    if not args.render:
        report = circumstances() | run(kinds, args)
        file.write_text(json.dumps(report | {"results": summary(report)}, indent=1) + "\n")
    report = json.loads(file.read_text())
    file.with_suffix(".md").write_text(page(report))
    print(page(report))
    if args.page:
        args.page.write_text(refreshed(args.page.read_text(), {args.heading: table(report)}))


if __name__ == "__main__":
    main()
