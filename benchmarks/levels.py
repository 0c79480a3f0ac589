"""Levels of one engine: beside servers of one setting each, and what each level of the demo model costs.

`servers`: the benchmark's checkpoint three times, each engine in processes of its own and all of them up:
with the levels `full` and `low`, with nothing switched on, and with `low` alone. Requests of both levels
together on the first are to take as long as those of each on the server that has only that, and `full` alone
as long as where there is nothing else.

`costs`: of each level of the demo checkpoint, on one engine: live and kept tokens of a picture, KV of a
request, requests/s; and stock vLLM beside it.

Every repeat has new pictures and asks the same ones everywhere; every other one goes backwards. Engines that
are not asked compute nothing. Ratios are those of single repeats; what is reported is their median.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import BLOCK_SIZE, LOADS, REQUESTS, TEXT_TOKENS, overrides  # noqa: E402
from benchmarks.engine_process import Ask, EngineProcess, Served  # noqa: E402
from benchmarks.run import HERE, circumstances  # noqa: E402
from vllm_hybrid.checkpoint.llava import ARCHITECTURE  # noqa: E402
from vllm_hybrid.demo.model import write_demo_model  # noqa: E402
from vllm_hybrid.levels import FULL  # noqa: E402

LOW, STOCK = "low", "stock"
LEVELS, FULL_ONLY, LOW_ONLY = "levels", "full alone", "low alone"
# What requests at a level may take beside those on a server that has nothing else.
MOST = 1.03
PATCHES = 576

# ---- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Requests whose time is taken.

    Attributes:
        engine: who is asked.
        levels: at which of its levels, in turn; None for an engine's only one.

    """

    engine: str
    levels: tuple[str | None, ...]

    @property
    def name(self) -> str:
        """For a report."""
        return f"{self.engine}: {', '.join(level or 'its own' for level in self.levels)}"

    def asks(self, seeds: Sequence[int]) -> list[Ask]:
        """One request for each picture and level; the levels take turns."""
        return [(seed, level) for seed in seeds for level in self.levels]


TOGETHER = Step(LEVELS, (FULL, LOW))
LEVEL_FULL, LEVEL_LOW = Step(LEVELS, (FULL,)), Step(LEVELS, (LOW,))
ONLY_FULL, ONLY_LOW = Step(FULL_ONLY, (None,)), Step(LOW_ONLY, (None,))
# What takes how long beside what, by the name of the comparison.
COMPARED = {
    "full and low together": (TOGETHER, (ONLY_FULL, ONLY_LOW)),
    "full": (LEVEL_FULL, (ONLY_FULL,)),
    "low": (LEVEL_LOW, (ONLY_LOW,)),
}
STEPS = (TOGETHER, ONLY_FULL, LEVEL_FULL, ONLY_LOW, LEVEL_LOW)


def with_levels(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of one setting as one of levels, of which it is `low`."""
    low = {key: section[key] for key in ("thresholds", "fastv_ratio")}
    others = {key: value for key, value in section.items() if key not in low}
    return others | {"levels": {LOW: low}, "default_level": LOW}


def seeds_of(repeat: int, requests: int) -> range:
    """The pictures of a repeat; no two have the same."""
    return range(repeat * requests, (repeat + 1) * requests)


def take_times(
    steps: Sequence[Step],
    seconds: Callable[[Step, Sequence[int]], float],
    repeats: int,
    requests: int,
    first: int = 0,
) -> dict[Step, list[float]]:
    """Seconds of every step in every repeat but the first, which warms up.

    Args:
        steps: in the order of asking; every other repeat goes backwards.
        seconds: takes the time of a step with pictures of some seeds.
        repeats: that count.
        requests: of each level of a step.
        first: number of the first repeat, from which its pictures follow.

    """
    times: dict[Step, list[float]] = {step: [] for step in steps}
    for repeat in range(repeats + 1):
        for step in steps if repeat % 2 == 0 else reversed(steps):
            took = seconds(step, seeds_of(first + repeat, requests))
            if repeat:
                times[step].append(took)
        print(f"repeat {repeat} of {repeats}", flush=True)
    return times


# ---- beside servers of one setting ----------------------------------------------------------------


def compare(times: Mapping[Step, Sequence[float]]) -> dict[str, Any]:
    """Of every comparison the seconds on the engine with levels over those beside it, repeat by repeat."""
    found = {}
    for name, (step, others) in COMPARED.items():
        beside = [sum(each) for each in zip(*(times[other] for other in others), strict=True)]
        ratios = [took / other for took, other in zip(times[step], beside, strict=True)]
        found[name] = {
            "seconds": statistics.median(times[step]),
            "seconds_beside": statistics.median(beside),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    return found


def measure_servers(args: argparse.Namespace) -> dict[str, Any]:
    """Every load on all three engines."""
    from benchmarks.checkpoint import write

    write(args.checkpoint)
    section = json.loads((args.checkpoint / "hybrid.json").read_text())
    kinds = {
        LEVELS: overrides("hybrid", with_levels(section)),
        FULL_ONLY: overrides("off", section),
        LOW_ONLY: overrides("hybrid", section),
    }
    loads = args.loads.split(",")
    found = {}
    with ExitStack() as stack:
        engines = {}
        # One after the other: each needs memory at its start that it gives back.
        for name, override in kinds.items():
            print(f"starting: {name}", flush=True)
            log = args.out / f"levels-{name.replace(' ', '-')}.log"
            engines[name] = stack.enter_context(EngineProcess(Served(args.checkpoint, override), log))
        for number, load in enumerate(loads):
            print(f"load: {load}", flush=True)
            tokens = LOADS[load][0]

            def seconds(step: Step, seeds: Sequence[int], tokens: int = tokens) -> float:
                return engines[step.engine].ask("seconds", step.asks(seeds), tokens)

            first = number * (args.repeats + 1)
            times = take_times(STEPS, seconds, args.repeats, args.requests, first)
            found[load] = {
                "compared": compare(times),
                "seconds": {step.name: taken for step, taken in times.items()},
            }
    return {"requests": args.requests, "most": MOST, "loads": found}


def servers_table(found: Mapping[str, Any]) -> str:
    """Markdown: every comparison of every load."""
    lines = [
        "| load | requests | engine with levels, s | engines of one setting, s | ratio | repeats | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for load, measured in found["loads"].items():
        for name, got in measured["compared"].items():
            ratios = got["ratios"]
            target = f"<= {found['most']}" if FULL in name else ""
            lines.append(
                f"| {load} | {name} | {got['seconds']:.2f} | {got['seconds_beside']:.2f} | "
                f"{got['ratio']:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | {target} |"
            )
    return "\n".join(lines)


# ---- what each level costs ------------------------------------------------------------------------


def kv_bytes_of_stock(config: Mapping[str, Any], positions: int) -> int:
    """KV of a request of so many positions in bf16, in blocks of BLOCK_SIZE."""
    text = config["text_config"]
    row = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * 2
    return -(-positions // BLOCK_SIZE) * BLOCK_SIZE * row


def cost(
    times: Sequence[float], full: Sequence[float], stock: Sequence[float], requests: int
) -> dict[str, Any]:
    """Requests/s of a level, and over those of the full level and of stock in the same repeats."""

    def over(others: Sequence[float]) -> float:
        return statistics.median(other / took for took, other in zip(times, others, strict=True))

    rates = [requests / took for took in times]
    return {
        "requests_per_s": statistics.median(rates),
        "over_full": over(full),
        "over_stock": over(stock),
        "all_requests_per_s": rates,
    }


def measure_costs(args: argparse.Namespace) -> dict[str, Any]:
    """Every level of the demo checkpoint on one engine, and stock on another."""
    if not (args.demo / "config.json").exists():
        write_demo_model(args.demo)
    config = json.loads((args.demo / "config.json").read_text())
    names = [*(name for name in config["hybrid"]["levels"] if name != FULL), FULL]
    kinds = {LEVELS: {"architectures": [ARCHITECTURE]}, STOCK: overrides(STOCK, {})}
    stock, levels = Step(STOCK, (None,)), {name: Step(LEVELS, (name,)) for name in names}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                EngineProcess(Served(args.demo, override, True), args.out / f"levels-demo-{name}.log")
            )
            for name, override in kinds.items()
        }

        def seconds(step: Step, seeds: Sequence[int]) -> float:
            return engines[step.engine].ask("seconds", step.asks(seeds), LOADS["prefill"][0])

        times = take_times([stock, *levels.values()], seconds, args.repeats, args.requests)
        alone = seeds_of(args.repeats + 1, args.requests)
        found = {}
        for name, step in {STOCK: stock, **levels}.items():
            engine, level = engines[step.engine], step.levels[0]
            kv_bytes = engine.ask("kv_bytes", alone, level)
            live, kept = (PATCHES, PATCHES) if level is None else engine.ask("image_tokens", level)
            about = {"live": live, "kept": kept, "kv_bytes": kv_bytes}
            speed = cost(times[step], times[levels[FULL]], times[stock], args.requests)
            found[name] = about | speed
    # Two new tokens are there when the pool is looked at.
    smallest = kv_bytes_of_stock(config, PATCHES + TEXT_TOKENS + 2)
    return {"requests": args.requests, "kv_bytes_of_stock": smallest, "levels": found}


def costs_table(found: Mapping[str, Any]) -> str:
    """Markdown: a line per level. KV is compared with stock's in blocks as small as ours."""
    smallest = found["kv_bytes_of_stock"]
    lines = [
        f"| level | live | kept | KV of a request, MB | less than stock's {smallest / 1e6:.2f} MB | "
        "requests/s | over full's | over stock's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, got in found["levels"].items():
        lines.append(
            f"| {name} | {got['live']:.0f} | {got['kept']:.0f} | {got['kv_bytes'] / 1e6:.2f} | "
            f"{smallest / got['kv_bytes']:.2f}x | {got['requests_per_s']:.2f} | {got['over_full']:.2f}x | "
            f"{got['over_stock']:.2f}x |"
        )
    return "\n".join(lines)


# ---- report ---------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., str]]] = {
    "servers": (measure_servers, servers_table),
    "costs": (measure_costs, costs_table),
}


def write_report(part: str, found: Mapping[str, Any], out: Path) -> str:
    """Write ``levels-PART.json`` and ``levels-PART.md``; returns the table."""
    report = circumstances() | dict(found)
    (out / f"levels-{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = PARTS[part][1](found)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    head = f"{report['date']}, {report['machine']['processor']}, {versions}; `{report['command']}`:"
    (out / f"levels-{part}.md").write_text(f"{head}\n\n{text}\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="that count")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each level at once")
    parser.add_argument("--loads", default="prefill,mixed", help="of `servers`: prefill, mixed, decode")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint", help="of `servers`")
    parser.add_argument("--demo", type=Path, default=HERE.parent / "llava-hybrid", help="of `costs`")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # An engine must not outlive the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = PARTS[args.part][0](args)
    print(write_report(args.part, found, args.out))


if __name__ == "__main__":
    main()
