"""Writing the files of a LLaVA-1.5 checkpoint as llava-hf has them: configuration, processor, weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of a LLaVA.

    Attributes:
        width, inside, layers, heads, kv_heads, head_size: of the language model.
        vocabulary, context: its token ids and positions.
        vision_width, vision_inside, vision_layers, vision_heads: of the vision tower.
        image_size, patch_size: pixels of a side.

    """

    width: int
    inside: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    vision_width: int
    vision_inside: int
    vision_layers: int
    vision_heads: int
    image_size: int = 336
    patch_size: int = 14

    @property
    def side(self) -> int:
        """Patches along an edge of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.side**2


def llava_config(
    shape: LlavaShape, architecture: str, dtype: str, image_token: int, special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """What ``config.json`` says of a model.

    Args:
        shape: its sizes.
        architecture: the class that serves it.
        dtype: of its weights, such as "bfloat16".
        image_token: id of the image placeholder.
        special_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    """
    return {
        "architectures": [architecture],
        "model_type": "llava",
        # Transformers 5 reads "dtype", vLLM and what is older read the other.
        "dtype": dtype,
        "torch_dtype": dtype,
        "ignore_index": -100,
        "image_seq_length": shape.patches,
        "image_token_index": image_token,
        "pad_token_id": special_ids["pad_token_id"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": dtype,
            "torch_dtype": dtype,
            "hidden_act": "silu",
            "hidden_size": shape.width,
            "intermediate_size": shape.inside,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_size,
            "max_position_embeddings": shape.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": shape.vocabulary,
            **special_ids,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_inside,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            "projection_dim": shape.vision_width,
            "layer_norm_eps": 1e-5,
        },
    }


def write_processor(folder: Path, image_size: int = 336, patch_size: int = 14) -> None:
    """Write the image processor's and the processor's settings, CLIP's as LLaVA-1.5 has them."""
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
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
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
    }
    write_json(folder / "preprocessor_config.json", preprocessing)
    write_json(folder / "processor_config.json", processing)


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Write weights by name as safetensors; several files come with an index."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    size = math.ceil(len(names) / shards)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard * size : (shard + 1) * size]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(folder / "model.safetensors.index.json", content)


def write_json(file: Path, content: object) -> None:
    """Write a value as readable JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n")
