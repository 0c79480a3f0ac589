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

from vllm_hybrid.checkpoint.llava import ARCHITECTURE, load_tower
from vllm_hybrid.demo.pictures import write_pictures
from vllm_hybrid.demo.scenes import draw_scene
from vllm_hybrid.demo.tokenizer import (
    BOS,
    CONTEXT,
    EMBEDDED,
    EOS,
    FIRST_PIECE,
    IMAGE_ID,
    IMAGE_TOKEN,
    PAD_ID,
    write_json,
    write_tokenizer,
)
from vllm_hybrid.tools.calibrate import Progress, calibrate
from vllm_hybrid.tools.folders import complete_folder

IMAGE_SIZE, PATCH_SIZE, PATCHES = 336, 14, 576
VOCABULARY = 1088
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_INSIDE = 192, 6, 3, 768
WIDTH, LAYERS, HEADS, INSIDE = 256, 8, 4, 512
HEAD_SIZE = 64

# Average live tokens of the calibration pictures at each level; those of DyMU's LLaVA-1.5 models.
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
    from safetensors.torch import save_file

    with complete_folder(out, force) as folder:
        write_tokenizer(folder)
        _write_processor(folder)
        made = {name: t.to(torch.bfloat16).contiguous() for name, t in weights().items()}
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
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
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "hybrid": hybrid,
        "ignore_index": -100,
        "image_seq_length": PATCHES,
        "image_token_index": IMAGE_ID,
        "pad_token_id": PAD_ID,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": WIDTH,
            "intermediate_size": INSIDE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": VOCABULARY,
            **_special_ids(),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_INSIDE,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": VISION_HEADS,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": VISION_WIDTH,
            "layer_norm_eps": 1e-5,
        },
    }


def random_weights(seed: int) -> Weights:
    """Random weights in float32, by the names of llava-1.5-7b-hf; the same ones for the same seed."""
    made = _Random(seed)
    _add_tower(made)
    made.linear("multi_modal_projector.linear_1", WIDTH, VISION_WIDTH, gain=1.5, bias=0.1)
    made.linear("multi_modal_projector.linear_2", WIDTH, WIDTH, gain=1.5, bias=0.1)
    _add_decoder(made)
    # Answers should be readable: only word pieces and the end have logits other than 0, and of so many
    # logits of deviation 3 one that is 0 is never the largest.
    unwanted = [i for i in range(VOCABULARY) if i != EOS and not FIRST_PIECE <= i < IMAGE_ID]
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
    made[f"{tower}.embeddings.class_embedding"] = made.normal(VISION_WIDTH)
    kernel = made.normal(VISION_WIDTH, 3, PATCH_SIZE, PATCH_SIZE) / math.sqrt(3 * PATCH_SIZE**2)
    made[f"{tower}.embeddings.patch_embedding.weight"] = kernel
    made[f"{tower}.embeddings.position_embedding.weight"] = _smooth_positions(made)
    made.norm(f"{tower}.pre_layrnorm", VISION_WIDTH, bias=True)
    made.norm(f"{tower}.post_layernorm", VISION_WIDTH, bias=True)
    for layer in range(VISION_LAYERS):
        name = f"{tower}.encoder.layers.{layer}"
        for part, gain in (("q_proj", 1.4), ("k_proj", 1.4), ("v_proj", 0.8), ("out_proj", 0.8)):
            made.linear(f"{name}.self_attn.{part}", VISION_WIDTH, VISION_WIDTH, gain, bias=0.2)
        made.norm(f"{name}.layer_norm1", VISION_WIDTH, bias=True)
        made.norm(f"{name}.layer_norm2", VISION_WIDTH, bias=True)
        made.linear(f"{name}.mlp.fc1", VISION_INSIDE, VISION_WIDTH, gain=1.5, bias=0.1)
        made.linear(f"{name}.mlp.fc2", VISION_WIDTH, VISION_INSIDE, gain=0.7, bias=0.1)


def _smooth_positions(made: _Random) -> Tensor:
    """Position embeddings [577, width]: a share common to all, slow change over the grid, a little noise.

    Patches of equal content are then similar, the more so the nearer they are, so that plain pictures merge.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    waves = made.normal(2, VISION_WIDTH) * (1.4 * math.pi / side)
    phases = made.normal(VISION_WIDTH) * math.pi
    patches = 0.25 * (grid @ waves + phases).sin() + 0.08 * made.normal(PATCHES, VISION_WIDTH)
    return torch.cat([made.normal(1, VISION_WIDTH), 0.3 * made.normal(1, VISION_WIDTH) + patches])


def _add_decoder(made: _Random) -> None:
    heads = HEADS * HEAD_SIZE
    made["language_model.model.embed_tokens.weight"] = made.normal(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        name = f"language_model.model.layers.{layer}"
        made.norm(f"{name}.input_layernorm", WIDTH)
        made.norm(f"{name}.post_attention_layernorm", WIDTH)
        made.linear(f"{name}.self_attn.q_proj", heads, WIDTH, gain=1.4)
        made.linear(f"{name}.self_attn.k_proj", heads, WIDTH, gain=1.4)
        made.linear(f"{name}.self_attn.v_proj", heads, WIDTH, gain=1.2)
        made.linear(f"{name}.self_attn.o_proj", WIDTH, heads, gain=1.2)
        made.linear(f"{name}.mlp.gate_proj", INSIDE, WIDTH, gain=1.0)
        made.linear(f"{name}.mlp.up_proj", INSIDE, WIDTH, gain=1.0)
        made.linear(f"{name}.mlp.down_proj", WIDTH, INSIDE, gain=1.0)
    made.norm("language_model.model.norm", WIDTH)
    made.linear("language_model.lm_head", VOCABULARY, WIDTH, gain=3.0)


def _hybrid_section(folder: Path, progress: Progress | None) -> dict[str, Any]:
    """The ``hybrid`` section, its thresholds calibrated on scenes."""
    tower, image_processor = load_tower(folder)
    with tempfile.TemporaryDirectory() as pictures:
        files = write_scenes(Path(pictures), CALIBRATION_SERIES, CALIBRATION_SCENES)
        levels = {
            name: calibrate(tower, image_processor, files, tokens, batch_size=len(files), progress=progress)
            for name, tokens in LEVELS.items()
        }
    return {
        "thresholds": levels,
        "default_level": DEFAULT_LEVEL,
        "fastv_layer": FASTV_LAYER,
        "fastv_ratio": FASTV_RATIO,
    }


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD_ID}


def _write_processor(folder: Path) -> None:
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processing = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "preprocessor_config.json", preprocessing)
    write_json(folder / "processor_config.json", processing)
