"""A servable folder from a LLaVA-1.5 checkpoint: weights linked, the rest copied, ``config.json`` completed.

Weights become hard links, which cost no space and outlive a move of either folder. Across file systems they
become symbolic links to the absolute place: the prepared folder may then move, the checkpoint may not.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hybrid import __version__
from vllm_hybrid.checkpoint.assistant_header import assistant_header_of, find_assistant_header
from vllm_hybrid.checkpoint.llava import (
    ARCHITECTURE,
    check_checkpoint,
    load_config,
    load_tower,
    merging_layers,
    read_config,
)
from vllm_hybrid.checkpoint.weights import weight_files
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.tools.calibrate import calibrate, check_wanted
from vllm_hybrid.tools.folders import check_target, complete_folder
from vllm_hybrid.tools.journal import Journal
from vllm_hybrid.tools.pictures import MOST_NAMED, find_pictures, readable_pictures
from vllm_hybrid.tools.progress import Notice, Progress
from vllm_hybrid.tools.thresholds import read_thresholds

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def prepare(
    checkpoint: str | Path,
    out: str | Path,
    *,
    thresholds: str | Path | None = None,
    level: str | None = None,
    images: str | Path | None = None,
    tokens: int | None = None,
    fastv_layer: int | None = None,
    fastv_ratio: float | None = None,
    assistant_header: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    skip_unreadable: bool = False,
) -> HybridConfig:
    """Write ``out``, a folder that ``vllm serve`` takes, beside a LLaVA-1.5 checkpoint.

    Args:
        checkpoint: the checkpoint's folder; it is left as it is.
        out: the folder to write; it appears when it is complete.
        thresholds: a file with merge thresholds; see :func:`read_thresholds`.
        level: name of the level to serve where the file has several.
        images: folder of pictures to calibrate thresholds on instead.
        tokens: average live tokens per picture that calibration is to reach.
        fastv_layer: K, decoder layers before image tokens are dropped.
        fastv_ratio: R, share of live image tokens to drop; left out: none.
        assistant_header: text that the chat template puts before an answer; left out: the token ids that the
            checkpoint's section has, or what its chat template says. Where that says nothing, a Notice tells
            why.
        force: replace a checkpoint at ``out``.
        progress: called as progress(stage, pictures done, pictures) during calibration.
        skip_unreadable: calibrate without the pictures that cannot be read.

    Returns:
        What the folder will be served with. With neither thresholds nor images, nothing merges.

    Raises:
        ValueError: an argument or the checkpoint is wrong; one sentence says which and why, and
            nothing is written.

    """
    if thresholds is not None and images is not None:
        raise ValueError("both a threshold file and calibration images were given; give one of them")
    if (images is None) != (tokens is None):
        raise ValueError("calibration needs both images and a number of tokens; give --images and --tokens")
    if skip_unreadable and images is None:
        raise ValueError("--skip-unreadable has no effect without --images; give --images too")
    if level is not None and thresholds is None:
        raise ValueError(f"level {level!r} was given without a threshold file; give --thresholds too")
    if fastv_layer is not None and not fastv_ratio:
        raise ValueError(
            f"--fastv-layer {fastv_layer} has no effect without --fastv-ratio; give --fastv-ratio too"
        )
    source, target = Path(os.path.abspath(checkpoint)), Path(os.path.abspath(out))
    config = check_checkpoint(source)
    check_target(target, force)
    if _overlap(source.resolve(), target.resolve()):
        raise ValueError(f"{out} lies in {checkpoint} or holds it; give a folder beside it")

    # What a server needs has been opened; what else cannot be copied is found before the slow part.
    files = _files_to_take(source)
    # Validated before the slow part, calibration, starts.
    section: dict[str, Any] = {"thresholds": None}
    if thresholds is not None:
        section |= read_thresholds(thresholds, merging_layers(config), config.vision_config.num_hidden_layers)
    if level is not None:
        section["default_level"] = level
    section |= {
        k: v for k, v in (("fastv_layer", fastv_layer), ("fastv_ratio", fastv_ratio)) if v is not None
    }
    header = _header(source, assistant_header)
    if header is not None:
        section["assistant_header"] = header
    parsed = _parse(section, config)
    if images is not None and tokens is not None:
        calibration = calibrate_checkpoint(
            source, images, {"": tokens}, progress=progress, skip_unreadable=skip_unreadable
        )
        section["thresholds"] = calibration.thresholds[""]
        parsed = _parse(section, config)

    with complete_folder(target, force) as folder:
        _link_or_copy(source, files, folder)
        completed = read_config(source) | {"architectures": [ARCHITECTURE], "hybrid": section}
        (folder / "config.json").write_text(json.dumps(completed, indent=2) + "\n")
    return parsed


@dataclass
class Calibration:
    """What calibration found.

    Attributes:
        thresholds: one per executed vision layer, by the name of the level.
        pictures: number of pictures they were found with.

    """

    thresholds: dict[str, list[float]]
    pictures: int


def calibrate_checkpoint(
    checkpoint: str | Path,
    images: str | Path,
    levels: Mapping[str, int],
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    schedule: str = "constant",
    journal: str | Path | None = None,
    skip_unreadable: bool = False,
) -> Calibration:
    """Thresholds for a checkpoint, for several averages of live tokens of a folder's pictures.

    Runs on the GPU where there is one, in float32. All that can be wrong with the checkpoint, the numbers and
    the pictures is found before the long part starts.

    Args:
        checkpoint: a LLaVA-1.5 checkpoint's folder.
        images: folder of pictures; see :func:`vllm_hybrid.tools.pictures.find_pictures`.
        levels: average live tokens to reach, by the name of the level.
        batch_size: see :func:`vllm_hybrid.tools.calibrate.calibrate`; so are seed, progress, schedule.
        seed: see there.
        progress: see there.
        schedule: see there.
        journal: file that keeps what is found, so that a call that was cut off goes on, also with a few
            pictures more or less; removed at the end.
        skip_unreadable: leave out pictures that cannot be read.

    Raises:
        ValueError: the checkpoint, the folder, a picture or a number is wrong; one sentence says which.

    """
    import torch

    files = find_pictures(images)
    tower, image_processor = load_tower(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    layer = load_config(checkpoint).vision_feature_layer
    for tokens in levels.values():
        check_wanted(tower, tokens, batch_size, layer, schedule)
    files = readable_pictures(files, image_processor, skip_unreadable, progress)
    weights = [_stamp(file) for file in weight_files(checkpoint)]
    processing = json.loads(image_processor.to_json_string())
    kept = Journal(journal, [__version__, weights, processing, layer])
    found = {
        level: calibrate(
            tower,
            image_processor,
            files,
            tokens,
            batch_size,
            seed,
            progress,
            layer,
            schedule,
            kept,
            folder=images,
        )
        for level, tokens in levels.items()
    }
    kept.remove()
    return Calibration(found, len(files))


def _stamp(file: Path) -> list[Any]:
    """What tells a file from a changed one."""
    return [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]


def _header(source: Path, text: str | None) -> Any:
    """The section's assistant header: of a text, as the checkpoint's own section has it, or found."""
    if text is not None:
        return assistant_header_of(source, text)
    section = read_config(source).get("hybrid")
    if isinstance(section, dict) and section.get("assistant_header") is not None:
        return section["assistant_header"]
    try:
        return find_assistant_header(source)
    except ValueError as error:
        sentence = f"left out hybrid.assistant_header: {error}, or give --assistant-header"
        warnings.warn(sentence, Notice, stacklevel=3)
        return None


def _parse(section: dict[str, Any], config: Any) -> HybridConfig:
    return HybridConfig.parse(
        section, vision_layers=merging_layers(config), decoder_layers=config.text_config.num_hidden_layers
    )


def _overlap(first: Path, second: Path) -> bool:
    return first.is_relative_to(second) or second.is_relative_to(first)


def _link_or_copy(source: Path, files: Sequence[Path], target: Path) -> None:
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in WEIGHT_SUFFIXES:
            link(file, place)
        else:
            shutil.copyfile(file, place)


def _files_to_take(source: Path) -> list[Path]:
    """A checkpoint's files; a Notice names those that cannot be read."""
    files, lost = list[Path](), list[Path]()
    _gather(source, files, lost)
    if lost:
        named = ", ".join(map(str, lost[:MOST_NAMED]))
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        sentence = f"left out what cannot be read and no server needs: {named}{more}"
        warnings.warn(sentence, Notice, stacklevel=3)
    return files


def _gather(folder: Path, files: list[Path], lost: list[Path]) -> None:
    """Sort what is in a folder into what can be read and what cannot.

    Version control and download caches, which begin with a dot, are neither.
    """
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        try:
            if child.is_dir():
                # A linked folder that holds this one has no end.
                if not folder.resolve().is_relative_to(child.resolve()):
                    _gather(child, files, lost)
            elif child.is_file():
                child.open("rb").close()
                files.append(child)
            elif child.is_symlink():
                lost.append(child)
        except OSError:
            lost.append(child)


def link(file: Path, place: Path) -> None:
    """Make ``place`` a hard link to a file, or a symbolic one where file systems do not allow that.

    Links in a model hub's cache are followed, so that the link is to the data.
    """
    data = file.resolve()
    try:
        os.link(data, place)
    except OSError:
        place.symlink_to(data)
