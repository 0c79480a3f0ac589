"""The benchmark's model: LLaVA-1.5-7B's configuration without weights, a tower to calibrate, thresholds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.checkpoint import picture
from vllm_hybrid.calibrating import calibrate, live_counts
from vllm_hybrid.demo_model import _write_processor
from vllm_hybrid.demo_tokenizer import IMAGE_ID, write_tokenizer

SEED = 0
CALIBRATION_PICTURES = 32


@dataclass(frozen=True)
class Size:
    """What the vision tower and the decoder measure; both sizes have 576 patches."""

    vision_layers: int
    vision_width: int
    vision_inside: int
    vision_heads: int
    layers: int
    width: int
    inside: int
    heads: int
    head_size: int


SIZES = {
    "7b": Size(24, 1024, 4096, 16, 32, 4096, 11008, 32, 128),
    "tiny": Size(4, 64, 128, 2, 3, 128, 256, 2, 64),
}


def config(size: Size) -> LlavaConfig:
    """LLaVA-1.5's configuration at a size; the 7B one is llava-1.5-7b-hf's but for the tokenizer's ids."""
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision_width,
            intermediate_size=size.vision_inside,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_heads,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.inside,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            head_dim=size.head_size,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )


def write_folder(folder: Path, size: Size) -> Path:
    """Configuration, tokenizer and processor, no weights: for vLLM's ``load_format="dummy"``."""
    if not (folder / "chat_template.jinja").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config(size).save_pretrained(folder)
        write_tokenizer(folder)
        _write_processor(folder)
    return folder


def seeded_tower(vision_config: Any) -> CLIPVisionModel:
    """The same random tower in every process, float32 on the CPU.

    vLLM's dummy weights are too small for a tower: all its keys would be one direction plus rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return CLIPVisionModel(vision_config).eval()


def tower_weights(tower: CLIPVisionModel) -> Iterator[tuple[str, torch.Tensor]]:
    """A tower's weights under the names that LLaVA checkpoints have."""
    for name, weight in tower.state_dict().items():
        yield f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", weight


def _pictures(folder: Path, count: int) -> list[Path]:
    """Calibration pictures; no load sends them."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{seed}.png" for seed in range(count)]
    for seed, file in enumerate(files):
        if not file.exists():
            picture(-1 - seed).save(file)
    return files


def find_thresholds(
    folder: Path, lives: Iterable[int], pictures: int = CALIBRATION_PICTURES
) -> dict[str, dict[str, Any]]:
    """Thresholds for averages of live tokens, found once and kept in the folder.

    Args:
        folder: of :func:`write_folder`.
        lives: wanted averages; 576 stands for no merging and needs none.
        pictures: pictures to calibrate on.

    Returns:
        By wanted average: ``thresholds``, and ``counts``, what they leave of the calibration pictures in the
        tower they were found on (bf16 on a GPU, float32 on a CPU).

    """
    file = folder / "thresholds.json"
    known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    wanted = [live for live in lives if str(live) not in known and live < 576]
    if wanted:
        cuda = torch.cuda.is_available()
        vision = LlavaConfig.from_pretrained(str(folder)).vision_config
        tower = seeded_tower(vision).to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
        processor = AutoImageProcessor.from_pretrained(str(folder))
        files = _pictures(folder / "pictures", pictures)
        for live in wanted:
            found = calibrate(tower, processor, files, live, batch_size=pictures)
            counts = live_counts(tower, processor, files, found, batch_size=pictures)
            known[str(live)] = {"thresholds": found, "counts": counts}
        file.write_text(json.dumps(known))
    return known


def random_model(folder: Path, device: str) -> LlavaForConditionalGeneration:
    """A transformers model of the folder's configuration with random bf16 weights, made on the device."""
    loaded = LlavaConfig.from_pretrained(str(folder))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(loaded).eval()
    finally:
        torch.set_default_dtype(before)
