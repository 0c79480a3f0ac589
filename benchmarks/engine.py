"""One engine, measured: started by run.py in a process of its own, prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

REQUESTS = 16
TEXT_TOKENS = 60
LOADS = {"prefill": (1, True), "mixed": (32, True), "decode": (256, True), "text": (64, False)}
BLOCK_SIZE = 16
POOL_BYTES = 3 << 30


def picture_seeds(load: str, repeats: int) -> list[int]:
    """Seeds of the pictures that the measured repeats of a load send."""
    first = 1 + 100 * list(LOADS).index(load)
    return [(first + repeat) * 1000 + index for repeat in range(1, repeats + 1) for index in range(REQUESTS)]


def requests(seed: int, with_image: bool, image_token: int) -> list[dict[str, Any]]:
    """REQUESTS prompts of TEXT_TOKENS random tokens, each with a picture of its own if asked for."""
    from benchmarks.checkpoint import picture

    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for index in range(REQUESTS):
        text = random_text(draw)
        image = picture(seed * 1000 + index) if with_image else None
        made.append({"prompt_token_ids": text} if image is None else with_picture(text, image, image_token))
    return made


def random_text(draw: random.Random) -> list[int]:
    """TEXT_TOKENS token ids of ordinary word pieces."""
    return [draw.randrange(300, 1000) for _ in range(TEXT_TOKENS)]


def with_picture(text: list[int], image: Any, image_token: int) -> dict[str, Any]:
    """A prompt of a text with a picture behind its fifth token."""
    return {
        "prompt_token_ids": [*text[:5], image_token, *text[5:]],
        "multi_modal_data": {"image": image},
    }


def measure(llm: Any, load: str, repeats: int, image_token: int) -> dict[str, Any]:
    """Run a load ``repeats`` times after one warm-up, with fresh pictures each time.

    Returns:
        Medians over the repeats: requests/s, seconds to first token (median over requests), output
        tokens/s; and all requests/s.

    """
    from vllm import SamplingParams

    tokens, with_image = LOADS[load]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    rates, firsts = [], []
    for repeat in range(repeats + 1):
        prompts = requests(1 + repeat + 100 * list(LOADS).index(load), with_image, image_token)
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - began
        assert all(len(o.outputs[0].token_ids) == tokens for o in outputs)
        if repeat:
            rates.append(REQUESTS / took)
            firsts.append(statistics.median(o.metrics.first_token_latency for o in outputs))
    return {
        "requests_per_s": statistics.median(rates),
        "time_to_first_token_s": statistics.median(firsts),
        "tokens_per_s": statistics.median(rates) * tokens,
        "all_requests_per_s": rates,
    }


def peak_blocks(
    llm: Any, prompts: list[dict[str, Any]], extra_args: dict[str, Any] | None = None
) -> dict[str, float]:
    """Share of the KV pool in use while picture prompts decode together, by vLLM's own gauge."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, extra_args=extra_args
    )
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(number), prompt, params)
    decoding: set[str] = set()
    while len(decoding) < len(prompts):
        decoding.update(o.request_id for o in llm.llm_engine.step() if len(o.outputs[0].token_ids) >= 2)
    used = next(m.value for m in llm.get_metrics() if m.name == "vllm:kv_cache_usage_perc")
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return {"pool_share": used, "blocks_per_request": used * (blocks - 1) / len(prompts)}


def tree_memory() -> int:
    """Peak resident bytes of this process and its children, summed."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(_peak(process.pid) for process in family)


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def open_engine(
    checkpoint: Path, override: dict[str, Any], pool_bytes: int = POOL_BYTES, **options: Any
) -> Any:
    """An engine of a checkpoint as all are measured.

    Args:
        checkpoint: its folder.
        override: for vLLM's ``hf_overrides``.
        pool_bytes: of KV.
        options: more of them, or others, for vLLM's ``LLM``.

    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    from vllm import LLM

    usual: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 1},
        "disable_log_stats": False,
    }
    if override.get("hybrid") is not None:
        # Stock's kernel wants blocks of 32; the hybrid one serves at its own default.
        usual["block_size"] = BLOCK_SIZE
    return LLM(str(checkpoint), hf_overrides=override, kv_cache_memory_bytes=pool_bytes, **(usual | options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kind", choices=("stock", "hybrid", "off", "merging", "pruning"), required=True)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    section = json.loads((args.checkpoint / "hybrid.json").read_text())
    llm = open_engine(args.checkpoint, overrides(args.kind, section))
    image_token = json.loads((args.checkpoint / "config.json").read_text())["image_token_index"]
    result: dict[str, Any] = {
        "kind": args.kind,
        "loads": {load: measure(llm, load, args.repeats, image_token) for load in args.loads.split(",")},
        "blocks": peak_blocks(llm, requests(77, True, image_token)),
        "peak_bytes": tree_memory(),
    }
    print("RESULT " + json.dumps(result), flush=True)


def overrides(kind: str, section: dict[str, Any]) -> dict[str, Any]:
    """``--hf-overrides`` of each kind of server; all kinds of stock have the same."""
    if kind.startswith("stock"):
        return {"architectures": ["LlavaForConditionalGeneration"]}
    picked: Any = {
        "hybrid": lambda: section,
        "off": lambda: None,
        "merging": lambda: {"thresholds": section["thresholds"]},
        "pruning": lambda: {k: v for k, v in section.items() if k != "thresholds"},
        "prompt_end": lambda: section | {"fastv_rank": "prompt_end"},
        "turn_end": lambda: section | {"fastv_rank": "turn_end"},
    }[kind]()
    return {"architectures": ["LlavaHybridForConditionalGeneration"], "hybrid": picked}


if __name__ == "__main__":
    main()
