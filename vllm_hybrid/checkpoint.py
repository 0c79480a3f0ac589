"""A LLaVA-1.5 checkpoint on disk: its configuration, what of it can be served, and its vision tower.

Nothing here needs vLLM, and of the weights only the tower's are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .tower import executed_layers

ARCHITECTURE = "LlavaHybridForConditionalGeneration"
# Names of the tower's weights start with one of these: as published, and as transformers saves since 4.52.
TOWER_PREFIXES = ("vision_tower.", "model.vision_tower.")


def read_config(checkpoint: str | Path) -> dict[str, Any]:
    """The checkpoint's ``config.json`` as it is written.

    Raises:
        ValueError: the folder or the file is missing or is not JSON.

    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a LLaVA-1.5 checkpoint")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a LLaVA-1.5 checkpoint")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); repair it") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no object; give the folder of a LLaVA-1.5 checkpoint")
    return config


def load_config(checkpoint: str | Path) -> Any:
    """The checkpoint's configuration with transformers' defaults filled in, a ``LlavaConfig``.

    Raises:
        ValueError: it is not LLaVA-1.5 in shape; one sentence names the first property that does not fit.

    """
    raw = read_config(checkpoint)
    kind = raw.get("model_type")
    if kind in ("llava_llama", "llava_mistral"):
        raise ValueError(
            f"{checkpoint} has model_type {kind!r}, LLaVA's own format; "
            "give the checkpoint in the format of llava-hf/llava-1.5-7b-hf"
        )
    if kind != "llava":
        raise ValueError(
            f"{checkpoint} has model_type {kind!r}, but only 'llava' can be served; give another"
        )
    from transformers import LlavaConfig

    config = LlavaConfig.from_pretrained(str(checkpoint))
    check_shape(config)
    return config


def check_shape(config: Any) -> None:
    """Refuse a ``LlavaConfig`` that is not LLaVA-1.5 in shape.

    Raises:
        ValueError: the first property that does not fit.

    """
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    wanted = {
        "vision_config.model_type": (config.vision_config.model_type, "clip_vision_model"),
        "text_config.model_type": (config.text_config.model_type, "llama"),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, "default"),
        "text_config.rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for key, (value, expected) in wanted.items():
        if value != expected:
            raise ValueError(
                f"{key} is {value!r}, but only {expected!r} can be served; give another checkpoint"
            )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer is {config.vision_feature_layer!r}, but only one layer can be read; "
            "give another checkpoint"
        )


def merging_layers(config: Any) -> int:
    """CLIP layers that run for the configuration's feature layer, so how many thresholds there are."""
    return executed_layers(config.vision_config.num_hidden_layers, config.vision_feature_layer)


def weight_files(checkpoint: str | Path) -> list[Path]:
    """The checkpoint's safetensors files: those of its index, or else the only one.

    Raises:
        ValueError: there is none, or one that the index names is missing.

    """
    folder = Path(checkpoint)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: Iterable[str] = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; give a complete checkpoint with safetensors weights")
    return files


def load_tower(checkpoint: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Any]:
    """The checkpoint's vision tower in float32, and its image processor.

    Args:
        checkpoint: folder of a LLaVA-1.5 checkpoint.
        device: where to put the tower.

    Returns:
        A transformers ``CLIPVisionModel`` in evaluation mode and a ``CLIPImageProcessor``.

    Raises:
        ValueError: the checkpoint is no LLaVA-1.5 checkpoint, or weights are missing.

    """
    from safetensors import safe_open
    from transformers import CLIPImageProcessor, CLIPVisionModel

    config = load_config(checkpoint)
    # Releases differ in whether the model has an inner ``vision_model``; the weights on disk always do.
    with torch.device("meta"):
        tower = CLIPVisionModel(config.vision_config)
    inner = getattr(tower, "vision_model", tower)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(checkpoint):
        with safe_open(str(file), "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                prefix = next((p for p in TOWER_PREFIXES if name.startswith(p)), None)
                if prefix is not None:
                    key = name.removeprefix(prefix).removeprefix("vision_model.")
                    state[key] = weights.get_tensor(name).float()
    inner.to_empty(device="cpu")
    missing, unexpected = inner.load_state_dict(state, strict=False)
    for name in sorted({*missing, *unexpected}):
        what = "lacks" if name in missing else "has an unknown"
        raise ValueError(f"{checkpoint} {what} vision tower weight {name}; give another checkpoint")
    _fill_position_ids(inner)
    return tower.to(device).eval(), CLIPImageProcessor.from_pretrained(str(checkpoint))


def _fill_position_ids(inner: Any) -> None:
    """Buffers that are not saved have no values after a load from nothing."""
    ids = inner.embeddings.position_ids
    inner.embeddings.position_ids = torch.arange(ids.shape[-1]).expand_as(ids).clone()
