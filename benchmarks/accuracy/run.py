"""Right answers of the embedded model against merging and pruning: a table and a plot for docs/accuracy.md.

One `vllm serve` offers every configuration as a level and is asked at each; what no server offers, plain
transformers answers. A run that was cut off goes on with the configurations that are left.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.cases import Case, Setup, offline, served  # noqa: E402
from benchmarks.accuracy.questions import held_out  # noqa: E402
from benchmarks.accuracy.report import Result, insert, plot, result, summary, table  # noqa: E402
from vllm_hybrid.tools.journal import Journal  # noqa: E402


def main() -> None:
    """Read the command line, measure, write everything."""
    options = _options()
    insert(options.page.read_text(), "")  # A page without marks is to fail now, not at the end.
    options.out.mkdir(parents=True, exist_ok=True)
    # A server must not outlive the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    images, asked = held_out(options.checkpoint, options.pictures)
    setup = Setup(
        checkpoint=options.checkpoint,
        images=images,
        asked=asked,
        dtype=options.dtype,
        log=options.out / "accuracy-server.log",
        levels=options.levels.split(","),
        ratios=[float(ratio) for ratio in options.ratios.split(",")],
        both_ratios=[float(ratio) for ratio in options.both_ratios.split(",")],
    )
    journal = Journal(options.out / "accuracy.partial.jsonl", setup.work)
    results = measure(setup, journal)
    _write(options, setup, results)
    journal.remove()


def measure(setup: Setup, journal: Journal) -> list[Result]:
    """Figures of all configurations, with their answers."""
    results: list[Result] = []

    def add(case: Case) -> None:
        began = time.monotonic()
        answers, live, kept = journal.result(case.title, case.run)
        full = results[0]["answers"] if results else answers
        about = {"family": case.family, "name": case.name, "where": case.where, "live": live, "kept": kept}
        results.append({**about, **result(setup.asked, answers, full), "answers": answers})
        _tell(case, results[-1], time.monotonic() - began)

    with setup.server() as server:
        for case in served(setup, server):
            add(case)
    for case in offline(setup):
        add(case)
    return results


def _tell(case: Case, found: Result, seconds: float) -> None:
    figures = f"{100 * found['shares']['headline']:.1f}%"
    tokens = f"{found['live']:.0f} live, {found['kept']:.0f} kept"
    same = f"{100 * found['same_as_full']:.0f}% as the full model"
    print(f"{case.title}: {figures}, {tokens}, {same}, {seconds:.0f} s", flush=True)


def _write(options: argparse.Namespace, setup: Setup, results: list[Result]) -> None:
    config = json.loads((setup.checkpoint / "config.json").read_text())
    layers = config["text_config"]["num_hidden_layers"]
    picture = options.page.with_suffix(".png")
    plot(results, setup.section["fastv_layer"], layers, picture)
    parts = (f"![]({picture.name})", summary(results, setup.asked, setup.dtype), table(results, setup.asked))
    options.page.write_text(insert(options.page.read_text(), "\n\n".join(parts)))
    figures = [{name: value for name, value in each.items() if name != "answers"} for each in results]
    file = options.out / "accuracy.json"
    file.write_text(
        json.dumps({"pictures": options.pictures, "dtype": setup.dtype, "results": figures}, indent=1)
    )
    print(f"{options.page}, {picture} and {file} are written", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "llava-hybrid")
    parser.add_argument("--pictures", type=int, default=40, help="up to ten questions are asked on each")
    parser.add_argument("--dtype", default="float32", help="of the servers; transformers computes in float32")
    parser.add_argument("--levels", default="low,mid,high", help="of the checkpoint, for their thresholds")
    parser.add_argument("--ratios", default="0.25,0.5,0.75,0.9", help="of pruning alone")
    parser.add_argument("--both-ratios", default="0.5", help="of pruning after merging")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "accuracy.md")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
