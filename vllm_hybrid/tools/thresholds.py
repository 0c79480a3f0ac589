"""Merge thresholds on disk: our JSON, which may hold whole levels, and what DyMU's code saves.

DyMU saves the state of its whole encoder (``{"name": ..., "state_dict": ...}``); each block holds a scalar
buffer, named like ``module.visual.transformer.resblocks.7.threshold``, that starts at 1 and becomes the
average over calibration batches. Every layer has one, also the last, which LLaVA-1.5 does not run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_hybrid.config import KNOWN_KEYS
from vllm_hybrid.files import check_present
from vllm_hybrid.levels import LEVEL_KEYS
from vllm_hybrid.tools.level_options import NAMELESS, Setting, section_of

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# What of a ``hybrid`` section a JSON file may hold.
_FILE_KEYS = ("levels", "thresholds", "fastv_ratio", "default_level", "detail")
_FORMS = 'give a list, an object of named lists, or an object with "thresholds" or "levels"'
_BLOCK_THRESHOLD = re.compile(r"(?P<blocks>.*?)\.?(?P<layer>\d+)\.threshold")


def write_thresholds(
    file: str | Path, levels: Mapping[str, Setting], tokens: Mapping[str, int], pictures: int
) -> None:
    """Write calibrated thresholds as JSON, with what else their levels are made of.

    Args:
        file: where to.
        levels: settings by the name of their level, the default level first; one under NAMELESS is written
            without levels.
        tokens: the average of live tokens that each level with thresholds was made for.
        pictures: number of pictures it was made with.

    """
    nameless = list(levels) == [NAMELESS]
    content = section_of(levels)
    content |= {"tokens": tokens[NAMELESS] if nameless else dict(tokens), "pictures": pictures}
    Path(file).write_text(json.dumps(content, indent=2) + "\n")


def read_thresholds(file: str | Path, vision_layers: int, all_layers: int) -> dict[str, Any]:
    """Read a threshold file.

    Args:
        file: JSON (a list, an object of named lists, or an object with "thresholds" or "levels"), or a DyMU
            threshold checkpoint (a file saved by torch: an encoder's state, or a list, tensor or object by
            layer).
        vision_layers: layers of the vision tower that run; a torch file may have one entry for each of
            ``all_layers`` instead, of which the first ``vision_layers`` are taken.
        all_layers: layers of the vision tower.

    Returns:
        The part of a ``hybrid`` section that the file holds: "thresholds" or "levels", and of "fastv_ratio",
        "default_level" and "detail" what is there. Not validated further: :meth:`HybridConfig.parse` does
        that.

    Raises:
        ValueError: the file is missing or holds no thresholds; one sentence says why.

    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a threshold file")
    check_present(path)
    if path.suffix.lower() in TORCH_SUFFIXES:
        found = _from_torch(path)
        return {"thresholds": found[:vision_layers] if len(found) == all_layers else found}
    return _from_json(path)


def _from_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); give JSON, or a checkpoint that ends in .pth"
        ) from error
    if isinstance(content, list):
        return {"thresholds": content}
    if isinstance(content, dict) and ("thresholds" in content or "levels" in content):
        return _part_of_section(content, path)
    # Any other key that a hybrid section has is no level: better refused below than read as one.
    levels = content if isinstance(content, dict) else {}
    if levels and all(isinstance(v, list) for v in levels.values()) and not set(levels) & set(KNOWN_KEYS):
        return {"thresholds": levels}
    raise ValueError(f"{path} holds no thresholds; {_FORMS}")


def _part_of_section(content: dict[str, Any], path: Path) -> dict[str, Any]:
    if "thresholds" in content and "levels" in content:
        raise ValueError(f"{path} has both thresholds and levels; leave one of them in it")
    levels = content.get("levels", content.get("thresholds"))
    if levels == {}:
        raise ValueError(f"{path} has no level; {_FORMS}")
    if "levels" in content and not (
        isinstance(levels, dict) and all(isinstance(setting, dict) for setting in levels.values())
    ):
        raise ValueError(
            f"{path} has levels that are no objects; give each as an object with {' and '.join(LEVEL_KEYS)}"
        )
    return {key: content[key] for key in _FILE_KEYS if key in content}


def _from_torch(path: Path) -> list[float]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler of damaged bytes may raise anything
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain tensors ({type(error).__name__}); "
            "give a DyMU threshold checkpoint or JSON"
        ) from error
    while isinstance(content, Mapping):
        inner = next(
            (content[key] for key in ("state_dict", "thresholds", "threshold") if key in content), None
        )
        if inner is None:
            content = _in_layer_order(content, path)
            break
        content = inner
    if isinstance(content, torch.Tensor) and content.ndim == 1:
        content = content.tolist()
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"{path} holds no list of thresholds; give a DyMU threshold checkpoint or JSON")
    values = [_scalar(value, path) for value in content]
    if all(value == 1 for value in values):
        raise ValueError(
            f"every threshold in {path} is 1, DyMU's starting value; give a calibrated checkpoint"
        )
    return values


def _in_layer_order(content: Mapping[Any, Any], path: Path) -> list[Any]:
    """The values of one per-layer series, keyed 0, "0" or "...blocks.0.threshold", in the layers' order."""
    series: dict[str, dict[int, Any]] = {}
    for key, value in content.items():
        name = str(key)
        match = _BLOCK_THRESHOLD.fullmatch(name)
        if match:
            series.setdefault(match["blocks"], {})[int(match["layer"])] = value
        elif name.isdecimal():
            series.setdefault("", {})[int(name)] = value
    if len(series) != 1:
        what = f"thresholds of several towers ({', '.join(sorted(series))})" if series else "no thresholds"
        raise ValueError(
            f"{path} holds {what}; give a DyMU threshold checkpoint of one vision tower, or JSON"
        )
    (layers,) = series.values()
    if sorted(layers) != list(range(len(layers))):
        missing = min(set(range(max(layers) + 1)) - set(layers))
        raise ValueError(f"{path} has no threshold for layer {missing}; give a complete threshold checkpoint")
    return [layers[layer] for layer in range(len(layers))]


def _scalar(value: Any, path: Path) -> float:
    import torch

    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{path} has an entry that is no number ({type(value).__name__}); give one number a layer"
        )
    return float(value)
