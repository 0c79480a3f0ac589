"""The outside yardstick: transformers' LLaVA, one request at a time, bf16, on the same device."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402
from transformers import AutoImageProcessor  # noqa: E402

from benchmarks.engine import requests as some_requests  # noqa: E402
from benchmarks.gpu.running.answering import Answers, questions  # noqa: E402
from benchmarks.gpu.speed.measuring import Timed, summary  # noqa: E402
from benchmarks.gpu.speed.model import random_model  # noqa: E402


def inputs_of(request: dict[str, Any], image_token: int, processor: Any, device: str) -> dict[str, Any]:
    """What transformers' generate takes for one of the engine's requests."""
    ids: list[int] = []
    for token in request["prompt_token_ids"]:
        ids += [token] * (576 if token == image_token else 1)
    pixels = processor(images=[request["multi_modal_data"]["image"]], return_tensors="pt")["pixel_values"]
    return {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
        "pixel_values": pixels.to(device, torch.bfloat16),
    }


class _FirstToken:
    """A streamer that notes when the first new token is there; generate hands the prompt over first."""

    def __init__(self) -> None:
        self.calls = 0
        self.clock = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.clock = time.perf_counter()

    def end(self) -> None:
        pass


def run(model: Any, inputs: list[dict[str, Any]], tokens: int) -> Timed:
    """Time requests one after the other."""
    timed = Timed(tokens)
    for one in inputs:
        began, streamer = time.perf_counter(), _FirstToken()
        made = model.generate(
            **one,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=streamer,
        )
        if made.shape[1] - one["input_ids"].shape[1] != tokens:
            raise RuntimeError(f"{made.shape[1] - one['input_ids'].shape[1]} tokens instead of {tokens}")
        done = time.perf_counter()
        timed.first.append(streamer.clock - began)
        timed.last.append(done - streamer.clock)
        timed.seconds += done - began
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("plan", help="JSON made by bench.py; cells come by standard input")
    args = parser.parse_args()
    answers = Answers()
    plan = json.loads(args.plan)
    device = "cuda" if plan["cuda"] else "cpu"
    began = time.perf_counter()
    model = random_model(args.folder, device)
    processor = AutoImageProcessor.from_pretrained(str(args.folder))
    image_token = json.loads((args.folder / "config.json").read_text())["image_token_index"]
    answers.tell({"engine_s": time.perf_counter() - began})
    seed = plan["seed"]
    with torch.inference_mode():
        for cell in questions():
            began = time.perf_counter()
            runs = []
            for repeat in range(plan["repeats"] + 1):
                seed += 1
                asked = some_requests(seed, True, image_token)[: 1 if repeat == 0 else cell["requests"]]
                inputs = [inputs_of(request, image_token, processor, device) for request in asked]
                runs.append(run(model, inputs, cell["tokens"]))
            # The first run warms up.
            found = {"preemptions": 0, "cell_s": time.perf_counter() - began}
            answers.tell({"result": summary(runs[1:]) | found})


if __name__ == "__main__":
    main()
