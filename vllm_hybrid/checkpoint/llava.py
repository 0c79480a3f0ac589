"""A LLaVA-1.5 checkpoint on disk: its configuration, what of it can be served, and its vision tower.

Nothing here needs vLLM, and of the weights only the tower's are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_hybrid.checkpoint.image_processor import load_image_processor
from vllm_hybrid.checkpoint.processor_files import check_image_processor, check_processor_files
from vllm_hybrid.checkpoint.weights import check_weights, empty_model, tower_tensors
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.errors import one_line
from vllm_hybrid.files import read_json_object
from vllm_hybrid.method.clip_tower import executed_layers

ARCHITECTURE = "LlavaHybridForConditionalGeneration"
# Architectures of configurations that describe LLaVA-1.5 as transformers has it.
ARCHITECTURES = ("LlavaForConditionalGeneration", ARCHITECTURE)
# LLaVA's own code writes other configurations, some of them under the same model_type; one of these keys is
# always there.
_OWN_FORMAT_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_OWN_FORMAT_TYPES = ("llava_llama", "llava_mistral", "llava_mpt")


def read_config(checkpoint: str | Path) -> dict[str, Any]:
    """The checkpoint's ``config.json`` as it is written.

    Raises:
        ValueError: the folder or the file is missing or is not JSON.

    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a LLaVA-1.5 checkpoint")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a LLaVA-1.5 checkpoint")
    return read_json_object(folder / "config.json")


def load_config(checkpoint: str | Path) -> Any:
    """The checkpoint's configuration with transformers' defaults filled in, a ``LlavaConfig``.

    Raises:
        ValueError: it is not LLaVA-1.5 in shape; one sentence names the first property that does not fit.

    """
    raw = read_config(checkpoint)
    check_format(checkpoint, raw)
    from transformers import LlavaConfig

    try:
        config = LlavaConfig.from_pretrained(str(checkpoint))
    except Exception as error:  # transformers' own validation raises many kinds
        raise ValueError(
            f"{Path(checkpoint) / 'config.json'} cannot be read as LLaVA's ({one_line(error)}); repair it"
        ) from error
    check_shape(config)
    return config


def check_format(checkpoint: str | Path, raw: dict[str, Any]) -> None:
    """Refuse a configuration that is not transformers' LLaVA.

    transformers would fill what it misses there with the sizes of LLaVA-1.5-7B.

    Args:
        checkpoint: what to call it.
        raw: its ``config.json``.

    Raises:
        ValueError: it is another model's, or in LLaVA's own format; one sentence says which.

    """
    kind, names = raw.get("model_type"), raw.get("architectures")
    own = kind in _OWN_FORMAT_TYPES or any(key in raw for key in _OWN_FORMAT_KEYS)
    if own or _own_architecture(names):
        raise ValueError(
            f"{checkpoint} (model_type {kind!r}, architectures {names!r}) is in LLaVA's own format; "
            "give the checkpoint in the format of llava-hf/llava-1.5-7b-hf"
        )
    if kind != "llava":
        raise ValueError(
            f"{checkpoint} has model_type {kind!r}, but only 'llava' can be served; give another"
        )
    if names is not None and (not isinstance(names, list) or not set(map(str, names)) & set(ARCHITECTURES)):
        raise ValueError(
            f"{checkpoint} has architectures {names!r}, but only {ARCHITECTURES[0]!r} can be served; "
            "give another checkpoint"
        )
    for part in ("text_config", "vision_config"):
        if not isinstance(raw.get(part), dict):
            raise ValueError(
                f"{Path(checkpoint) / 'config.json'} has no object {part}, so its sizes are not known; "
                "give the checkpoint in the format of llava-hf/llava-1.5-7b-hf"
            )


def _own_architecture(names: object) -> bool:
    """Whether architectures are classes of LLaVA's own code, such as LlavaLlamaForCausalLM."""
    found = names if isinstance(names, list) else [names]
    return any(str(name).startswith("Llava") and str(name).endswith("ForCausalLM") for name in found)


def check_checkpoint(checkpoint: str | Path) -> Any:
    """See that a folder holds a complete LLaVA-1.5 checkpoint whose files are whole and belong together.

    Of the weights only headers are read.

    Args:
        checkpoint: its folder.

    Returns:
        Its configuration, see :func:`load_config`.

    Raises:
        ValueError: the first fault, in one sentence.
        OSError: a file cannot be opened.

    """
    config = load_config(checkpoint)
    check_processor_files(checkpoint)
    load_image_processor(checkpoint, config.vision_config.image_size)
    check_weights(checkpoint, config)
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
    vision = config.vision_config
    for key in ("image_size", "patch_size"):
        size = getattr(vision, key)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"vision_config.{key} is {size!r}, which is no number of pixels; give another checkpoint"
            )
    if vision.image_size < vision.patch_size:
        raise ValueError(
            f"vision_config.image_size is {vision.image_size}, less than one patch of "
            f"{vision.patch_size}; give another checkpoint"
        )


def merging_layers(config: Any) -> int:
    """CLIP layers that run for the configuration's feature layer, so how many thresholds there are."""
    return executed_layers(config.vision_config.num_hidden_layers, config.vision_feature_layer)


def parse_hybrid(section: object, config: Any) -> HybridConfig:
    """A ``hybrid`` section validated for a ``LlavaConfig``, see :meth:`HybridConfig.parse`."""
    return HybridConfig.parse(
        section, vision_layers=merging_layers(config), decoder_layers=config.text_config.num_hidden_layers
    )


def load_tower(checkpoint: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Any]:
    """The checkpoint's vision tower in float32, and its image processor.

    Args:
        checkpoint: folder of a LLaVA-1.5 checkpoint.
        device: where to put the tower.

    Returns:
        A transformers ``CLIPVisionModel`` in evaluation mode, and the image processor that the checkpoint
        names; see :func:`vllm_hybrid.checkpoint.image_processor.load_image_processor`.

    Raises:
        ValueError: the checkpoint is no LLaVA-1.5 checkpoint, weights of the tower are missing or quantised,
            or its image processor cannot be used.

    """
    from safetensors import safe_open
    from transformers import CLIPVisionModel

    config = load_config(checkpoint)
    check_image_processor(checkpoint)
    image_processor = load_image_processor(checkpoint, config.vision_config.image_size)
    stored = tower_tensors(checkpoint, config)
    # Releases differ in whether the model has an inner ``vision_model``; names in ``stored`` never have it.
    tower = empty_model(CLIPVisionModel, config.vision_config)
    inner = getattr(tower, "vision_model", tower)
    state: dict[str, torch.Tensor] = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(str(file), "pt") as weights:
            for name, tensor in stored.items():
                if tensor.file == file:
                    state[name] = weights.get_tensor(tensor.name).float()
    inner.to_empty(device="cpu")
    inner.load_state_dict(state)
    _fill_position_ids(inner)
    return tower.to(device).eval(), image_processor


def _fill_position_ids(inner: Any) -> None:
    """Buffers that are not saved have no values after a load from nothing."""
    ids = inner.embeddings.position_ids
    inner.embeddings.position_ids = torch.arange(ids.shape[-1]).expand_as(ids).clone()
