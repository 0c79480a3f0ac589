"""vLLM's own client, `vllm bench serve --dataset-name random-mm`, against both servers, 1 to 32 at once.

The client's pictures are noise sent as JPEG, so the thresholds are calibrated on such pictures here: what
is compared is the same ~90 live tokens as in run.py, over HTTP, with requests that come and go.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import overrides  # noqa: E402
from benchmarks.vllm_server import VllmServer  # noqa: E402

HERE = Path(__file__).parent
NAME = "bench"
NOISE_PICTURES = 16
POOL_BYTES = 3 << 30


def noise_section(checkpoint: Path) -> dict[str, Any]:
    """The hybrid section with thresholds for noise pictures; made once."""
    file = checkpoint / "hybrid-jpeg-noise.json"
    if not file.exists():
        import numpy as np
        from PIL import Image

        from benchmarks.checkpoint import FASTV_LAYER, FASTV_RATIO, LIVE_TOKENS
        from vllm_hybrid.checkpoint.llava import load_tower
        from vllm_hybrid.tools.calibrate import calibrate

        draw = np.random.default_rng(0)
        pictures = []
        for index in range(NOISE_PICTURES):
            pictures.append(checkpoint / "pictures" / f"noise-{index}.jpg")
            Image.fromarray(draw.integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(pictures[-1], "JPEG")
        thresholds = calibrate(*load_tower(checkpoint), pictures, LIVE_TOKENS)
        file.write_text(
            json.dumps({"thresholds": thresholds, "fastv_layer": FASTV_LAYER, "fastv_ratio": FASTV_RATIO})
        )
    return json.loads(file.read_text())


def server_options(prefix_caching: bool = False) -> list[str]:
    """The same for all servers."""
    caching = "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"
    return [
        *(
            "--served-model-name",
            NAME,
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "2048",
            "--max-num-batched-tokens",
            "16384",
        ),
        *("--max-num-seqs", "64", caching, "--kv-cache-memory-bytes", str(POOL_BYTES)),
    ]


def measure(
    address: str, checkpoint: Path, concurrency: int, tokens: int, requests: int, out: Path
) -> dict[str, float]:
    """One run of vLLM's client.

    Returns:
        requests/s, and the median seconds to first token.

    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    command += ["--base-url", address, "--model", NAME, "--tokenizer", str(checkpoint)]
    command += ["--dataset-name", "random-mm", "--random-input-len", "60", "--random-output-len", str(tokens)]
    command += ["--random-mm-base-items-per-request", "1", "--random-mm-limit-mm-per-prompt", '{"image": 1}']
    command += ["--random-mm-bucket-config", "{(336, 336, 1): 1.0}", "--num-prompts", str(requests)]
    command += [
        "--max-concurrency",
        str(concurrency),
        "--seed",
        str(concurrency * 100 + tokens),
        "--ignore-eos",
    ]
    command += ["--save-result", "--result-dir", str(out.parent), "--result-filename", out.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed: {done.stderr.strip().splitlines()[-1:]}")
    result = json.loads(out.read_text())
    out.unlink()
    if result["completed"] != requests:
        raise RuntimeError(f"{requests - result['completed']} of {requests} requests failed")
    return {"requests_per_s": result["request_throughput"], "first_token_s": result["median_ttft_ms"] / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--concurrencies", default="1,8,32")
    parser.add_argument("--tokens", default="1,32", help="new tokens per request")
    args = parser.parse_args()
    from benchmarks.checkpoint import write

    write(args.checkpoint)
    section = noise_section(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    levels = [int(c) for c in args.concurrencies.split(",")]
    lengths = [int(t) for t in args.tokens.split(",")]
    results: dict[str, dict[str, dict[str, float]]] = {}
    seen: dict[str, float] = {}
    for kind in ("stock", "hybrid"):
        log = args.out / f"serve-{kind}.log"
        with VllmServer(args.checkpoint, log, overrides(kind, section), server_options()) as server:
            measure(server.url, args.checkpoint, 8, 2, 8, args.out / "client.json")
            results[kind] = {
                f"{tokens} new, {level} at once": measure(
                    server.url, args.checkpoint, level, tokens, max(8, 2 * level), args.out / "client.json"
                )
                for tokens in lengths
                for level in levels
            }
            seen = server.reduced()
    lines = ["| load | requests/s | stock | ratio | first token, s | stock |", "|---|---|---|---|---|---|"]
    for load, got in results["hybrid"].items():
        base = results["stock"][load]
        lines.append(
            f"| {load} | {got['requests_per_s']:.2f} | {base['requests_per_s']:.2f} | "
            f"{got['requests_per_s'] / base['requests_per_s']:.2f} | {got['first_token_s']:.2f} | "
            f"{base['first_token_s']:.2f} |"
        )
    images = seen["images"]
    lines += [
        "",
        f"{images:.0f} pictures, {seen['live_tokens'] / images:.1f} live and "
        f"{seen['kept_tokens'] / images:.1f} kept tokens of 576 on average (/metrics).",
    ]
    (args.out / "serve.md").write_text("\n".join(lines) + "\n")
    (args.out / "serve.json").write_text(json.dumps({"results": results, "counters": seen}, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
