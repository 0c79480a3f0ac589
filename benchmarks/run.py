"""Stock vLLM against vllm-hybrid on the same weights and loads: table, JSON and a plot.

Run with `make bench`; every engine runs in a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import BLOCK_SIZE, LOADS, REQUESTS, TEXT_TOKENS, picture_seeds  # noqa: E402

HERE = Path(__file__).parent
# Key and value of 16 layers x 1024 channels in bf16.
KV_BYTES_PER_TOKEN = 2 * 16 * 1024 * 2
# What each comparison is to reach, by kind and load.
TARGETS = {
    ("hybrid", "prefill"): 3.0,
    ("hybrid", "mixed"): 2.5,
    ("hybrid", "decode"): 0.95,
    ("hybrid", "text"): 0.95,
    ("off", "prefill"): 0.97,
    ("off", "decode"): 0.97,
}


def run_engine(checkpoint: Path, kind: str, loads: str, repeats: int, log: Path) -> dict[str, Any]:
    """Measure one kind of server in a process of its own.

    Raises:
        RuntimeError: the engine failed; its log says why.

    """
    command = [sys.executable, str(HERE / "engine.py"), str(checkpoint), "--kind", kind, "--loads", loads]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--repeats", str(repeats)], stdout=subprocess.PIPE, stderr=file, text=True, check=False
        )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"the {kind} engine gave no result; see {log}")


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line with the options of every comparison; make the checkpoint and the folder."""
    parser.add_argument("--rounds", type=int, default=2, help="over all servers, every other one backwards")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    from benchmarks.checkpoint import write

    write(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def there_and_back(kinds: Sequence[str], rounds: int) -> Iterator[str]:
    """The kinds in the order of measuring, every other round backwards; each is announced.

    A machine drifts; there and back, every server is measured early and late.
    """
    for number in range(rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            print(f"round {number + 1} of {rounds}: {kind}", flush=True)
            yield kind


def circumstances() -> dict[str, Any]:
    """What was run, when, on what and with which libraries."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": {"processor": _processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "vllm", "transformers")},
    }


def join_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several measurements of the same kind: medians over all repeats of all rounds."""
    loads: dict[str, dict[str, Any]] = {}
    for load in rounds[0]["loads"]:
        parts = [one["loads"][load] for one in rounds]
        rates = [rate for part in parts for rate in part["all_requests_per_s"]]
        median = statistics.median(rates)
        loads[load] = {
            "requests_per_s": median,
            "time_to_first_token_s": statistics.median(part["time_to_first_token_s"] for part in parts),
            "tokens_per_s": median * LOADS[load][0],
            "all_requests_per_s": rates,
        }
    peak = max(one["peak_bytes"] for one in rounds)
    return rounds[0] | {"loads": loads, "peak_bytes": peak}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: every load of every kind beside stock."""
    stock = results["stock"]
    lines = [
        "| server | load | requests/s | stock | ratio | target | first token, s | stock | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, result in results.items():
        if kind == "stock":
            continue
        for load, got in result["loads"].items():
            base = stock["loads"][load]
            target = TARGETS.get((kind, load))
            ratio = got["requests_per_s"] / base["requests_per_s"]
            lines.append(
                f"| {kind} | {load} | {got['requests_per_s']:.2f} | "
                f"{base['requests_per_s']:.2f} | {ratio:.2f} | "
                f"{f'>= {target}' if target else ''} | {got['time_to_first_token_s']:.2f} | "
                f"{base['time_to_first_token_s']:.2f} | {got['tokens_per_s']:.1f} |"
            )
    return "\n".join(lines)


def memory_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: what a request with one picture holds of the KV pool, and peak memory."""
    pool = 3 << 30
    lines = ["| server | KV per request, MB | less than stock | peak memory, GB |", "|---|---|---|---|"]
    # Stock's CPU kernel runs at blocks of 128 tokens; at the hybrid's 16 it would hold less, so count that.
    positions = TEXT_TOKENS + 576 + 2
    stock = -(-positions // BLOCK_SIZE) * BLOCK_SIZE * KV_BYTES_PER_TOKEN / pool * REQUESTS
    lines.append(
        f"| stock, were its blocks {BLOCK_SIZE} tokens | {stock * pool / REQUESTS / 1e6:.1f} | 1x | |"
    )
    for kind, result in results.items():
        share = result["blocks"]["pool_share"]
        lines.append(
            f"| {kind} | {share * pool / REQUESTS / 1e6:.1f} | {stock / share:.2f}x | "
            f"{result['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def counts(checkpoint: Path, repeats: int) -> str:
    """One sentence on the live and kept tokens of the pictures of the prefill load, by a float32 tower."""
    from benchmarks.checkpoint import FASTV_RATIO, picture
    from vllm_hybrid.checkpoint.llava import load_tower
    from vllm_hybrid.method.fastv import live_to_kept
    from vllm_hybrid.tools.calibrate import live_counts

    section = json.loads((checkpoint / "hybrid.json").read_text())
    files = []
    for seed in picture_seeds("prefill", repeats):
        files.append(checkpoint / "pictures" / f"load-{seed}.png")
        picture(seed).save(files[-1])
    live = live_counts(*load_tower(checkpoint), files, section["thresholds"])
    kept = [live_to_kept(n, FASTV_RATIO) for n in live]
    return (
        f"The {len(live)} pictures of the prefill load have {sum(live) / len(live):.1f} live tokens of 576 "
        f"on average ({min(live)} to {max(live)}), of which {sum(kept) / len(kept):.1f} are kept."
    )


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Bars of the ratio to stock, a group per load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in results if kind != "stock"]
    figure, axis = plt.subplots(figsize=(8, 4))
    loads = list(results["stock"]["loads"])
    for place, kind in enumerate(kinds):
        measured = results[kind]["loads"]
        x = [
            i + (place - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
            for i, load in enumerate(loads)
            if load in measured
        ]
        ratios = [
            measured[load]["requests_per_s"] / results["stock"]["loads"][load]["requests_per_s"]
            for load in loads
            if load in measured
        ]
        bars = axis.bar(x, ratios, 0.8 / len(kinds), label=kind)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(loads)), [f"{load}\n{LOADS[load][0]} new tokens" for load in loads])
    axis.set_ylabel("requests/s over stock vLLM's")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="stock,hybrid,off", help="servers, stock first")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--repeats", type=int, default=2, help="of each load in each round")
    args = begin(parser)
    kinds = args.kinds.split(",")
    measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind in there_and_back(kinds, args.rounds):
        loads = "prefill,decode" if kind == "off" else args.loads
        log = args.out / f"{kind}.log"
        measured[kind].append(run_engine(args.checkpoint, kind, loads, args.repeats, log))
    results = {kind: join_rounds(rounds) for kind, rounds in measured.items()}
    report = circumstances() | {"block_size": BLOCK_SIZE, "results": results}
    (args.out / "results.json").write_text(json.dumps(report, indent=1))
    text = "\n\n".join([table(results), memory_table(results), counts(args.checkpoint, args.repeats)])
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    plot(results, args.out / "ratios.png")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
