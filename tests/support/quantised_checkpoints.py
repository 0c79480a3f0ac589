"""Quantised copies of a tiny checkpoint, in the formats that tools publish, and what their weights mean.

Only the language model's linear layers are quantised; tower, projector, embeddings and head stay as they are.
Weights are rounded to the nearest of some sixteen levels, also where a format holds 256, so that an answer
tells the quantised weights from those they come from. Tools that calibrate pick better levels, in the same
formats.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
BITS, PER_WORD = 4, 8
FLOAT8 = torch.float8_e4m3fn
# As recipes of llm-compressor leave parts out.
IGNORED = ("re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*")
_IN_ORDER = tuple(range(PER_WORD))
# Which of eight neighbours lies in which four bits of a word, lowest first (AutoAWQ's GEMM format).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FILE = "model.safetensors"
_QUANTISED = re.compile(r"(.*language_model\.(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight")


@dataclass(frozen=True)
class Kind:
    """A format.

    section: from the names of the linear layers that are left alone to the configuration's
    "quantization_config". quantise: from a weight [outputs, inputs] and the dtype of scales to the tensors in
    its place, by the ends of their names, and to the weight [outputs, inputs] that they mean.
    """

    section: Callable[[Sequence[str]], Mapping[str, Any]]
    quantise: Callable[[Tensor, torch.dtype], tuple[dict[str, Tensor], Tensor]]


def write_quantised(
    source: Path, target: Path, kind: Kind, dtype: torch.dtype, ignore: Sequence[str] | None = None
) -> Path:
    """Write a quantised copy of a checkpoint.

    Args:
        source: a checkpoint of `write_checkpoint`, with one weight file.
        target: the folder to write.
        kind: one of :data:`KINDS`.
        dtype: of what is not quantised, and of scales.
        ignore: takes the place of what the configuration says about the layers that are left alone.

    Returns:
        `target`.

    """
    weights = load_file(source / _FILE)
    shutil.copytree(source, target)
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer = _QUANTISED.fullmatch(name)
        parts = kind.quantise(tensor.float(), dtype)[0] if layer else {"": tensor.to(dtype)}
        stored |= {f"{layer[1]}.{p}" if layer else name: value.contiguous() for p, value in parts.items()}
    save_file(stored, target / _FILE, {"format": "pt"})
    section = dict(kind.section(_left_alone(weights)))
    if ignore is not None:
        section["ignore"] = list(ignore)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": section}
    (target / "config.json").write_text(json.dumps(config))
    return target


def write_meaning(source: Path, target: Path, meant: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Path:
    """Write a plain copy of a checkpoint, in float32, that has the weights a quantised one means.

    Args:
        source: as for :func:`write_quantised`.
        target: the folder to write.
        meant: from a weight of the language model's linear layers to what takes its place.
        dtype: what all other weights are rounded to.

    Returns:
        `target`.

    """
    shutil.copytree(source, target)
    weights = {
        name: (meant(tensor.float()) if _QUANTISED.fullmatch(name) else tensor.to(dtype).float()).contiguous()
        for name, tensor in load_file(source / _FILE).items()
    }
    save_file(weights, target / _FILE, {"format": "pt"})
    return target


def _left_alone(weights: Mapping[str, Tensor]) -> list[str]:
    """Linear layers that are not quantised, by their names in the checkpoint."""
    matrices = [name for name, tensor in weights.items() if tensor.dim() == 2 and "embed" not in name]
    return sorted(name.removesuffix(".weight") for name in matrices if not _QUANTISED.fullmatch(name))


def pack(values: Tensor, dim: int, order: Sequence[int] = _IN_ORDER) -> Tensor:
    """Eight values of four bits in each int32, lowest bits first.

    Args:
        values: int [rows, columns] in [0, 16).
        dim: along which neighbours share a word.
        order: which of eight neighbours comes first, second, ...

    """
    words = values.long().unflatten(dim, (-1, PER_WORD)).movedim(dim + 1, -1)
    packed = torch.zeros_like(words[..., 0])
    for place, neighbour in enumerate(order):
        packed |= words[..., neighbour] << BITS * place
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def levels(weight: Tensor, dtype: torch.dtype, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to sixteen levels, in groups of :data:`GROUP` inputs.

    Args:
        weight: [outputs, inputs].
        dtype: what scales are stored as.
        symmetric: whether level 8 means zero in all groups.

    Returns:
        Levels 0 to 15 [outputs, inputs], and of each group the scale and the level that means zero
        [outputs, groups].

    """
    groups = weight.unflatten(1, (-1, GROUP))
    if symmetric:
        scale = (groups.abs().amax(2) / 7).to(dtype)
        zero = torch.full_like(scale, 8, dtype=torch.int32)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / 15).to(dtype)
        zero = (-low / scale.float()).round().to(torch.int32)
    rounded = (groups / scale.float()[..., None]).round().int() + zero[..., None]
    return rounded.clamp(0, 15).flatten(1), scale, zero


def _meaning(level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    shifted = level.unflatten(1, (-1, GROUP)) - zero[..., None]
    return (shifted * scale.float()[..., None]).flatten(1)


def _w8a8(weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 7).to(dtype)
    rounded = (weight / scale.float()).round().to(torch.int8)
    return {"weight": rounded, "weight_scale": scale}, rounded * scale.float()


def _w4a16(weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    level, scale, zero = levels(weight, dtype, symmetric=True)
    shape = torch.tensor(weight.shape)
    parts = {"weight_packed": pack(level, 1), "weight_scale": scale, "weight_shape": shape}
    return parts, _meaning(level, scale, zero)


def _gptq(weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    level, scale, zero = levels(weight, dtype, symmetric=True)
    parts = {
        "qweight": pack(level.T, 0),
        # The format holds one less than the level of zero.
        "qzeros": pack(zero.T - 1, 1),
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return parts, _meaning(level, scale, zero)


def _awq(weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    level, scale, zero = levels(weight, dtype, symmetric=False)
    parts = {
        "qweight": pack(level.T, 1, _AWQ_ORDER),
        "qzeros": pack(zero.T, 1, _AWQ_ORDER),
        "scales": scale.T,
    }
    return parts, _meaning(level, scale, zero)


def float8_channels(weight: Tensor) -> Tensor:
    """What a weight [outputs, inputs] means in E4M3 with a float32 scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(FLOAT8).max
    return (weight / scale).to(FLOAT8).float() * scale


def _compressed(
    layout: str, ignore: Sequence[str], weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """As llm-compressor writes it."""
    common = {"dynamic": False, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | dict(weights),
        "input_activations": None if inputs is None else common | dict(inputs),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


KINDS: dict[str, Kind] = {
    # Names one by one, as llm-compressor saves them.
    "W8A8": Kind(
        lambda left: _compressed(
            "int-quantized",
            left,
            {"num_bits": 8, "strategy": "channel", "group_size": None},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
        _w8a8,
    ),
    "W4A16": Kind(
        lambda _: _compressed(
            "pack-quantized", IGNORED, {"num_bits": BITS, "strategy": "group", "group_size": GROUP}, None
        ),
        _w4a16,
    ),
    "GPTQ": Kind(
        lambda _: {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
        },
        _gptq,
    ),
    "AWQ": Kind(
        lambda _: {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["vision_tower", "multi_modal_projector"],
        },
        _awq,
    ),
}
