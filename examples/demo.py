"""Asks a running server about pictures, each at several details, and shows the answers and what they cost.

The server is BASE_URL, or http://localhost:8000. A detail may be OpenAI's (auto, low, high, original) or a
level's name. What a question cost, its response tells.

    python examples/demo.py
    python examples/demo.py --picture photo.jpg --question "What is this?" --detail low --detail original
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from openai import APIConnectionError, BadRequestError, OpenAI, OpenAIError
from PIL import Image

from vllm_hybrid.demo.model import SHIPPED_SERIES
from vllm_hybrid.demo.scenes import draw_scene
from vllm_hybrid.tools.pictures import load_rgb

BASE_URL = os.environ.get("BASE_URL", "http://localhost:8000").rstrip("/").removesuffix("/v1")
# Scenes that ship with the demo model, by number.
SHOWN = (2, 5, 0)
DETAILS = ("low", "auto", "high", "original")
# As wide as what is printed in front of an answer.
COST_WIDTH = 51


def main() -> None:
    """Ask the question about every picture and print answers and costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--picture", action="append", help="a picture file; again for more; default: drawn ones"
    )
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--detail", action="append", help=f"again for more; default: {', '.join(DETAILS)}")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    try:
        chosen = {Path(p).name: load_rgb(p) for p in options.picture or ()}
        if not chosen:
            chosen = {f"scene-{number}": _scene(number) for number in SHOWN}
        client = OpenAI(base_url=f"{BASE_URL}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
        model = client.models.list().data[0]
        for name, picture in chosen.items():
            print(f"\n{name}: {options.question}")
            for detail in options.detail or DETAILS:
                print(f"  {detail:<9}", *ask(client, model.id, picture, detail, options), sep="  ")
    except (APIConnectionError, urllib.error.URLError):
        sys.exit(f"no server answers at {BASE_URL}: start one with `make serve`, or set BASE_URL")
    except (OpenAIError, ValueError) as error:
        sys.exit(f"the demo stopped: {error}")


def ask(
    client: OpenAI,
    model: str,
    picture: Image.Image,
    detail: str,
    options: argparse.Namespace,
) -> tuple[str, str]:
    """What one picture cost at a detail, and the answer; in their place why the server knows no such detail.

    Args:
        client: the server's.
        model: the name it serves the model by.
        picture: what is asked about.
        detail: what is sent with it.
        options: with ``question`` and ``max_tokens``.

    """
    image: Any = {"type": "image_url", "image_url": {"url": data_url(picture), "detail": detail}}
    content = [image, {"type": "text", "text": options.question}]
    try:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=options.max_tokens,
            temperature=0,
            extra_body={"vllm_xargs": {"hybrid_cost": 1}},
        )
    except BadRequestError as error:
        if error.param != "detail" or not isinstance(error.body, dict):
            raise
        return "not asked:", error.body["message"]
    cost = told((getattr(reply, "kv_transfer_params", None) or {}).get("hybrid"))
    return f"{cost:<{COST_WIDTH}}", (reply.choices[0].message.content or "").strip()


def _scene(number: int) -> Image.Image:
    return Image.fromarray(draw_scene([SHIPPED_SERIES, number]).pixels)


def told(cost: dict[str, Any] | None) -> str:
    """A request's cost in words, as the server's response tells it; None where it does not."""
    if cost is None:
        return "nothing is reduced"
    (image,) = cost["images"]
    saved = 1 - cost["kv_bytes"] / cost["kv_bytes_full"]
    tokens = f"{image['tokens']} -> {image['live_tokens']:3} live -> {image['kept_tokens']:3} kept"
    return f"{image['level']:<8}{tokens}, {saved:3.0%} KV saved"


def data_url(picture: Image.Image) -> str:
    """A picture as the API takes it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
