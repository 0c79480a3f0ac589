"""Pictures drawn and preprocessed once, and new requests made of them without any further preprocessing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoint import picture
from benchmarks.engine import TEXT_TOKENS

TEXT_BEFORE = 5
# Random tokens of a prompt lie between these ids.
TOKENS = (300, 1000)
AT_A_TIME = 8
FIRST_SEED = 100_000


def prepare_pictures(model: Path, count: int) -> Path:
    """Draw pictures and do to them what the server's processor does; once, all engines share the file.

    Args:
        model: folder with the processor.
        count: pictures.

    Returns:
        A safetensors file with ``pixels``: bfloat16 [count, 3, 336, 336].

    """
    file = model / f"pictures-{count}.safetensors"
    if file.exists():
        return file
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(str(model))

    def pixels(first: int) -> torch.Tensor:
        drawn = [picture(FIRST_SEED + i) for i in range(first, min(first + AT_A_TIME, count))]
        return processor(images=drawn, return_tensors="pt")["pixel_values"].to(torch.bfloat16)

    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(pixels, range(0, count, AT_A_TIME)))
    partial = file.with_suffix(".partial")
    save_file({"pixels": torch.cat(parts)}, partial)
    partial.replace(file)
    return file


def raw_prompt(image_token: int) -> dict[str, Any]:
    """A request with one of the pictures as a user would send it."""
    text = random_text(random.Random(0))
    return {
        "prompt_token_ids": [*text[:TEXT_BEFORE], image_token, *text[TEXT_BEFORE:]],
        "multi_modal_data": {"image": picture(FIRST_SEED)},
    }


def random_text(draw: random.Random) -> list[int]:
    """TEXT_TOKENS token ids."""
    return [draw.randrange(*TOKENS) for _ in range(TEXT_TOKENS)]


class Supply:
    """Requests that no cache has seen: each has a text of its own and a picture under a name of its own.

    The pictures repeat after all have been sent, their names never do, and names are all that vLLM's caches
    of encoder outputs, processed pictures and prefixes go by.

    Args:
        rendered: one request as vLLM's own renderer made it, of :func:`raw_prompt`.
        pixels: bfloat16 [pictures, 3, height, width], of :func:`prepare_pictures`.
        seed: of the texts; no two supplies may have the same.

    """

    def __init__(self, rendered: dict[str, Any], pixels: torch.Tensor, seed: int) -> None:
        self._rendered = rendered
        self._pixels = pixels
        self._draw = random.Random(seed)
        self._seed = seed
        self._sent = 0

    @classmethod
    def of(
        cls, render: Callable[[dict[str, Any]], dict[str, Any]], model: Path, image_token: int, **plan: int
    ) -> Supply:
        """A supply from the prepared file.

        Args:
            render: vLLM's rendering of a raw request.
            model: folder of the model.
            image_token: id of the placeholder.
            plan: ``pictures`` in the file, and ``seed``.

        """
        pixels = load_file(prepare_pictures(model, plan["pictures"]))["pixels"]
        return cls(render(raw_prompt(image_token)), pixels, plan["seed"])

    def take(self, count: int) -> list[dict[str, Any]]:
        """New requests, ready for the engine."""
        return [next(self._requests()) for _ in range(count)]

    def _requests(self) -> Iterator[dict[str, Any]]:
        from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, MultiModalKwargsItems

        while True:
            (item,) = self._rendered["mm_kwargs"]["image"]
            field = item["pixel_values"].field
            pixels = self._pixels[self._sent % len(self._pixels)]
            item = MultiModalKwargsItem({"pixel_values": MultiModalFieldElem(data=pixels, field=field)})
            text = random_text(self._draw)
            ids = list(self._rendered["prompt_token_ids"])
            (place,) = self._rendered["mm_placeholders"]["image"]
            ids[: place.offset] = text[: place.offset]
            ids[place.offset + place.length :] = text[place.offset :]
            name = f"picture-{self._seed}-{self._sent}"
            self._sent += 1
            yield {
                **self._rendered,
                "prompt_token_ids": ids,
                "mm_kwargs": MultiModalKwargsItems({"image": [item]}),
                "mm_hashes": {"image": [name]},
            }
