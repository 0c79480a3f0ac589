"""Sends pictures to a running server and shows what each one cost: tokens in all, live, kept, and KV saved.

The server is BASE_URL, or http://localhost:8000. Token counts come from its /metrics before and after each
question, so other users' questions in between would be counted too.

    python examples/demo.py
    python examples/demo.py --picture photo.jpg --question "What is this?"
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import APIConnectionError, OpenAI, OpenAIError
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vllm_hybrid.demo.model import SHIPPED_SERIES
from vllm_hybrid.demo.scenes import draw_scene
from vllm_hybrid.tools.pictures import load_rgb

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000").rstrip("/").removesuffix("/v1")
# Scenes that ship with the demo model, by number.
SHOWN = (2, 5, 0)
COUNTERS = ("images", "patches", "live_tokens", "kept_tokens", "blocks_given_back")


def main() -> None:
    """Ask the question about every picture and print answers and costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--picture", action="append", help="a picture file; again for more; default: drawn ones"
    )
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    try:
        chosen = {Path(p).name: load_rgb(p) for p in options.picture or ()}
        if not chosen:
            chosen = {f"scene-{number}": _scene(number) for number in SHOWN}
        client = OpenAI(base_url=f"{BASE_URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
        model = client.models.list().data[0]
        tiers = decoder_tiers(getattr(model, "root", None))
        for name, picture in chosen.items():
            ask(client, model.id, name, picture, options.question, options.max_tokens, tiers)
    except (APIConnectionError, urllib.error.URLError):
        sys.exit(f"no server answers at {BASE_URL}: start one with `make serve`, or set BASE_URL")
    except (OpenAIError, ValueError) as error:
        sys.exit(f"the demo stopped: {error}")


def ask(
    client: OpenAI,
    model: str,
    name: str,
    picture: Image.Image,
    question: str,
    max_tokens: int,
    tiers: tuple[int, int] | None,
) -> None:
    """Ask about one picture and print the answer and what it cost."""
    before = read_counters()
    started = time.perf_counter()
    reply = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(picture)}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        max_tokens=max_tokens,
        temperature=0,
    )
    seconds = time.perf_counter() - started
    usage = reply.usage
    print(f"\n{name}: {question}")
    print(f"  answer         {(reply.choices[0].message.content or '').strip()}")
    print(f"  prompt tokens  {usage.prompt_tokens if usage else '?'}   ({seconds:.2f} s)")
    for line in costs(before, counters_after(before), usage.prompt_tokens if usage else None, tiers):
        print(f"  {line}")


def _scene(number: int) -> Image.Image:
    return Image.fromarray(draw_scene([SHIPPED_SERIES, number]).pixels)


def costs(
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    prompt_tokens: int | None,
    tiers: tuple[int, int] | None,
) -> list[str]:
    """Lines on image tokens and KV cache from counters before and after one question.

    Args:
        before: counters by name, None where the server exports none.
        after: the same afterwards.
        prompt_tokens: the prompt's length, image patches included.
        tiers: decoder layers before and after FastV's choice; None where they are not known.

    """
    if before is None or after is None:
        return ["image tokens   not known: the server exports no vllm_hybrid counters (is anything reduced?)"]
    images, patches, live, kept, blocks = (after[name] - before[name] for name in COUNTERS)
    if images == 0:
        return ["image tokens   not known: the server counted no image for this question"]
    lines = [f"image tokens   {patches:.0f} patches -> {live:.0f} live -> {kept:.0f} kept"]
    if images > 1:
        lines[0] += f"   ({images:.0f} images: others are using the server)"
    if tiers is not None and prompt_tokens is not None and images == 1:
        saved = kv_saved(patches, live, kept, prompt_tokens - patches, *tiers)
        lines.append(f"KV saved       {saved:.0%} of the prompt's   ({blocks:.0f} blocks given back)")
    else:
        lines.append(f"KV blocks      {blocks:.0f} given back")
    return lines


def kv_saved(patches: float, live: float, kept: float, text: float, lower: int, upper: int) -> float:
    """Share of the prompt's keys and values that need not be kept.

    Layers before FastV's choice hold the live image tokens, those after it the kept ones, all hold the text.
    """
    held = lower * (live + text) + upper * (kept + text)
    return 1 - held / ((lower + upper) * (patches + text))


def decoder_tiers(folder: str | None) -> tuple[int, int] | None:
    """Decoder layers before and after FastV's choice, if the served checkpoint is on this machine."""
    file = Path(folder or "") / "config.json"
    if folder is None or not file.is_file():
        return None
    from transformers import LlavaConfig

    section = json.loads(file.read_text()).get("hybrid") or {}
    layers = LlavaConfig.from_pretrained(folder).text_config.num_hidden_layers
    lower = section.get("fastv_layer", 2) if section.get("fastv_ratio") else layers
    return lower, layers - lower


def counters_after(before: dict[str, float] | None) -> dict[str, float] | None:
    """The counters once the question is in them: the server publishes them shortly after its answer."""
    for _ in range(20):
        after = read_counters()
        if before is None or after is None or after["images"] > before["images"]:
            return after
        time.sleep(0.1)
    return after


def read_counters() -> dict[str, float] | None:
    """The server's counters by name, over all engines; None where it exports none of ours."""
    try:
        with urllib.request.urlopen(f"{BASE_URL}/metrics", timeout=30) as reply:
            text = reply.read().decode()
    except urllib.error.HTTPError:
        return None
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm_hybrid:").removesuffix("_total")
            if sample.name == f"vllm_hybrid:{name}_total":
                found[name] = found.get(name, 0.0) + sample.value
    return {name: found.get(name, 0.0) for name in COUNTERS} if found else None


def data_url(picture: Image.Image) -> str:
    """A picture as the API takes it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
