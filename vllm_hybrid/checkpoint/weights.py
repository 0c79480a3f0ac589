"""The weight files of a checkpoint: which they are, whether they are whole, and whether they fit its shape.

Only headers are read, so that a checkpoint of any size is checked at once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hybrid.errors import one_line
from vllm_hybrid.files import check_present, read_json_object
from vllm_hybrid.method.clip_tower import executed_layers

INDEX = "model.safetensors.index.json"
# Names as published, and as transformers saves them since 4.52. vLLM's LLaVA reads both.
_NEW_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
TOWER = "model.vision_tower."
# Releases differ in whether the tower has this inner part; what lies in it is the same.
_INNER_TOWER = "vision_model."
_TOWER_LAYERS = "encoder.layers."
# A buffer that older releases saved. It holds 0, 1, 2, ... and is not read.
POSITION_IDS = f"{TOWER}embeddings.position_ids"
# Where vLLM finds a quantisation: these keys of the configuration and of its text_config, or these files: of
# ModelOpt up to 0.29, and of those that --quantization awq and gptq need.
QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its name there, its shape, and its dtype as safetensors calls it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(checkpoint: str | Path) -> list[Path]:
    """The safetensors files that vLLM loads: those of the checkpoint's index, or else all there are.

    Raises:
        ValueError: there is none, the index is broken, or a file that it names is missing.

    """
    folder = Path(checkpoint)
    index = folder / INDEX
    if index.is_symlink() or index.is_file():
        files = sorted({folder / name for name in _weight_map(index).values()})
    else:
        # A dangling link has a place in the list, so that it is named. Hidden files vLLM does not see.
        files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} has no safetensors weights; give a complete checkpoint that has them")
    for file in files:
        check_present(file)
    return files


def stored_tensors(checkpoint: str | Path) -> dict[str, StoredTensor]:
    """The tensors of the weight files by their newer names, the tower's without "vision_model.".

    Raises:
        ValueError: a file is missing or damaged, or lacks a tensor that the index promises.

    """
    folder = Path(checkpoint)
    files = weight_files(folder)
    headers = {file: _header(file) for file in files}
    if (folder / INDEX).is_file():
        for tensor, name in _weight_map(folder / INDEX).items():
            if tensor not in headers[folder / name]:
                raise ValueError(
                    f"{folder / name} lacks {tensor}, which {INDEX} promises; fetch both again, or repair "
                    "the index"
                )
    return {
        newer_name(name): StoredTensor(file, name, shape, dtype)
        for file, header in headers.items()
        for name, (shape, dtype) in header.items()
    }


def newer_name(name: str) -> str:
    """A weight's name as transformers saves it since 4.52, the tower's without "vision_model."."""
    for old, new in _NEW_NAMES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.startswith(TOWER):
        name = TOWER + name.removeprefix(TOWER).removeprefix(_INNER_TOWER)
    return name


def is_quantised(checkpoint: str | Path, config: Any) -> bool:
    """Whether a checkpoint names a quantisation in any of the places where vLLM looks for one.

    Args:
        checkpoint: its folder.
        config: a ``LlavaConfig``.

    Raises:
        ValueError: a file that is to describe it is broken.

    """
    parts = (config, config.text_config)
    if any(getattr(part, key, None) is not None for part in parts for key in QUANTISATION_KEYS):
        return True
    files = [Path(checkpoint) / name for name in QUANTISATION_FILES]
    there = [file for file in files if file.is_file() or file.is_symlink()]
    for file in there:
        read_json_object(file)
    return bool(there)


def check_weights(checkpoint: str | Path, config: Any, *, quantised: bool = False) -> None:
    """See that the weight files are whole and hold what vLLM loads for the configuration.

    Args:
        checkpoint: its folder.
        config: a ``LlavaConfig``.
        quantised: tensors have other names and shapes, and are not compared with the configuration. So
            it is also where the checkpoint names a quantisation, see :func:`is_quantised`.

    Raises:
        ValueError: the first fault, in one sentence.

    """
    stored = stored_tensors(checkpoint)
    if quantised or is_quantised(checkpoint, config):
        return
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if _is_loaded(name, config):
            _check_tensor(checkpoint, name, shape, stored.get(name))
    _check_depth(stored, expected)


def tower_tensors(checkpoint: str | Path, config: Any) -> dict[str, StoredTensor]:
    """The vision tower's tensors, all of them and with the configuration's shapes.

    Args:
        checkpoint: its folder.
        config: a ``LlavaConfig``.

    Returns:
        Tensors by their newer names, without the prefix :data:`TOWER`.

    Raises:
        ValueError: a weight file is broken, or the tower is quantised or does not fit; one sentence says
            which.

    """
    stored = {
        name: tensor
        for name, tensor in stored_tensors(checkpoint).items()
        if name.startswith(TOWER) and name != POSITION_IDS
    }
    for tensor in stored.values():
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"the vision tower of {checkpoint} is quantised ({tensor.name} is stored as {tensor.dtype}); "
                "give the unquantised checkpoint, which calibration needs"
            )
    expected = tower_shapes(config)
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape, stored.get(name))
    _check_depth(stored, expected)
    return {name.removeprefix(TOWER): tensor for name, tensor in stored.items()}


def _is_loaded(name: str, config: Any) -> bool:
    """Whether vLLM loads a weight: of the tower, only what its feature layer needs."""
    if not name.startswith(TOWER):
        return True
    part = name.removeprefix(TOWER)
    if part.startswith("post_layernorm."):
        return False
    if not part.startswith(_TOWER_LAYERS):
        return True
    layer = int(part.removeprefix(_TOWER_LAYERS).partition(".")[0])
    return layer < executed_layers(config.vision_config.num_hidden_layers, config.vision_feature_layer)


def _check_depth(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a tower that is deeper than its configuration says: it would give features of another layer."""
    for name, found in stored.items():
        if name.startswith(TOWER) and name not in expected and name != POSITION_IDS:
            raise ValueError(
                f"{found.file} has a vision tower weight {found.name}, which config.json does not ask for; "
                "give a checkpoint whose config.json belongs to it"
            )


def _check_tensor(
    checkpoint: str | Path, name: str, shape: tuple[int, ...], found: StoredTensor | None
) -> None:
    if found is None:
        raise ValueError(
            f"{checkpoint} lacks the weight {name}, which its config.json asks for; give a complete "
            "checkpoint whose config.json belongs to it"
        )
    if found.shape != shape:
        raise ValueError(
            f"{found.name} in {found.file} has shape {list(found.shape)}, but config.json asks for "
            f"{list(shape)}; give a checkpoint whose config.json belongs to it"
        )


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a LLaVA model by their newer names, the tower's without "vision_model.".

    Args:
        config: a ``LlavaConfig``.

    Raises:
        ValueError: no model can have it.

    """
    from transformers import LlavaForConditionalGeneration

    state = empty_model(LlavaForConditionalGeneration, config).state_dict()
    shapes = {newer_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    shapes.pop(POSITION_IDS, None)
    if config.tie_word_embeddings or config.text_config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def tower_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """As :func:`expected_shapes`, of the vision tower alone."""
    from transformers import CLIPVisionModel

    state = empty_model(CLIPVisionModel, config.vision_config).state_dict()
    shapes = {newer_name(TOWER + name): tuple(tensor.shape) for name, tensor in state.items()}
    shapes.pop(POSITION_IDS, None)
    return shapes


def empty_model(kind: type[Any], config: Any) -> Any:
    """A model of transformers without values, on the device "meta".

    Args:
        kind: its class.
        config: its configuration.

    Raises:
        ValueError: no model can have it.

    """
    import torch

    plain = copy.deepcopy(config)
    # What a model is made of depends on neither. An attention that a checkpoint names need not be installed;
    # old configurations have -1 for a padding token.
    plain._attn_implementation = "sdpa"
    if hasattr(plain, "text_config"):
        plain.text_config.pad_token_id = None
    try:
        with torch.device("meta"):
            return kind(plain)
    except Exception as error:  # whatever a nonsensical size makes of some layer
        raise ValueError(
            f"config.json describes no model that can be built ({one_line(error)}); give another checkpoint"
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor, as an index has them."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f"{index} has no weight_map; fetch it again, or remove it if there is one weight file"
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} has {name!r} as the file of {tensor}; give the name of a safetensors file beside it"
            )
    return names


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes by name. The library compares the file's length with what the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off or damaged ({one_line(error)}); fetch it again") from error
