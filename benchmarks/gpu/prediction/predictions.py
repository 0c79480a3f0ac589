"""What stock vLLM and vllm-hybrid should show on one H100, by the cost model; nothing here is measured.

    python -m benchmarks.gpu.prediction.predictions
        [--set NAME=NUMBER] [--json FILE] [--page docs/predictions.md]

Prints the tables of docs/predictions.md: the benchmark's loads over concurrency and over numbers of live
tokens, single steps, the assumptions, and how much hangs on each. --page puts them into the page.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.gpu.prediction.cost_model import (  # noqa: E402
    STOCK,
    STOCK_TRITON,
    TEXT_TOKENS,
    Engine,
    Gpu,
    Reduction,
    Shape,
    Work,
    encode_time,
    replay_time,
    request_kv_bytes,
    step_time,
)
from benchmarks.gpu.speed.cells import FULL  # noqa: E402

HEADING = "PREDICTION (cost model; not measured)"
LOADS = ("prefill", "mixed", "decode")
LIVE_TOKENS = (90, 195, 394)
RATIOS = (0.0, 0.5, 0.75)
# Requests in flight where numbers of live tokens and ratios are compared.
FLIGHT = 64
MERGED = Engine(Reduction(90, 0.0))
# The reduction that the targets are stated for.
TARGET = Engine(Reduction(90, 0.5))


@dataclass(frozen=True)
class Prediction:
    """What one load should show: requests/s, and median seconds to first and per later token."""

    requests_per_s: float
    first_token_s: float
    per_token_s: float | None
    most_running: int
    kv_bytes: int  # of the pool, once two tokens are made and the holes are given back


@dataclass(frozen=True)
class _Cohort:
    """Requests prefilled in one step: how many, the tokens each has made, when the first came."""

    requests: int
    made: int
    first: float


def serve(
    shape: Shape,
    engine: Engine,
    new_tokens: int,
    gpu: Gpu,
    requests: int,
    concurrency: int | None = None,
    step_tokens: int = FULL.step_tokens,
    pool_bytes: int = FULL.pool_bytes,
) -> Prediction:
    """Serve requests of one picture and TEXT_TOKENS text tokens each, in vLLM's order.

    A step takes the requests that run, then whole prompts that fit in its tokens and in the pool. A request
    is let in when the pool holds its unreduced blocks at full length, and keeps its own from then on, so
    nothing is ever preempted. That stands for vLLM's watermark too, by which the benchmark lets in about as
    many (it reserves the prompt and keeps a share of the pool free).

    Args:
        shape: the model.
        engine: the server.
        new_tokens: of each request.
        gpu: the assumptions.
        requests: how many in all.
        concurrency: requests in flight; when one ends the next is sent. None: all arrive together.
        step_tokens: virtual tokens of a step.
        pool_bytes: bytes of KV memory.

    Returns:
        What the load shows; times to the first token count from when a request is sent.

    """
    prompt = TEXT_TOKENS + shape.patches
    whole = request_kv_bytes(shape, engine.reduction, prompt + new_tokens, image_start=None)
    kept = request_kv_bytes(shape, engine.reduction, prompt + new_tokens)
    clock, most = 0.0, 0
    unsent = requests - min(requests, concurrency or requests)
    waiting = deque([0.0] * (requests - unsent))  # when each was sent
    running: list[_Cohort] = []
    firsts, later = [], []
    while waiting or running:
        count = sum(cohort.requests for cohort in running)
        room = (step_tokens - count) // prompt
        prefills = min(len(waiting), room, (pool_bytes - kept * count) // whole)
        if not running and prefills == 0:
            raise ValueError(f"no request fits in {step_tokens} tokens and {pool_bytes} bytes; raise them")
        lengths = [[prompt + cohort.made] * cohort.requests for cohort in running]
        clock += step_time(shape, engine, Work(prefills, prompt, list(chain(*lengths))), gpu)
        running = [replace(cohort, made=cohort.made + 1) for cohort in running]
        if prefills:
            running.append(_Cohort(prefills, 1, clock))
        most = max(most, count + prefills)
        firsts += [clock - waiting.popleft() for _ in range(prefills)]
        done = [cohort for cohort in running if cohort.made == new_tokens]
        running = [cohort for cohort in running if cohort.made < new_tokens]
        for cohort in done:
            if new_tokens > 1:
                later += [(clock - cohort.first) / (new_tokens - 1)] * cohort.requests
            sent = min(unsent, cohort.requests)
            waiting.extend([clock] * sent)
            unsent -= sent
    return Prediction(
        requests_per_s=requests / clock,
        first_token_s=statistics.median(firsts),
        per_token_s=statistics.median(later) if later else None,
        most_running=most,
        kv_bytes=request_kv_bytes(shape, engine.reduction, prompt + 2),
    )


def in_flight(shape: Shape, engine: Engine, load: str, concurrency: int, gpu: Gpu) -> Prediction:
    """One of the benchmark's loads, with as many requests as it sends."""
    return serve(shape, engine, FULL.tokens[load], gpu, FULL.requests[load][concurrency], concurrency)


def reductions(shape: Shape, gpu: Gpu) -> list[dict[str, Any]]:
    """FLIGHT requests in flight: one row per load and reduction, stock beside it."""
    cells = []
    for load in LOADS:
        stock = in_flight(shape, STOCK, load, FLIGHT, gpu)
        for live in LIVE_TOKENS:
            for ratio in RATIOS:
                ours = in_flight(shape, Engine(Reduction(live, ratio)), load, FLIGHT, gpu)
                cells.append(
                    {
                        "load": load,
                        "live": live,
                        "ratio": ratio,
                        "stock": asdict(stock),
                        "hybrid": asdict(ours),
                        "speedup": ours.requests_per_s / stock.requests_per_s,
                        "kv_less": stock.kv_bytes / ours.kv_bytes,
                    }
                )
    return cells


def sweep(shape: Shape, gpu: Gpu) -> list[dict[str, Any]]:
    """One row per load and concurrency at an average of 90 live tokens, and one for a burst."""
    engines = {"stock": STOCK, "stock_triton": STOCK_TRITON, "merged": MERGED, "target": TARGET}
    rows = []
    for load in LOADS:
        for concurrency in FULL.requests[load]:
            found = {
                name: asdict(in_flight(shape, engine, load, concurrency, gpu))
                for name, engine in engines.items()
            }
            rows.append({"load": load, "concurrency": concurrency, **found})
    found = {
        name: asdict(serve(shape, engine, FULL.tokens["burst"], gpu, FULL.burst))
        for name, engine in engines.items()
    }
    return [*rows, {"load": "burst", "concurrency": FULL.burst, **found}]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reductions_table(cells: list[dict[str, Any]]) -> str:
    """Markdown of :func:`reductions`."""
    head = ["load", "live", "R", "requests/s", "stock", "ratio", "TTFT, ms", "stock", "TPOT, ms", "stock"]
    head += ["KV a request, MB", "stock", "less", f"fit in {FULL.pool_bytes >> 30} GiB", "stock"]
    rows = []
    for cell in cells:
        ours, stock = cell["hybrid"], cell["stock"]
        rows.append(
            [
                cell["load"],
                str(cell["live"]),
                f"{cell['ratio']:g}",
                f"{ours['requests_per_s']:.1f}",
                f"{stock['requests_per_s']:.1f}",
                f"{cell['speedup']:.2f}",
                _ms(ours["first_token_s"]),
                _ms(stock["first_token_s"]),
                _ms(ours["per_token_s"]),
                _ms(stock["per_token_s"]),
                f"{ours['kv_bytes'] / 1e6:.1f}",
                f"{stock['kv_bytes'] / 1e6:.1f}",
                f"{cell['kv_less']:.2f}x",
                str(FULL.pool_bytes // ours["kv_bytes"]),
                str(FULL.pool_bytes // stock["kv_bytes"]),
            ]
        )
    return _table(head, rows)


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of :func:`sweep`."""
    head = ["load", "in flight", "stock, requests/s", "stock, Triton", "R = 0", "ratio", "R = 0.5", "ratio"]
    head += ["TTFT, ms: stock", "R = 0.5", "TPOT, ms: stock", "R = 0.5", "stock runs at once"]
    lines = []
    for row in rows:
        stock, target = row["stock"], row["target"]
        rates = {name: row[name]["requests_per_s"] for name in ("stock", "stock_triton", "merged", "target")}
        lines.append(
            [
                row["load"],
                str(row["concurrency"]),
                f"{rates['stock']:.1f}",
                f"{rates['stock_triton']:.1f}",
                f"{rates['merged']:.1f}",
                f"{rates['merged'] / rates['stock']:.2f}",
                f"{rates['target']:.1f}",
                f"{rates['target'] / rates['stock']:.2f}",
                _ms(stock["first_token_s"]),
                _ms(target["first_token_s"]),
                _ms(stock["per_token_s"]),
                _ms(target["per_token_s"]),
                str(stock["most_running"]),
            ]
        )
    return _table(head, lines)


# Positions of a request in the middle of a decode, and prompts in a full prefill step.
DECODE_POSITIONS = 764
PREFILLS = FULL.step_tokens // (TEXT_TOKENS + Shape.patches)


def steps_table(shape: Shape, gpu: Gpu) -> str:
    """Markdown: milliseconds of single steps, as a profile would show them."""
    prompt = TEXT_TOKENS + shape.patches
    works = {
        f"decode step, {batch} requests at {DECODE_POSITIONS} positions": Work(
            0, prompt, [DECODE_POSITIONS] * batch
        )
        for batch in (64, 256)
    }
    works[f"prefill step, {PREFILLS} prompts"] = Work(PREFILLS, prompt)
    engines = (STOCK, STOCK_TRITON, MERGED, TARGET)
    rows = [
        [name, *(_ms(step_time(shape, engine, work, gpu)) for engine in engines)]
        for name, work in works.items()
    ]
    tower = [_ms(encode_time(shape, engine, PREFILLS, gpu)) for engine in engines]
    rows.append([f"of it the tower, {PREFILLS} pictures", *tower])
    return _table(["ms", "stock", "stock, Triton", "90 live, R = 0", "90 live, R = 0.5"], rows)


def tower_graphs_table(shape: Shape, gpu: Gpu) -> str:
    """Markdown: milliseconds of the tower on a few pictures, launched kernel by kernel and replayed."""
    few = (1, 2, 3, 4, 8)
    rows = [
        [name, *(f"{1e3 * seconds(shape, MERGED, images, gpu):.2f}" for images in few)]
        for name, seconds in (("kernel by kernel", encode_time), ("as a graph", replay_time))
    ]
    return _table(["tower at 90 live, ms", *(f"{n} picture{'s' * (n > 1)}" for n in few)], rows)


def assumptions(gpu: Gpu) -> str:
    """Markdown: every number of :class:`Gpu`, with what it stands for."""
    said = dict(re.findall(r"^ {8}(\w+): (.+?)(?=\n {8}\w+: |\n\n)", Gpu.__doc__ or "", re.S | re.M))
    rows = [
        f"| {name} | {value:g} | {' '.join(said[name].split()).rstrip('.')} |"
        for name, value in asdict(gpu).items()
    ]
    return "\n".join(["| name | value | |", "|---|--:|---|", *rows])


# What each assumption decides: load and requests in flight.
SENSITIVE = (("prefill", 64), ("mixed", 64), ("mixed", 256), ("decode", 64))


def sensitivity(shape: Shape, gpu: Gpu) -> str:
    """Markdown: requests/s over stock's at the target reduction, each assumption halved and doubled."""

    def ratios(assumed: Gpu) -> list[float]:
        found = []
        for load, concurrency in SENSITIVE:
            rates = [
                in_flight(shape, engine, load, concurrency, assumed).requests_per_s
                for engine in (TARGET, STOCK)
            ]
            found.append(rates[0] / rates[1])
        return found

    head = ["assumption", *(f"{load}, {flight} in flight: half, twice" for load, flight in SENSITIVE)]
    rows = [["as above", *(f"{ratio:.2f}" for ratio in ratios(gpu))]]
    for name, value in asdict(gpu).items():
        if name in ("flops", "bandwidth"):
            continue
        # A share of a peak ends at 1.
        twice = min(1.0, value * 2) if name.endswith("share") else value * 2
        half, double = (
            ratios(replace(gpu, **{name: type(value)(changed)})) for changed in (value / 2, twice)
        )
        rows.append([name, *(f"{a:.2f}, {b:.2f}" for a, b in zip(half, double, strict=True))])
    return _table(head, rows)


def report(shape: Shape, gpu: Gpu) -> dict[str, str]:
    """Every table of the page, by the heading it stands under."""
    return {
        "Concurrency": sweep_table(sweep(shape, gpu)),
        f"Live tokens and R, {FLIGHT} requests in flight": reductions_table(reductions(shape, gpu)),
        "Single steps": steps_table(shape, gpu),
        "A few pictures": tower_graphs_table(shape, gpu),
        "What is assumed": assumptions(gpu),
        "What it hangs on": sensitivity(shape, gpu),
    }


def refreshed(page: str, tables: dict[str, str]) -> str:
    """A page with the first table under each heading replaced.

    Raises:
        ValueError: the page has no such heading, or no table under it.

    """
    for heading, table in tables.items():
        found = re.search(rf"(?m)^## {re.escape(heading)}\n(?:(?!## |\|).*\n)*((?:\|.*\n)+)", page)
        if not found:
            raise ValueError(f"the page has no table under '## {heading}'; add the heading and a table")
        page = f"{page[: found.start(1)]}{table}\n{page[found.end(1) :]}"
    return page


def changed(items: Iterable[str]) -> Gpu:
    """The assumptions, with NAME=NUMBER set.

    Raises:
        ValueError: there is no such assumption, or that is no number.

    """
    gpu = Gpu()
    for item in items:
        name, _, value = item.partition("=")
        if name not in asdict(gpu):
            raise ValueError(f"{name!r} is no assumption; use one of {', '.join(asdict(gpu))}")
        kind = type(getattr(gpu, name))
        try:
            gpu = replace(gpu, **{name: kind(value)})
        except ValueError:
            raise ValueError(f"{value!r} is no {kind.__name__} for {name}; write {name}=NUMBER") from None
    return gpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the cells here")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=NUMBER", help="another assumption"
    )
    parser.add_argument("--page", type=Path, help="also put the tables into this page")
    args = parser.parse_args()
    if args.page and args.set:
        parser.error("the page holds the assumptions of the code; give --page without --set")
    try:
        gpu = changed(args.set)
    except ValueError as error:
        parser.error(str(error))
    shape = Shape()
    print(f"{HEADING}: one H100, LLaVA-1.5-7B, bf16")
    tables = report(shape, gpu)
    for heading, table in tables.items():
        print(f"\n## {heading}\n\n{table}")
    if args.page:
        args.page.write_text(refreshed(args.page.read_text(), tables))
    if args.json:
        content = {
            "heading": HEADING,
            "gpu": asdict(gpu),
            "shape": asdict(shape),
            "reductions": reductions(shape, gpu),
            "sweep": sweep(shape, gpu),
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
