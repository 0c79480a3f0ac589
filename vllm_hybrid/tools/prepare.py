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
    parse_hybrid,
    read_config,
)
from vllm_hybrid.checkpoint.weights import weight_files
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.levels import FULL, parse_levels
from vllm_hybrid.tools.calibrate import calibrate, check_wanted
from vllm_hybrid.tools.folders import check_target, complete_folder
from vllm_hybrid.tools.journal import Journal
from vllm_hybrid.tools.level_options import NAMELESS, Setting, section_of, settings_of, with_options
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
    tokens: int | Mapping[str, int] | None = None,
    fastv_layer: int | None = None,
    fastv_ratio: float | Mapping[str, float] | None = None,
    assistant_header: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    skip_unreadable: bool = False,
) -> HybridConfig:
    """Write ``out``, a folder that ``vllm serve`` takes, beside a LLaVA-1.5 checkpoint.

    Args:
        checkpoint: the checkpoint's folder; it is left as it is.
        out: the folder to write; it appears when it is complete.
        thresholds: a file with merge thresholds or levels; see :func:`read_thresholds`.
        level: name of the default level; left out: the file's, or else the first name in tokens and
            fastv_ratio.
        images: folder of pictures to calibrate thresholds on instead.
        tokens: average live tokens per picture that calibration is to reach: a number, or one by the name of
            each level. A number is every level's where fastv_ratio has names.
        fastv_layer: K, decoder layers before image tokens are dropped.
        fastv_ratio: R, share of live image tokens to drop, in place of any in the file: a ratio for all
            levels but the full one, or one by name; left out: none. A level that is named only here merges
            nothing.
        assistant_header: text that the chat template puts before an answer; left out: the token ids that the
            checkpoint's section has, or what its chat template says. Where that says nothing, a Notice tells
            why.
        force: replace a checkpoint at ``out``.
        progress: called as progress(stage, pictures done, pictures) during calibration.
        skip_unreadable: calibrate without the pictures that cannot be read.

    Returns:
        What the folder will be served with. With neither thresholds nor images, nothing merges. Where
        anything has a name, the section has ``levels``.

    Raises:
        ValueError: an argument or the checkpoint is wrong; one sentence says which and why, and
            nothing is written.

    """
    if thresholds is not None and images is not None:
        raise ValueError("both a threshold file and calibration images were given; give one of them")
    tokens, fastv_ratio = _or_none(tokens), _or_none(fastv_ratio)
    if (images is None) != (tokens is None):
        raise ValueError("calibration needs both images and a number of tokens; give --images and --tokens")
    if skip_unreadable and images is None:
        raise ValueError("--skip-unreadable has no effect without --images; give --images too")
    source, target = Path(os.path.abspath(checkpoint)), Path(os.path.abspath(out))
    config = check_checkpoint(source)
    check_target(target, force)
    if _overlap(source.resolve(), target.resolve()):
        raise ValueError(f"{out} lies in {checkpoint} or holds it; give a folder beside it")

    # What a server needs has been opened; what else cannot be copied is found before the slow part.
    files = _files_to_take(source)
    # Validated before the slow part, calibration, starts.
    held: dict[str, Any] = {}
    if thresholds is not None:
        held = read_thresholds(thresholds, merging_layers(config), config.vision_config.num_hidden_layers)
    levels = with_options(settings_of(held), {"tokens": tokens, "fastv_ratio": fastv_ratio})
    default = _default_level(levels, level, held, thresholds)
    header = _header(source, assistant_header)
    others = {"fastv_layer": fastv_layer, "detail": held.get("detail"), "assistant_header": header}
    beside = {key: value for key, value in others.items() if value is not None}
    section = section_of(levels if images is None else _standing_in(levels, config), default) | beside
    parsed = parse_hybrid(section, config)
    if fastv_layer is not None and not parsed.prunes:
        raise ValueError(
            f"--fastv-layer {fastv_layer} has no effect without --fastv-ratio; give --fastv-ratio too"
        )
    if images is not None and tokens is not None:
        calibration = calibrate_checkpoint(
            source,
            images,
            tokens,
            progress=progress,
            skip_unreadable=skip_unreadable,
            fastv_ratio=fastv_ratio,
        )
        section = section_of(calibration.levels, default) | beside
        parsed = parse_hybrid(section, config)

    with complete_folder(target, force) as folder:
        _link_or_copy(source, files, folder)
        completed = read_config(source) | {"architectures": [ARCHITECTURE], "hybrid": section}
        (folder / "config.json").write_text(json.dumps(completed, indent=2) + "\n")
    return parsed


def _or_none(option: Any) -> Any:
    """An option's value, None where it is an empty object, which says nothing."""
    return None if option == {} else option


def _default_level(
    levels: Mapping[str, Setting],
    level: str | None,
    held: Mapping[str, Any],
    file: str | Path | None,
) -> str | None:
    """The name of the default level: the one given, the file's, the only one, or the first of the options.

    Args:
        levels: all settings.
        level: what was given.
        held: what the file holds, nothing where there is none.
        file: its name.

    """
    if level is not None and NAMELESS in levels:
        raise ValueError(
            f"level {level!r} was given, but no level has a name; give --thresholds with named levels, or "
            f"names as in --tokens {level}=195 and --fastv-ratio {level}=0.5"
        )
    if level is None and "default_level" in held:
        return held["default_level"]
    if level is not None or NAMELESS in levels:
        return level
    in_file, own = (
        [name for name in of if name not in (NAMELESS, FULL)] for of in (settings_of(held), levels)
    )
    if len(in_file) > 1:
        raise ValueError(
            f"{file} has several levels and says of none that it is the default one; choose with --level "
            f"from {', '.join(levels)}"
        )
    return (in_file or own or [FULL])[0]


def _standing_in(levels: Mapping[str, Setting], config: Any) -> dict[str, Setting]:
    """Settings with some thresholds in the place of numbers of tokens, to validate before there are any."""
    return _with_thresholds(levels, dict.fromkeys(levels, [0.0] * merging_layers(config)))


def _with_thresholds(levels: Mapping[str, Setting], found: Mapping[str, list[float]]) -> dict[str, Setting]:
    """Settings with thresholds in the place of numbers of tokens."""
    return {
        name: ({"thresholds": found[name]} if "tokens" in setting else {})
        | {key: value for key, value in setting.items() if key != "tokens"}
        for name, setting in levels.items()
    }


@dataclass
class Calibration:
    """What calibration found.

    Attributes:
        levels: settings by the name of their level, as in ``hybrid.levels``; under NAMELESS the only one
            where no level was named.
        tokens: the average of live tokens that each level with thresholds was made for, by its name.
        pictures: number of pictures they were found with.

    """

    levels: dict[str, Setting]
    tokens: dict[str, int]
    pictures: int


def calibrate_checkpoint(
    checkpoint: str | Path,
    images: str | Path,
    tokens: int | Mapping[str, int],
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    schedule: str = "constant",
    journal: str | Path | None = None,
    skip_unreadable: bool = False,
    fastv_ratio: float | Mapping[str, float] | None = None,
) -> Calibration:
    """Levels for a checkpoint, with thresholds for averages of live tokens of a folder's pictures.

    Runs on the GPU where there is one, in float32. All that can be wrong with the checkpoint, the levels and
    the pictures is found before the long part starts.

    Args:
        checkpoint: a LLaVA-1.5 checkpoint's folder.
        images: folder of pictures; see :func:`vllm_hybrid.tools.pictures.find_pictures`.
        tokens: average live tokens to reach: a number, or one by the name of each level. A number is every
            level's where fastv_ratio has names.
        batch_size: see :func:`vllm_hybrid.tools.calibrate.calibrate`; so are seed, progress, schedule.
        seed: see there.
        progress: see there.
        schedule: see there.
        journal: file that keeps what is found, so that a call that was cut off goes on, also with a few
            pictures more or less; removed at the end.
        skip_unreadable: leave out pictures that cannot be read.
        fastv_ratio: share of live tokens to drop, which is only written down: a ratio for all levels but the
            full one, or one by name. A level that is named only here gets no thresholds.

    Raises:
        ValueError: the checkpoint, the folder, a picture, a name or a number is wrong; one sentence says
            which.

    """
    import torch

    files = find_pictures(images)
    levels = with_options({}, {"tokens": _or_none(tokens), "fastv_ratio": _or_none(fastv_ratio)})
    wanted = {name: setting["tokens"] for name, setting in levels.items() if "tokens" in setting}
    if not wanted:
        raise ValueError("no level has a number of tokens to calibrate for; give one with --tokens")
    config = load_config(checkpoint)
    parse_levels(section_of(_standing_in(levels, config)), merging_layers(config))
    tower, image_processor = load_tower(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    layer = config.vision_feature_layer
    for number in wanted.values():
        check_wanted(tower, number, batch_size, layer, schedule)
    files = readable_pictures(files, image_processor, skip_unreadable, progress)
    weights = [_stamp(file) for file in weight_files(checkpoint)]
    processing = json.loads(image_processor.to_json_string())
    kept = Journal(journal, [__version__, weights, processing, layer])
    found = {
        number: calibrate(
            tower,
            image_processor,
            files,
            number,
            batch_size,
            seed,
            progress,
            layer,
            schedule,
            kept,
            folder=images,
        )
        for number in dict.fromkeys(wanted.values())
    }
    kept.remove()
    thresholds = {name: found[number] for name, number in wanted.items()}
    return Calibration(_with_thresholds(levels, thresholds), wanted, len(files))


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
