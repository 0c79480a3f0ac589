"""The benchmark's checkpoint: LLaVA-1.5's proportions at a size a CPU serves in seconds, random weights."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vllm_hybrid.checkpoint.writing import LlavaShape, llava_config, write_processor, write_weights
from vllm_hybrid.demo.tokenizer import BOS, CONTEXT, EOS, IMAGE_ID, PAD_ID, write_tokenizer
from vllm_hybrid.tools.calibrate import calibrate, live_counts

LIVE_TOKENS = 90
FASTV_LAYER = 2
FASTV_RATIO = 0.5
_TOWER_PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")


SHAPE = LlavaShape(
    width=1024,
    inside=2816,
    layers=16,
    heads=16,
    kv_heads=16,
    head_size=64,
    vocabulary=32064,
    context=CONTEXT,
    vision_width=512,
    vision_inside=2048,
    vision_layers=6,
    vision_heads=8,
)


def config(shape: LlavaShape = SHAPE) -> LlavaConfig:
    """LLaVA-1.5's configuration at a size, with the demo tokenizer's ids."""
    special_ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD_ID}
    described = llava_config(shape, "LlavaForConditionalGeneration", "bfloat16", IMAGE_ID, special_ids)
    return LlavaConfig.from_dict(described)


def picture(seed: int) -> Image.Image:
    """A picture of 1 to 23 shapes on a plain ground; no two seeds give the same one."""
    draw = random.Random(seed)

    def colour() -> tuple[int, int, int]:
        return draw.randrange(256), draw.randrange(256), draw.randrange(256)

    image = Image.new("RGB", (336, 336), colour())
    canvas = ImageDraw.Draw(image)
    for index in range(draw.randrange(1, 24)):
        x, y = draw.randrange(336), draw.randrange(336)
        box = (x, y, x + draw.randrange(20, 150), y + draw.randrange(20, 150))
        (canvas.ellipse if index % 2 else canvas.rectangle)(box, fill=colour())
    return image


def data_url(seed: int) -> str:
    """The picture of a seed as PNG, for OpenAI's API."""
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def answer_words(checkpoint: Path) -> list[int]:
    """Token ids of words of the checkpoint's tokenizer, of which answers are made.

    Random weights know more ids than their tokenizer. A row of these words is text that becomes the same ids
    again when the next turn sends it, as a trained model's answers mostly do.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    words = {i: piece[1:] for piece, i in tokenizer.get_vocab().items() if piece[:1] == "\u2581"}
    return sorted(
        i
        for i, word in words.items()
        if len(word) > 1 and word.isalpha() and tokenizer(word, add_special_tokens=False)["input_ids"] == [i]
    )


def write(folder: Path) -> Path:
    """Write the checkpoint and its thresholds unless they are there; about a minute.

    Returns:
        The folder, servable as stock LLaVA and as hybrid: the section ``hybrid`` stands in
        ``hybrid.json`` beside the checkpoint's configuration.

    """
    if (folder / "hybrid.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config()).to(torch.bfloat16)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    write_weights(folder, {_hub_name(k): w for k, w in weights.items()})
    write_tokenizer(folder)
    write_processor(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    files = []
    for seed in range(32):
        files.append(pictures / f"{seed}.png")
        picture(-1 - seed).save(files[-1])
    tower = model.model.vision_tower.float()
    thresholds = calibrate(tower, processor, files, LIVE_TOKENS)
    counts = live_counts(tower, processor, files, thresholds)
    section = {"thresholds": thresholds, "fastv_layer": FASTV_LAYER, "fastv_ratio": FASTV_RATIO}
    (folder / "hybrid.json").write_text(json.dumps(section))
    print(
        f"thresholds: {sum(counts) / len(counts):.1f} live tokens on average, {min(counts)} to {max(counts)}"
    )
    return folder


def _hub_name(name: str) -> str:
    """Weight names as stock vLLM reads them: transformers 5 leaves out ``vision_model.``."""
    for part in _TOWER_PARTS:
        name = name.replace(f"vision_tower.{part}", f"vision_tower.vision_model.{part}")
    return name
