"""The benchmark's model: LLaVA-1.5-7B's configuration without weights, a tower to calibrate, thresholds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.checkpoint import config, picture
from benchmarks.gpu.speed import thresholds
from vllm_hybrid.checkpoint.writing import LlavaShape, write_processor
from vllm_hybrid.demo.tokenizer import CONTEXT, write_tokenizer
from vllm_hybrid.tools.calibrate import calibrate, live_counts

SEED = 0
CALIBRATION_PICTURES = 32


def _size(layers: int, width: int, inside: int, heads: int, head_size: int, **vision: int) -> LlavaShape:
    return LlavaShape(
        width, inside, layers, heads, heads, head_size, vocabulary=32064, context=CONTEXT, **vision
    )


_TOWER_7B = {"vision_width": 1024, "vision_inside": 4096, "vision_heads": 16}
SIZES = {
    "7b": _size(32, 4096, 11008, 32, 128, vision_layers=24, **_TOWER_7B),
    # The 7B model's widths in as few layers as have merging, pruning and two decoder stacks.
    "7b-short": _size(2, 4096, 11008, 32, 128, vision_layers=3, **_TOWER_7B),
    "tiny": _size(3, 128, 256, 2, 64, vision_layers=4, vision_width=64, vision_inside=128, vision_heads=2),
}


def write_folder(folder: Path, size: LlavaShape) -> Path:
    """Configuration, tokenizer and processor, no weights: for vLLM's ``load_format="dummy"``."""
    if not (folder / "chat_template.jinja").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config(size).save_pretrained(folder)
        write_tokenizer(folder)
        write_processor(folder)
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


def tower_file(folder: Path) -> Path:
    """The seeded tower's weights in bfloat16 under the names that LLaVA checkpoints have, written once.

    Drawing them takes each engine seconds, reading them a fraction of one.

    Args:
        folder: of :func:`write_folder`.

    Returns:
        A safetensors file beside the folder, which itself stays without weights.

    """
    file = folder.with_name(folder.name + "-tower.safetensors")
    if not file.exists():
        tower = seeded_tower(LlavaConfig.from_pretrained(str(folder)).vision_config)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({name: w.to(torch.bfloat16) for name, w in tower_weights(tower)}, partial)
        partial.replace(file)
    return file


def _pictures(folder: Path, count: int) -> list[Path]:
    """Calibration pictures; no load sends them."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{seed}.png" for seed in range(count)]
    for seed, file in enumerate(files):
        if not file.exists():
            picture(-1 - seed).save(file)
    return files


def calibrated(tower: CLIPVisionModel, folder: Path, live: int, pictures: int) -> dict[str, Any]:
    """Thresholds that leave an average of live tokens, and the counts they leave of each picture.

    Args:
        tower: of :func:`seeded_tower`, on the device and in the dtype to calibrate in.
        folder: of :func:`write_folder`.
        live: wanted average.
        pictures: pictures to calibrate on.

    """
    processor = AutoImageProcessor.from_pretrained(str(folder))
    files = _pictures(folder / "pictures", pictures)
    found = calibrate(tower, processor, files, live, batch_size=pictures)
    counts = live_counts(tower, processor, files, found, batch_size=pictures)
    return {"thresholds": found, "counts": counts}


def find_thresholds(
    folder: Path, lives: Iterable[int], pictures: int = CALIBRATION_PICTURES
) -> dict[str, dict[str, Any]]:
    """Thresholds for averages of live tokens, found once and kept in the folder.

    Those in `thresholds.json` beside this file are taken where they were found for this very tower; where
    its weights are others, a sentence says so and they are calibrated here.

    Args:
        folder: of :func:`write_folder`.
        lives: wanted averages; 576 stands for no merging and needs none.
        pictures: pictures to calibrate on.

    Returns:
        By wanted average: ``thresholds``, and ``counts``, what they leave of the calibration pictures in the
        tower they were found on (float32 on a CPU for those of the file; calibrated here bf16 on a GPU).

    """
    file = folder / "thresholds.json"
    known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    wanted = [live for live in lives if str(live) not in known and live < 576]
    if wanted:
        vision = LlavaConfig.from_pretrained(str(folder)).vision_config
        tower = seeded_tower(vision)
        known |= carried_thresholds(tower, vision, wanted, pictures)
        cuda = torch.cuda.is_available()
        for live in wanted:
            if str(live) not in known:
                tower = tower.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
                known[str(live)] = calibrated(tower, folder, live, pictures)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(known))
        partial.replace(file)
    return known


def carried_thresholds(
    tower: CLIPVisionModel, vision_config: Any, lives: Iterable[int], pictures: int
) -> dict[str, dict[str, Any]]:
    """What `thresholds.json` has for this tower, by wanted average; nothing where it was made for another."""
    content = thresholds.known_for(vision_config, pictures)
    if content is None:
        return {}
    if not thresholds.same_tower(content["fingerprint"], thresholds.fingerprint(tower)):
        print(
            f"the thresholds in {thresholds.FILE.name} are for a tower with other random weights (they were "
            f"drawn by torch {content['versions']['torch']}, this is {torch.__version__}); calibrating here"
        )
        return {}
    return {str(live): content["found"][str(live)] for live in lives if str(live) in content["found"]}


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
