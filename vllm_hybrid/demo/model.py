"""A small LLaVA-1.5-shaped checkpoint, made on the spot: what the server needs, without a download.

Everything but the size is LLaVA-1.5's: a CLIP tower at 336 pixels with 576 patches, a two-layer projector, a
Llama decoder, file layout, key names, prompt format. The weights ship with the package;
``tools/demo_training`` made them, from scratch, on the pictures of :mod:`vllm_hybrid.demo.scenes`. Random
ones, scaled so that attention is peaky and the answer depends on the picture, can take their place; their
answers are words without sense.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vllm_hybrid.checkpoint.assistant_header import find_assistant_header
from vllm_hybrid.checkpoint.llava import ARCHITECTURE, load_tower
from vllm_hybrid.checkpoint.writing import (
    LlavaShape,
    llava_config,
    write_json,
    write_processor,
    write_weights,
)
from vllm_hybrid.demo.pictures import write_pictures
from vllm_hybrid.demo.scenes import draw_scene
from vllm_hybrid.demo.tokenizer import (
    BOS,
    CONTEXT,
    EMBEDDED,
    EOS,
    FIRST_PIECE,
    IMAGE_ID,
    PAD_ID,
    write_tokenizer,
)
from vllm_hybrid.tools.calibrate import Progress, calibrate
from vllm_hybrid.tools.folders import complete_folder

SHAPE = LlavaShape(
    width=256,
    inside=512,
    layers=8,
    heads=4,
    kv_heads=4,
    head_size=64,
    vocabulary=1088,
    context=CONTEXT,
    vision_width=192,
    vision_inside=768,
    vision_layers=6,
    vision_heads=3,
)

# Average live tokens of the calibration pictures at each level; those of DyMU's LLaVA-1.5 models. FastV drops
# the same share of them at all.
LEVELS = {"low": 94, "mid": 195, "high": 394}
DEFAULT_LEVEL = "mid"
FASTV_LAYER, FASTV_RATIO = 2, 0.5
# Series of scenes that neither training nor any examination draws from.
CALIBRATION_SERIES, SHIPPED_SERIES = 3, 4
CALIBRATION_SCENES, SHIPPED_SCENES = 128, 8

Weights = dict[str, Tensor]


def trained_weights() -> Weights:
    """The weights that ship, bf16, by the names of llava-1.5-7b-hf."""
    from safetensors.torch import load_file

    return load_file(EMBEDDED / "model.safetensors")


def write_demo_model(
    out: str | Path,
    force: bool = False,
    weights: Callable[[], Weights] = trained_weights,
    progress: Progress | None = None,
) -> Path:
    """Write the demo checkpoint: configuration, tokenizer, processor, weights, thresholds, pictures.

    Args:
        out: folder to write; it appears when it is complete.
        force: replace a checkpoint that is already there.
        weights: gives the weights, by the names of llava-1.5-7b-hf.
        progress: called as progress(stage, done, total) while the thresholds are calibrated.

    Returns:
        The folder.

    Raises:
        ValueError: ``out`` is taken; one sentence says by what.

    """
    with complete_folder(out, force) as folder:
        write_tokenizer(folder)
        write_processor(folder)
        made = {name: t.to(torch.bfloat16).contiguous() for name, t in weights().items()}
        write_weights(folder, made)
        write_json(folder / "generation_config.json", _special_ids())
        write_json(folder / "config.json", config(None))
        write_pictures(folder / "pictures")
        write_scenes(folder / "pictures", SHIPPED_SERIES, SHIPPED_SCENES)
        write_json(folder / "config.json", config(_hybrid_section(folder, progress)))
    return Path(out)


def write_scenes(folder: Path, series: int, count: int) -> list[Path]:
    """Write scenes of a series as ``scene-NUMBER.png`` into a folder that is made; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"scene-{number}.png" for number in range(count)]
    for number, file in enumerate(files):
        Image.fromarray(draw_scene([series, number]).pixels).save(file)
    return files


def config(hybrid: dict[str, Any] | None) -> dict[str, Any]:
    """The checkpoint's ``config.json`` with the given ``hybrid`` section."""
    return llava_config(SHAPE, ARCHITECTURE, "bfloat16", IMAGE_ID, _special_ids()) | {"hybrid": hybrid}


def random_weights(seed: int) -> Weights:
    """Random weights in float32, by the names of llava-1.5-7b-hf; the same ones for the same seed."""
    made = _Random(seed)
    _add_tower(made)
    made.linear("multi_modal_projector.linear_1", SHAPE.width, SHAPE.vision_width, gain=1.5, bias=0.1)
    made.linear("multi_modal_projector.linear_2", SHAPE.width, SHAPE.width, gain=1.5, bias=0.1)
    _add_decoder(made)
    # Answers should be readable: only word pieces and the end have logits other than 0, and of so many
    # logits of deviation 3 one that is 0 is never the largest.
    unwanted = [i for i in range(SHAPE.vocabulary) if i != EOS and not FIRST_PIECE <= i < IMAGE_ID]
    made["language_model.lm_head.weight"][unwanted] = 0
    return dict(made)


class _Random(dict[str, Tensor]):
    """Random tensors by name. A matrix of gain g maps inputs of unit variance to outputs of deviation g."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def linear(self, name: str, outputs: int, inputs: int, gain: float, bias: float | None = None) -> None:
        self[f"{name}.weight"] = self.normal(outputs, inputs) * (gain / math.sqrt(inputs))
        if bias is not None:
            self[f"{name}.bias"] = self.normal(outputs) * bias

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self[f"{name}.weight"] = 1 + 0.1 * self.normal(size)
        if bias:
            self[f"{name}.bias"] = 0.1 * self.normal(size)


def _add_tower(made: _Random) -> None:
    tower = "vision_tower.vision_model"
    made[f"{tower}.embeddings.class_embedding"] = made.normal(SHAPE.vision_width)
    side = SHAPE.patch_size
    kernel = made.normal(SHAPE.vision_width, 3, side, side) / math.sqrt(3 * side**2)
    made[f"{tower}.embeddings.patch_embedding.weight"] = kernel
    made[f"{tower}.embeddings.position_embedding.weight"] = _smooth_positions(made)
    made.norm(f"{tower}.pre_layrnorm", SHAPE.vision_width, bias=True)
    made.norm(f"{tower}.post_layernorm", SHAPE.vision_width, bias=True)
    for layer in range(SHAPE.vision_layers):
        name = f"{tower}.encoder.layers.{layer}"
        for part, gain in (("q_proj", 1.4), ("k_proj", 1.4), ("v_proj", 0.8), ("out_proj", 0.8)):
            made.linear(f"{name}.self_attn.{part}", SHAPE.vision_width, SHAPE.vision_width, gain, bias=0.2)
        made.norm(f"{name}.layer_norm1", SHAPE.vision_width, bias=True)
        made.norm(f"{name}.layer_norm2", SHAPE.vision_width, bias=True)
        made.linear(f"{name}.mlp.fc1", SHAPE.vision_inside, SHAPE.vision_width, gain=1.5, bias=0.1)
        made.linear(f"{name}.mlp.fc2", SHAPE.vision_width, SHAPE.vision_inside, gain=0.7, bias=0.1)


def _smooth_positions(made: _Random) -> Tensor:
    """Position embeddings [577, width]: a share common to all, slow change over the grid, a little noise.

    Patches of equal content are then similar, the more so the nearer they are, so that plain pictures merge.
    """
    grid = torch.cartesian_prod(torch.arange(SHAPE.side), torch.arange(SHAPE.side)).float()
    waves = made.normal(2, SHAPE.vision_width) * (1.4 * math.pi / SHAPE.side)
    phases = made.normal(SHAPE.vision_width) * math.pi
    patches = 0.25 * (grid @ waves + phases).sin() + 0.08 * made.normal(SHAPE.patches, SHAPE.vision_width)
    return torch.cat([made.normal(1, SHAPE.vision_width), 0.3 * made.normal(1, SHAPE.vision_width) + patches])


def _add_decoder(made: _Random) -> None:
    heads = SHAPE.heads * SHAPE.head_size
    made["language_model.model.embed_tokens.weight"] = made.normal(SHAPE.vocabulary, SHAPE.width)
    for layer in range(SHAPE.layers):
        name = f"language_model.model.layers.{layer}"
        made.norm(f"{name}.input_layernorm", SHAPE.width)
        made.norm(f"{name}.post_attention_layernorm", SHAPE.width)
        made.linear(f"{name}.self_attn.q_proj", heads, SHAPE.width, gain=1.4)
        made.linear(f"{name}.self_attn.k_proj", heads, SHAPE.width, gain=1.4)
        made.linear(f"{name}.self_attn.v_proj", heads, SHAPE.width, gain=1.2)
        made.linear(f"{name}.self_attn.o_proj", SHAPE.width, heads, gain=1.2)
        made.linear(f"{name}.mlp.gate_proj", SHAPE.inside, SHAPE.width, gain=1.0)
        made.linear(f"{name}.mlp.up_proj", SHAPE.inside, SHAPE.width, gain=1.0)
        made.linear(f"{name}.mlp.down_proj", SHAPE.width, SHAPE.inside, gain=1.0)
    made.norm("language_model.model.norm", SHAPE.width)
    made.linear("language_model.lm_head", SHAPE.vocabulary, SHAPE.width, gain=3.0)


def _hybrid_section(folder: Path, progress: Progress | None) -> dict[str, Any]:
    """The ``hybrid`` section: levels calibrated on scenes, and the chat template's header."""
    tower, image_processor = load_tower(folder)
    with tempfile.TemporaryDirectory() as pictures:
        files = write_scenes(Path(pictures), CALIBRATION_SERIES, CALIBRATION_SCENES)
        thresholds = {
            name: calibrate(tower, image_processor, files, tokens, batch_size=len(files), progress=progress)
            for name, tokens in LEVELS.items()
        }
    return {
        "levels": {
            name: {"thresholds": values, "fastv_ratio": FASTV_RATIO} for name, values in thresholds.items()
        },
        "default_level": DEFAULT_LEVEL,
        "fastv_layer": FASTV_LAYER,
        "assistant_header": find_assistant_header(folder),
    }


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD_ID}
