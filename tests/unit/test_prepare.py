"""Preparing checkpoints: links, configuration, thresholds from files and from pictures, and every refusal."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.support.quantised_checkpoints import KINDS, write_quantised
from tests.support.tiny_checkpoints import write_checkpoint
from vllm_hybrid.checkpoint.assistant_header import find_assistant_header
from vllm_hybrid.checkpoint.llava import load_config, load_tower, merging_layers
from vllm_hybrid.checkpoint.weights import expected_shapes, stored_tensors, weight_files
from vllm_hybrid.demo.model import EMBEDDED
from vllm_hybrid.demo.pictures import write_pictures
from vllm_hybrid.levels import Level
from vllm_hybrid.tools import prepare as preparing
from vllm_hybrid.tools.calibrate import live_counts
from vllm_hybrid.tools.level_options import NAMELESS
from vllm_hybrid.tools.prepare import calibrate_checkpoint, find_pictures, prepare
from vllm_hybrid.tools.progress import Notice
from vllm_hybrid.tools.thresholds import read_thresholds, write_thresholds

# The tiny tower has 4 layers, of which 3 run.
VALUES = [0.9, 0.8, 0.7]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LLaVA-1.5 checkpoint in two weight files, with transformers' newer weight names."""
    folder = tmp_path_factory.mktemp("plain") / "llava"
    write_checkpoint(folder, names="new", shards=2, architecture="LlavaForConditionalGeneration")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "download.lock").touch()
    (folder / "README.md").write_text("A checkpoint.")
    return folder


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose config.json is edited; weights are links."""
    shutil.copytree(source, target, copy_function=os.link)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def section(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["hybrid"]


# ---- what is written ------------------------------------------------------------------------------


def test_prepared_folder(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    before = sorted(f.name for f in plain.iterdir())
    hybrid = prepare(plain, out, fastv_layer=3, fastv_ratio=0.75)
    assert (hybrid.merges, hybrid.fastv_layer, hybrid.levels.default.fastv_ratio) == (False, 3, 0.75)
    assert sorted(f.name for f in out.iterdir()) == [name for name in before if not name.startswith(".")]
    assert sorted(f.name for f in plain.iterdir()) == before
    for file in plain.glob("*.safetensors"):
        assert (out / file.name).samefile(file)
    assert not (out / "tokenizer.json").samefile(plain / "tokenizer.json")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (plain, out))
    header = find_assistant_header(plain)
    expected = {"thresholds": None, "fastv_layer": 3, "fastv_ratio": 0.75, "assistant_header": header}
    assert section(out) == expected
    assert new.pop("architectures") == ["LlavaHybridForConditionalGeneration"]
    del new["hybrid"], old["architectures"]
    assert new == old


def test_prepared_folder_survives_moves(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    prepare(source, tmp_path / "a" / "out")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "out").rename(tmp_path / "b" / "moved")
    shutil.rmtree(source)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "b" / "moved", output_loading_info=True
    )
    assert not any(info.values()) and next(model.parameters()).dtype == torch.float32
    assert type(AutoProcessor.from_pretrained(tmp_path / "b" / "moved")).__name__ == "LlavaProcessor"


def test_other_file_systems_get_symbolic_links(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(preparing.os, "link", refuse)
    prepare(plain, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    for file in weight_files(tmp_path / "moved"):
        assert file.is_symlink() and file.readlink() == (plain / file.name).resolve()


def test_links_of_a_hub_cache_are_followed(plain: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, file in enumerate(f for f in plain.iterdir() if f.is_file()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / str(number))
    prepare(snapshot, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert not file.is_symlink()
    for file in weight_files(tmp_path / "out"):
        assert file.samefile(snapshot / file.name)


def test_force_replaces(plain: Path, tmp_path: Path) -> None:
    prepare(plain, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        prepare(plain, tmp_path / "out", fastv_ratio=0.5)
    prepare(plain, tmp_path / "out", fastv_ratio=0.5, force=True)
    assert section(tmp_path / "out")["fastv_ratio"] == 0.5
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_calibrating_while_preparing(plain: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    seen: list[tuple[str, int, int]] = []
    hybrid = prepare(
        plain,
        tmp_path / "out",
        images=tmp_path / "pictures",
        tokens=200,
        progress=lambda *report: seen.append(report),
    )
    assert len(hybrid.levels.default.thresholds or ()) == 3
    assert ("thresholds for 200 tokens", 8, 8) in seen
    counts = live_counts(*load_tower(plain), pictures, section(tmp_path / "out")["thresholds"])
    assert sum(counts) / len(counts) == pytest.approx(200, rel=0.03)
    assert (
        section(tmp_path / "out")["thresholds"]
        == calibrate_checkpoint(plain, tmp_path / "pictures", 200).levels[NAMELESS]["thresholds"]
    )


def test_calibrating_levels_while_preparing(plain: Path, tmp_path: Path) -> None:
    """Thresholds, ratios, both and, for the level that asks for nothing, neither."""
    write_pictures(tmp_path / "pictures")
    stages: list[str] = []
    hybrid = prepare(
        plain,
        tmp_path / "out",
        images=tmp_path / "pictures",
        tokens={"mid": 250, "low": 120, "same": 250},
        fastv_ratio={"low": 0.5, "pruned": 0.75, "same": 0},
        fastv_layer=3,
        progress=lambda stage, *_: stages.append(stage),
    )
    assert len(set(stage for stage in stages if stage.startswith("thresholds for"))) == 2
    assert stages.count("thresholds for 250 tokens") == 1
    written = section(tmp_path / "out")
    levels = written.pop("levels")
    header = find_assistant_header(plain)
    assert written == {"default_level": "mid", "fastv_layer": 3, "assistant_header": header}
    found = {
        name: calibrate_checkpoint(plain, tmp_path / "pictures", n).levels[NAMELESS]["thresholds"]
        for name, n in {"mid": 250, "low": 120}.items()
    }
    assert levels == {
        "mid": {"thresholds": found["mid"]},
        "low": {"thresholds": found["low"], "fastv_ratio": 0.5},
        "same": {"thresholds": found["mid"], "fastv_ratio": 0},
        "pruned": {"fastv_ratio": 0.75},
    }
    assert hybrid.levels.default.name == "mid"
    assert hybrid.levels.named("pruned") == Level("pruned", None, 0.75)
    assert hybrid.levels.names == ("mid", "low", "same", "pruned", "full")


def test_a_number_without_a_name_is_every_levels(plain: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    calibration = calibrate_checkpoint(
        plain, tmp_path / "pictures", 250, fastv_ratio={"a": 0.25, "b": 0.5, "full": 0}
    )
    thresholds = calibration.levels["a"]["thresholds"]
    assert calibration.levels == {
        "a": {"thresholds": thresholds, "fastv_ratio": 0.25},
        "b": {"thresholds": thresholds, "fastv_ratio": 0.5},
        "full": {"fastv_ratio": 0},
    }
    assert calibration.tokens == {"a": 250, "b": 250}
    prepare(plain, tmp_path / "out", fastv_ratio={"a": 0.25, "b": 0.5}, level="full")
    assert section(tmp_path / "out")["levels"] == {"a": {"fastv_ratio": 0.25}, "b": {"fastv_ratio": 0.5}}
    assert section(tmp_path / "out")["default_level"] == "full"


# ---- threshold files ------------------------------------------------------------------------------


def saved(value: Any, file: Path) -> Path:
    if file.suffix == ".json":
        file.write_text(value if isinstance(value, str) else json.dumps(value))
    else:
        torch.save(value, file)
    return file


LEVELS = {"low": VALUES, "high": [0.95, None, 0.9]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (VALUES, {"thresholds": VALUES}),
        (LEVELS, {"thresholds": LEVELS}),
        ({"thresholds": VALUES, "tokens": 90}, {"thresholds": VALUES}),
        (
            {"thresholds": LEVELS, "default_level": "high"},
            {"thresholds": LEVELS, "default_level": "high"},
        ),
        (
            {"levels": {"low": {"fastv_ratio": 0.5}}, "default_level": "low", "tokens": {}, "pictures": 7},
            {"levels": {"low": {"fastv_ratio": 0.5}}, "default_level": "low"},
        ),
        (
            {"thresholds": VALUES, "fastv_ratio": 0.5, "detail": {"low": "full"}, "pictures": 7},
            {"thresholds": VALUES, "fastv_ratio": 0.5, "detail": {"low": "full"}},
        ),
    ],
)
def test_json(content: Any, expected: Any, tmp_path: Path) -> None:
    assert read_thresholds(saved(content, tmp_path / "t.json"), 3, 4) == expected


def dymu_state(values: list[float], blocks: str) -> dict[str, Any]:
    """An encoder's state as DyMU saves it, its layers in the order of their names."""
    state: dict[str, Any] = {"module.logit_scale": torch.tensor(4.6), "module.text.weight": torch.ones(2, 2)}
    for name, value in sorted((f"{blocks}.{i}.threshold", v) for i, v in enumerate(values)):
        state[name] = torch.tensor(value, dtype=torch.bfloat16)
        state[name.replace("threshold", "ln_1.weight")] = torch.ones(3)
    return {"name": "ViT-L-14-336-tome-72out", "state_dict": state}


@pytest.mark.parametrize("blocks", ["module.visual.transformer.resblocks", "visual.trunk.blocks"])
def test_dymu_checkpoint(blocks: str, tmp_path: Path) -> None:
    values = [0.5 + 0.015625 * i for i in range(24)]
    file = saved(dymu_state(values, blocks), tmp_path / "ViT-L-14-336-tome-72out.pth")
    # One for each of 24 layers; LLaVA-1.5 runs 23 of them.
    assert read_thresholds(file, 23, 24) == {"thresholds": values[:23]}


@pytest.mark.parametrize(
    "content",
    [
        torch.tensor(VALUES, dtype=torch.float64),
        VALUES,
        [*VALUES, 1.0],
        [torch.tensor(v, dtype=torch.float64) for v in VALUES],
        {"thresholds": VALUES},
        {str(i): v for i, v in enumerate(VALUES)},
        {2: 0.7, 0: 0.9, 1: 0.8},
        {"state_dict": {f"{i}.threshold": v for i, v in enumerate(VALUES)}},
    ],
)
def test_torch_files(content: Any, tmp_path: Path) -> None:
    assert read_thresholds(saved(content, tmp_path / "t.pt"), 3, 4) == {"thresholds": VALUES}


def test_thresholds_reach_the_configuration(plain: Path, tmp_path: Path) -> None:
    file = saved(dymu_state([0.75, 0.5, 0.25, 1.0], "visual.transformer.resblocks"), tmp_path / "t.pth")
    assert prepare(plain, tmp_path / "a", thresholds=file).levels.default.thresholds == (0.75, 0.5, 0.25)
    header = {"assistant_header": find_assistant_header(plain)}
    assert section(tmp_path / "a") == {"thresholds": [0.75, 0.5, 0.25]} | header
    levels = saved(LEVELS, tmp_path / "levels.json")
    hybrid = prepare(plain, tmp_path / "b", thresholds=levels, level="high", fastv_ratio=0.5)
    assert hybrid.levels.default == Level("high", (0.95, None, 0.9), 0.5)
    whole = {name: {"thresholds": values, "fastv_ratio": 0.5} for name, values in LEVELS.items()}
    assert section(tmp_path / "b") == {"levels": whole, "default_level": "high"} | header


SETTINGS: dict[str, Any] = {
    "low": {"thresholds": VALUES, "fastv_ratio": 0.5},
    "high": {"thresholds": [0.95, None, 0.9]},
    "full": {},
}


@pytest.mark.parametrize(
    ("content", "options", "levels", "default"),
    [
        ({"levels": SETTINGS, "default_level": "high"}, {}, SETTINGS, "high"),
        ({"levels": SETTINGS, "default_level": "high"}, {"level": "low"}, SETTINGS, "low"),
        ({"levels": SETTINGS}, {"level": "full"}, SETTINGS, "full"),
        # The only level is the default one.
        ({"levels": {"full": {}, "low": SETTINGS["low"]}}, {}, {"full": {}, "low": SETTINGS["low"]}, "low"),
        ({"levels": {"full": {}}}, {}, {"full": {}}, "full"),
        # What an option says goes before the file, and never for the full level.
        (
            {"levels": SETTINGS, "default_level": "high"},
            {"fastv_ratio": 0.25},
            {
                "low": {"thresholds": VALUES, "fastv_ratio": 0.25},
                "high": {"thresholds": [0.95, None, 0.9], "fastv_ratio": 0.25},
                "full": {},
            },
            "high",
        ),
        (
            {"levels": SETTINGS, "default_level": "high"},
            {"fastv_ratio": {"high": 0.75, "pruned": 0.9}},
            {
                "low": SETTINGS["low"],
                "high": {"thresholds": [0.95, None, 0.9], "fastv_ratio": 0.75},
                "full": {},
                "pruned": {"fastv_ratio": 0.9},
            },
            "high",
        ),
        # What has no name is every level's.
        (
            VALUES,
            {"fastv_ratio": {"low": 0.5, "high": 0.25}},
            {
                "low": {"thresholds": VALUES, "fastv_ratio": 0.5},
                "high": {"thresholds": VALUES, "fastv_ratio": 0.25},
            },
            "low",
        ),
        (
            {"thresholds": LEVELS, "fastv_ratio": 0.25, "default_level": "low"},
            {"fastv_ratio": {"low": 0}},
            {
                "low": {"fastv_ratio": 0, "thresholds": VALUES},
                "high": {"fastv_ratio": 0.25, "thresholds": [0.95, None, 0.9]},
            },
            "low",
        ),
    ],
)
def test_levels_reach_the_configuration(
    plain: Path, content: Any, options: dict[str, Any], levels: Any, default: str, tmp_path: Path
) -> None:
    hybrid = prepare(plain, tmp_path / "out", thresholds=saved(content, tmp_path / "t.json"), **options)
    expected = {"levels": levels, "default_level": default}
    assert section(tmp_path / "out") == expected | {"assistant_header": find_assistant_header(plain)}
    assert hybrid.levels.default.name == default


def test_what_details_mean_reaches_the_configuration(plain: Path, tmp_path: Path) -> None:
    file = saved(
        {"levels": SETTINGS, "default_level": "high", "detail": {"tiny": "low"}}, tmp_path / "t.json"
    )
    hybrid = prepare(plain, tmp_path / "out", thresholds=file)
    assert section(tmp_path / "out")["detail"] == {"tiny": "low"}
    assert hybrid.levels.of_detail("tiny").name == "low"


def test_written_thresholds_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    write_thresholds(file, {NAMELESS: {"thresholds": VALUES}}, {NAMELESS: 90}, pictures=7)
    assert json.loads(file.read_text()) == {"thresholds": VALUES, "tokens": 90, "pictures": 7}
    assert read_thresholds(file, 3, 4) == {"thresholds": VALUES}
    setting = {"thresholds": VALUES, "fastv_ratio": 0.5}
    write_thresholds(file, {NAMELESS: setting}, {NAMELESS: 90}, pictures=7)
    assert json.loads(file.read_text()) == setting | {"tokens": 90, "pictures": 7}
    assert read_thresholds(file, 3, 4) == setting
    write_thresholds(file, {"a": setting, "b": {"fastv_ratio": 0.9}}, {"a": 90}, pictures=7)
    levels = {"levels": {"a": setting, "b": {"fastv_ratio": 0.9}}, "default_level": "a"}
    assert json.loads(file.read_text()) == levels | {"tokens": {"a": 90}, "pictures": 7}
    assert read_thresholds(file, 3, 4) == levels


class Evil:
    """Would create a file if a checkpoint were unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    file = saved(Evil(tmp_path / "mark"), tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of plain tensors"):
        read_thresholds(file, 3, 4)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "[0.9", "is not JSON"),
        ("t.json", {"tokens": 3}, "holds no thresholds"),
        ("t.json", {"level": [0.1]}, "holds no thresholds"),
        ("t.json", {}, "holds no thresholds"),
        ("t.json", 0.9, "holds no thresholds"),
        ("t.json", {"levels": {}}, "has no level"),
        ("t.json", {"thresholds": {}}, "has no level"),
        ("t.json", {"levels": [{}]}, "has levels that are no objects"),
        ("t.json", {"levels": {"low": VALUES}}, "has levels that are no objects"),
        ("t.json", {"levels": {"low": {}}, "thresholds": VALUES}, "has both thresholds and levels"),
        ("t.pth", {"weight": torch.ones(3)}, "holds no thresholds"),
        ("t.pth", torch.ones(3, 3), "holds no list of thresholds"),
        ("t.pth", [], "holds no list of thresholds"),
        ("t.pth", "0.9", "holds no list of thresholds"),
        ("t.pth", [0.9, "high"], "no number \\(str\\)"),
        ("t.pth", [0.9, torch.ones(2)], "no number \\(Tensor\\)"),
        ("t.pth", [1.0, 1.0, 1.0], "DyMU's starting value"),
        ("t.pth", {0: 0.9, 2: 0.8}, "no threshold for layer 1"),
        ("t.pth", {"a.0.threshold": 0.9, "b.0.threshold": 0.8}, "of several towers \\(a, b\\)"),
    ],
)
def test_refused_threshold_files(name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_thresholds(saved(content, tmp_path / name), 3, 4)
    assert str(tmp_path / name) in str(refusal.value) and "\n" not in str(refusal.value)


def test_refused_torch_garbage(tmp_path: Path) -> None:
    (tmp_path / "t.pth").write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_thresholds(tmp_path / "t.pth", 3, 4)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_torch_files_are_refused_or_read(zipped: bool, tmp_path: Path, draw: random.Random) -> None:
    """Whatever torch's reader makes of damaged bytes, it is one sentence, or thresholds."""
    file = tmp_path / "t.pth"
    torch.save(
        dymu_state([0.5, 0.25, 0.75], "visual.trunk.blocks"), file, _use_new_zipfile_serialization=zipped
    )
    whole = file.read_bytes()
    for _ in range(400):
        data = bytearray(whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        file.write_bytes(data)
        try:
            read_thresholds(file, 3, 4)
        except ValueError as refusal:
            assert str(file) in str(refusal) and "\n" not in str(refusal)


def test_threshold_files_that_were_not_fetched(tmp_path: Path) -> None:
    for name in ("t.pth", "t.json"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(ValueError, match=f"{name} is a git-LFS pointer"):
            read_thresholds(tmp_path / name, 3, 4)


# ---- refused arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fastv_ratio": 1.0}, "hybrid.fastv_ratio is 1.0"),
        ({"fastv_ratio": 0.5, "fastv_layer": 8}, "hybrid.fastv_layer is 8, but the decoder has 8 layers"),
        ({"fastv_layer": 2}, "has no effect without --fastv-ratio"),
        ({"tokens": 90}, "give --images and --tokens"),
        ({"images": "pictures"}, "give --images and --tokens"),
        ({"images": "nowhere", "tokens": 90}, "nowhere is no folder"),
        ({"images": ".", "tokens": 90}, "holds no pictures"),
        ({"images": "pictures", "tokens": 576}, "576 live tokens cannot be had"),
        ({"images": "pictures", "tokens": {}}, "give --images and --tokens"),
        ({"images": "pictures", "tokens": {"mid": 90, "low": 576}}, "576 live tokens cannot be had"),
        ({"images": "pictures", "tokens": 90, "thresholds": "t.json"}, "give one of them"),
        ({"images": "pictures", "tokens": {"auto": 90}}, "has a level auto, but that detail means"),
        ({"images": "pictures", "tokens": {"a b": 90}}, "has a level 'a b'; name levels with letters"),
        ({"images": "pictures", "tokens": {"full": 90}}, "full is the level at which none are"),
        ({"images": "pictures", "tokens": 90, "fastv_ratio": {"full": 0}}, "no level but full"),
        ({"fastv_ratio": {"low": 0.5, "high": 1.5}}, "hybrid.levels.high.fastv_ratio is 1.5"),
        ({"fastv_ratio": {"low": math.nan}}, "hybrid.levels.low.fastv_ratio is nan"),
        ({"fastv_ratio": {"low": 0}, "fastv_layer": 2}, "has no effect without --fastv-ratio"),
        ({"level": "low"}, "level 'low' was given, but no level has a name; give --thresholds with"),
        ({"level": "low", "fastv_ratio": 0.5}, "but no level has a name"),
        (
            {"level": "high", "fastv_ratio": {"low": 0.5}},
            "default_level is 'high', which is no level; use low",
        ),
        ({"thresholds": "nowhere.json"}, "nowhere.json is no file"),
        ({"thresholds": "long.json"}, "has 5 entries, but the vision tower executes 3 layers"),
        (
            {"thresholds": "levels.json"},
            "levels.json has several levels .*; choose with --level from low, high",
        ),
        ({"thresholds": "levels.json", "fastv_ratio": {"new": 0.5}}, "--level from low, high, new"),
        ({"thresholds": "odd.json"}, "hybrid.levels.low.tokens is not a known key"),
        ({"thresholds": "levels.json", "level": "huge"}, "'huge', which is no level"),
    ],
)
def test_refused_arguments(
    plain: Path, arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    write_pictures(tmp_path / "pictures")
    saved(VALUES, tmp_path / "t.json")
    saved([*VALUES, 0.9, 0.9], tmp_path / "long.json")
    saved(LEVELS, tmp_path / "levels.json")
    saved({"levels": {"low": {"tokens": 90}}}, tmp_path / "odd.json")
    monkeypatch.setattr(preparing, "calibrate", lambda *_, **__: pytest.fail("the long part starts"))
    for key in ("thresholds", "images"):
        if arguments.get(key) not in (None, "."):
            arguments = arguments | {key: tmp_path / arguments[key]}
    with pytest.raises(ValueError, match=message) as refusal:
        prepare(plain, tmp_path / "out", **arguments)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["llava", "llava/out", "."])
def test_places_that_overlap(plain: Path, place: str) -> None:
    with pytest.raises(ValueError, match=r"lies in .* or holds it|exists and is not empty"):
        prepare(plain, plain.parent / place)
    if place == "llava":
        with pytest.raises(ValueError, match=r"lies in .* or holds it"):
            prepare(plain, plain, force=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "llava_llama"}, "LLaVA's own format; give the checkpoint in the format of llava-hf"),
        ({"model_type": "llava_next"}, "model_type 'llava_next', but only 'llava'"),
        ({"vision_feature_select_strategy": "full"}, "is 'full', but only 'default'"),
        ({"vision_feature_layer": [-2, -5]}, "only one layer can be read"),
        ({"vision_feature_layer": -9}, "vision_feature_layer is -9, but the vision tower has 4 layers"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type is 'mistral'"),
        (
            {"text_config": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type is 'linear'",
        ),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type is 'siglip"),
    ],
)
def test_refused_checkpoints(plain: Path, edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = edited(plain, tmp_path / "source", lambda config: config.update(edit))
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def published_shapes() -> dict[str, list[int]]:
    """The weights of llava-1.5-7b-hf as published, and two buffers that older releases saved."""
    language, tower = "language_model.model", "vision_tower.vision_model"
    shapes = {
        f"{language}.embed_tokens.weight": [32064, 4096],
        "language_model.lm_head.weight": [32064, 4096],
        f"{language}.norm.weight": [4096],
        f"{language}.layers.0.self_attn.rotary_emb.inv_freq": [64],
        "multi_modal_projector.linear_1.weight": [4096, 1024],
        "multi_modal_projector.linear_1.bias": [4096],
        "multi_modal_projector.linear_2.weight": [4096, 4096],
        "multi_modal_projector.linear_2.bias": [4096],
        f"{tower}.embeddings.class_embedding": [1024],
        f"{tower}.embeddings.patch_embedding.weight": [1024, 3, 14, 14],
        f"{tower}.embeddings.position_embedding.weight": [577, 1024],
        f"{tower}.embeddings.position_ids": [1, 577],
    }
    for layer in range(32):
        name = f"{language}.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": [4096, 4096] for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": [11008, 4096] for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = [4096, 11008]
        shapes |= {f"{name}.{part}_layernorm.weight": [4096] for part in ("input", "post_attention")}
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    for layer in range(24):
        name = f"{tower}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {
                f"{name}.self_attn.{part}.weight": [1024, 1024],
                f"{name}.self_attn.{part}.bias": [1024],
            }
        shapes |= {f"{name}.mlp.fc1.weight": [4096, 1024], f"{name}.mlp.fc1.bias": [4096]}
        shapes |= {f"{name}.mlp.fc2.weight": [1024, 4096], f"{name}.mlp.fc2.bias": [1024]}
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
    for name in norms:
        shapes |= {f"{name}.weight": [1024], f"{name}.bias": [1024]}
    return shapes


def write_hollow(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float16 tensors that is all hole but for its header, and takes no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def test_defaults_that_a_published_configuration_leaves_out(plain: Path, tmp_path: Path) -> None:
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    shutil.copytree(plain, tmp_path / "llava", ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    write_hollow(tmp_path / "llava" / "model.safetensors", published_shapes())
    file = saved(dymu_state([0.75] * 24, "module.visual.transformer.resblocks"), tmp_path / "t.pth")
    hybrid = prepare(tmp_path / "llava", tmp_path / "out", thresholds=file, fastv_layer=31, fastv_ratio=0.5)
    assert hybrid.levels.default.thresholds == (0.75,) * 23 and hybrid.fastv_layer == 31
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == config["text_config"]


# ---- broken files ---------------------------------------------------------------------------------


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 13\n"
# As LLaVA's own checkpoints have it; transformers fills the missing keys with those of the 7B model.
OWN_FORMAT = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_size": 4096,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}


def put(name: str, content: Any) -> Callable[[Path], Any]:
    """Puts something else in the place of a file: bytes, or JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, keep: int) -> Callable[[Path], Any]:
    """Keeps the beginning of a file, or all but the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Edits a JSON file."""

    def changed(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return changed


def lose(*names: str) -> Callable[[Path], Any]:
    def lost(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return lost


def dangle(name: str) -> Callable[[Path], Any]:
    def dangling(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/nowhere/blob")

    return dangling


# What is wrong, the words that say so, and whether calibration reads that file.
BROKEN: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "own format": (put("config.json", OWN_FORMAT), r"LlavaLlamaForCausalLM.* LLaVA's own format", True),
    "own format in disguise": (
        put("config.json", OWN_FORMAT | {"architectures": ["LlavaHybridForConditionalGeneration"]}),
        "LLaVA's own format",
        True,
    ),
    "other architecture": (
        change("config.json", lambda c: c.update(architectures=["LlavaNextForConditionalGeneration"])),
        r"architectures \['LlavaNextForConditionalGeneration'\], but only",
        True,
    ),
    "architectures no list": (
        change("config.json", lambda c: c.update(architectures=7)),
        "architectures 7",
        True,
    ),
    "other model": (
        change("config.json", lambda c: c.update(model_type="qwen2_vl")),
        "'qwen2_vl', but only",
        True,
    ),
    "no model type": (
        change("config.json", lambda c: c.pop("model_type")),
        "model_type None, but only",
        True,
    ),
    "no tower": (
        change("config.json", lambda c: c.pop("vision_config")),
        "has no object vision_config",
        True,
    ),
    "no decoder": (change("config.json", lambda c: c.pop("text_config")), "has no object text_config", True),
    "decoder no object": (
        change("config.json", lambda c: c.update(text_config="x")),
        "no object text_conf",
        True,
    ),
    "layers no number": (
        change("config.json", lambda c: c["text_config"].update(num_hidden_layers="x")),
        "config.json cannot be read as LLaVA's .*num_hidden_layers",
        True,
    ),
    "no patches": (
        change("config.json", lambda c: c["vision_config"].update(patch_size=0)),
        "patch_size is 0",
        True,
    ),
    "heads do not divide": (
        change("config.json", lambda c: c["vision_config"].update(num_attention_heads=7)),
        r"config\.json cannot be read as LLaVA's .*attention heads",
        True,
    ),
    "config list": (put("config.json", []), "config.json holds no JSON object", True),
    "config pointer": (put("config.json", POINTER), "config.json is a git-LFS pointer", True),
    "config not UTF-8": (put("config.json", b"\xff\xfe{}"), "config.json is not JSON", True),
    "config nested": (put("config.json", b"[" * 200000), "config.json is not JSON", True),
    "weights pointer": (put(FIRST, POINTER), f"{FIRST} is a git-LFS pointer.* git lfs pull", True),
    "weights cut": (cut(FIRST, -1), f"{FIRST} is cut off or damaged", True),
    "other weights cut": (cut(SECOND, -1000), f"{SECOND} is cut off or damaged", True),
    "header cut": (cut(FIRST, 100), f"{FIRST} is cut off or damaged", True),
    "weights empty": (cut(FIRST, 0), f"{FIRST} is empty", True),
    "weights a web page": (put(FIRST, b"<!DOCTYPE html>" * 100), f"{FIRST} is cut off or damaged", True),
    "weights missing": (lose(FIRST), f"{FIRST} is missing", True),
    "weights dangling": (dangle(FIRST), f"{FIRST} is a link to /nowhere/blob, which is not there", True),
    "no weights": (lose(FIRST, SECOND, INDEX), "has no safetensors weights", True),
    "shard missing without index": (lose(FIRST, INDEX), "lacks the weight", False),
    "no weight map": (change(INDEX, lambda c: c.pop("weight_map")), f"{INDEX} has no weight_map", True),
    "weight map list": (put(INDEX, {"weight_map": [FIRST]}), f"{INDEX} has no weight_map", True),
    "index no JSON": (put(INDEX, b"{"), f"{INDEX} is not JSON", True),
    "index list": (put(INDEX, [FIRST]), f"{INDEX} holds no JSON object", True),
    "index pointer": (put(INDEX, POINTER), f"{INDEX} is a git-LFS pointer", True),
    "index dangling": (dangle(INDEX), f"{INDEX} is a link to", True),
    "index of a number": (
        change(INDEX, lambda c: c["weight_map"].update(x=3)),
        "has 3 as the file of x",
        True,
    ),
    "index of elsewhere": (
        change(INDEX, lambda c: c["weight_map"].update(x="../x.safetensors")),
        r"has '../x.safetensors' as the file of x",
        True,
    ),
    "index promises": (
        change(INDEX, lambda c: c["weight_map"].update(x=FIRST)),
        f"{FIRST} lacks x, which",
        True,
    ),
    "tower of other width": (
        change("config.json", lambda c: c["vision_config"].update(hidden_size=128)),
        r"class_embedding in .*safetensors has shape \[64\], but config.json asks for \[128\]",
        True,
    ),
    "tower of fewer layers": (
        change("config.json", lambda c: c["vision_config"].update(num_hidden_layers=3)),
        r"has a vision tower weight .*layers\.3\..*, which config.json does not ask for",
        True,
    ),
    "tower of more layers": (
        change("config.json", lambda c: c["vision_config"].update(num_hidden_layers=6)),
        r"lacks the weight model\.vision_tower\.encoder\.layers\.4\.",
        True,
    ),
    "decoder of more layers": (
        change("config.json", lambda c: c["text_config"].update(num_hidden_layers=9)),
        r"lacks the weight model\.language_model\.layers\.8\.",
        False,
    ),
    "decoder of other heads": (
        change("config.json", lambda c: c["text_config"].update(num_key_value_heads=4)),
        r"k_proj.weight in .* has shape \[128, 128\], but config.json asks for \[256, 128\]",
        False,
    ),
    "no such activation": (
        change("config.json", lambda c: c["vision_config"].update(hidden_act="softplusplus")),
        r"describes no model that can be built \(.*softplusplus",
        True,
    ),
    "other vocabulary": (
        change("config.json", lambda c: c["text_config"].update(vocab_size=9)),
        r"embed_tokens.weight in .* asks for \[9, 128\]",
        False,
    ),
    "preprocessor missing": (lose("preprocessor_config.json"), "has no preprocessor_config.json", True),
    "preprocessor pointer": (put("preprocessor_config.json", POINTER), "is a git-LFS pointer", True),
    "preprocessor cut": (cut("preprocessor_config.json", -9), "preprocessor_config.json is not JSON", True),
    "preprocessor list": (put("preprocessor_config.json", []), "holds no JSON object", True),
    "processor cut": (cut("processor_config.json", 9), "processor_config.json is not JSON", False),
    "generation pointer": (put("generation_config.json", POINTER), "is a git-LFS pointer", False),
    "tokenizer missing": (lose("tokenizer.json"), "has no tokenizer", False),
    "tokenizer cut": (cut("tokenizer.json", -50), "tokenizer.json cannot be read as a tokenizer", False),
    "tokenizer of nothing": (
        put("tokenizer.json", {}),
        "tokenizer.json cannot be read as a tokenizer",
        False,
    ),
    "tokenizer pointer": (put("tokenizer.json", POINTER), "tokenizer.json is a git-LFS pointer", False),
    "tokenizer dangling": (dangle("tokenizer.json"), "tokenizer.json is a link to", False),
    "tokenizer settings cut": (cut("tokenizer_config.json", 20), "tokenizer_config.json is not JSON", False),
    "template pointer": (
        put("chat_template.jinja", POINTER),
        "chat_template.jinja is a git-LFS pointer",
        False,
    ),
    "quantisation pointer": (
        put("hf_quant_config.json", POINTER),
        "hf_quant_config.json is a git-LFS",
        False,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(plain: Path, case: str, tmp_path: Path) -> None:
    """One sentence each, with nothing written, from whatever reads the file."""
    damage, message, calibrates = BROKEN[case]
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    damage(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as refusal:
        prepare(source, tmp_path / "out")
    assert "\n" not in str(refusal.value) and "; " in str(refusal.value)
    if calibrates:
        with pytest.raises(ValueError, match=message):
            load_tower(source)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", ["decoder of more layers", "decoder of other heads", "other vocabulary"])
def test_calibration_reads_the_tower_alone(plain: Path, case: str, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "source")
    BROKEN[case][0](tmp_path / "source")
    load_tower(tmp_path / "source")


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_either_tokenizer_will_do(plain: Path, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    if kind == "tokenizer.model":
        (source / "tokenizer.json").unlink()
        shutil.copy(EMBEDDED / kind, source)
        whole = (source / kind).read_bytes()
        (source / kind).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read as a tokenizer"):
            prepare(source, tmp_path / "out")
        (source / kind).write_bytes(whole)
    prepare(source, tmp_path / "out")


def test_shards_need_no_index(plain: Path, tmp_path: Path) -> None:
    """vLLM loads all safetensors files there are, but not hidden ones."""
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    (source / INDEX).unlink()
    (source / "._model.safetensors").write_bytes(b"left behind")
    assert [file.name for file in weight_files(source)] == [FIRST, SECOND]
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_tower(source)[0].parameters(), load_tower(plain)[0].parameters(), strict=True)
    )


@pytest.mark.parametrize("suffix", [".model", ".json"])
def test_only_the_tokenizer_that_is_used_need_be_whole(plain: Path, suffix: str, tmp_path: Path) -> None:
    """Those who download without the old tokenizer have a pointer in its place."""
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    damage = {".model": put("tokenizer.model", POINTER), ".json": put("tokenizer.json", POINTER)}[suffix]
    if suffix == ".json":
        shutil.copy(EMBEDDED / "tokenizer.model", source)
    damage(source)
    if suffix == ".json":
        with pytest.raises(ValueError, match=r"tokenizer\.json is a git-LFS pointer"):
            prepare(source, tmp_path / "out")
        return
    prepare(source, tmp_path / "out")
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer("a").input_ids


def test_what_no_server_needs_is_left_out(plain: Path, tmp_path: Path) -> None:
    """It is known before calibration, which takes hours."""
    source, pictures = tmp_path / "source", tmp_path / "pictures"
    shutil.copytree(plain, source)
    dangle("README.md")(source)
    (source / "images").mkdir()
    (source / "images" / "logo.png").symlink_to("/nowhere/blob")
    (source / "whole").symlink_to(source)
    (source / "pytorch_model.bin").symlink_to("/nowhere/blob")
    write_pictures(pictures)
    told_before: list[int] = []
    with pytest.warns(Notice) as told:
        prepare(
            source,
            tmp_path / "out",
            images=pictures,
            tokens=300,
            progress=lambda *_: told_before.append(len(told)),
        )
    assert set(told_before) == {1}
    assert str(told[0].message) == (
        "left out what cannot be read and no server needs: "
        f"{source / 'README.md'}, {source / 'images' / 'logo.png'}, {source / 'pytorch_model.bin'}"
    )
    expected = {file.name for file in plain.iterdir() if not file.name.startswith(".")} - {"README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == expected


def test_files_that_cannot_be_opened_are_left_out(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    opened = Path.open

    def refuse(file: Path, *arguments: Any, **named: Any) -> Any:
        if file.name == "README.md":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(Notice, match=r"left out .*README\.md$"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "config.json").exists()


AWQ = {"quant_method": "awq"}
QUANTISED: dict[str, Callable[[Path], Any]] = {
    "quantization_config": change("config.json", lambda c: c.update(quantization_config=AWQ)),
    "of the decoder": change("config.json", lambda c: c["text_config"].update(quantization_config=AWQ)),
    "compression_config": change("config.json", lambda c: c.update(compression_config=AWQ)),
    "hf_quant_config.json": put("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
    "quant_config.json": put("quant_config.json", {"w_bit": 4}),
    "quantize_config.json": put("quantize_config.json", {"bits": 4}),
}


@pytest.fixture(scope="module")
def shapes(plain: Path) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in stored_tensors(plain).items()}


def hollow(plain: Path, target: Path, shapes: dict[str, list[int]]) -> Path:
    """A copy of a checkpoint with other tensors, which have no values."""
    shutil.copytree(plain, target)
    for name in (FIRST, SECOND, INDEX):
        (target / name).unlink()
    write_hollow(target / "model.safetensors", shapes)
    return target


def packed(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """As quantisation renames the decoder's tensors."""
    return {
        name.replace(".weight", ".qweight") if "layers" in name and "tower" not in name else name: shape
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("place", QUANTISED)
def test_a_quantised_decoder_is_not_compared(
    plain: Path, shapes: dict[str, list[int]], place: str, tmp_path: Path
) -> None:
    """Its tensors have other names and shapes; the tower's do not, and are read for calibration."""
    source = hollow(plain, tmp_path / "source", packed(shapes))
    with pytest.raises(ValueError, match=r"lacks the weight model\.language_model"):
        prepare(source, tmp_path / "out")
    QUANTISED[place](source)
    prepare(source, tmp_path / "out")
    load_tower(source)


def test_thresholds_of_a_quantised_checkpoint_are_the_plain_ones(tmp_path: Path) -> None:
    """Its tower is plain; the weights are linked as they are, and the configuration says what they are."""
    source = write_checkpoint(tmp_path / "plain", names="new", architecture="LlavaForConditionalGeneration")
    write_pictures(tmp_path / "pictures", 2)
    made = {"plain": source}
    for kind in ("W8A8", "GPTQ"):
        made[kind] = write_quantised(source, tmp_path / kind, KINDS[kind], torch.float32)
    for kind, checkpoint in made.items():
        out = tmp_path / f"{kind}-out"
        prepare(checkpoint, out, images=tmp_path / "pictures", tokens=200)
        assert section(out) == section(tmp_path / "plain-out")
        before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoint, out))
        assert before.get("quantization_config") == after.get("quantization_config")
        assert (out / "model.safetensors").samefile(checkpoint / "model.safetensors")


def test_a_quantised_decoder_excuses_no_tower(
    plain: Path, shapes: dict[str, list[int]], tmp_path: Path
) -> None:
    less = {n: s for n, s in packed(shapes).items() if n != "model.vision_tower.post_layernorm.bias"}
    source = hollow(plain, tmp_path / "source", less)
    QUANTISED["quantization_config"](source)
    with pytest.raises(ValueError, match=r"lacks the weight model\.vision_tower\.post_layernorm\.bias"):
        load_tower(source)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_a_quantised_tower_is_called_so(plain: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    QUANTISED["compression_config"](source)
    file = stored_tensors(source)["model.vision_tower.encoder.layers.1.mlp.fc1.weight"].file
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("encoder.layers.1.mlp.fc1.weight") and "vis" in name)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"is quantised \(.*fc1\.weight.*the unquantised checkpoint"):
        load_tower(source)


def name_attention(config: dict[str, Any]) -> None:
    for part in (config, config["vision_config"], config["text_config"]):
        part["_attn_implementation"] = "flash_attention_2"


def test_an_attention_that_is_not_installed(plain: Path, tmp_path: Path) -> None:
    """Neither checks nor calibration run what the checkpoint was trained with."""
    source = edited(plain, tmp_path / "source", name_attention)
    prepare(source, tmp_path / "out")
    tower, reference = load_tower(source)[0], load_tower(plain)[0]
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), reference.parameters(), strict=True))


def test_weights_that_the_feature_layer_does_not_need(
    plain: Path, shapes: dict[str, list[int]], tmp_path: Path
) -> None:
    """Of four layers three run for vision_feature_layer -2, and nothing behind them."""
    beyond = ("model.vision_tower.encoder.layers.3.", "model.vision_tower.post_layernorm.")
    served = {name: shape for name, shape in shapes.items() if not name.startswith(beyond)}
    assert len(served) == len(shapes) - 18
    prepare(hollow(plain, tmp_path / "absent", served), tmp_path / "out")
    other = {name: [*shape, 1] if name.startswith(beyond) else shape for name, shape in shapes.items()}
    prepare(hollow(plain, tmp_path / "other", other), tmp_path / "out of other shapes")
    needed = served.pop("model.vision_tower.encoder.layers.2.mlp.fc2.bias")
    with pytest.raises(ValueError, match=r"lacks the weight .*layers\.2\.mlp\.fc2\.bias"):
        prepare(hollow(plain, tmp_path / "less", served), tmp_path / "out of less")
    served["model.vision_tower.encoder.layers.2.mlp.fc2.bias"] = needed
    # The last layer's output needs the last layer.
    last = hollow(plain, tmp_path / "last", served)
    change("config.json", lambda c: c.update(vision_feature_layer=-1))(last)
    with pytest.raises(ValueError, match=r"lacks the weight .*layers\.3\."):
        prepare(last, tmp_path / "out of last")


def test_tied_weights_have_no_head_of_their_own(plain: Path, tmp_path: Path) -> None:
    source = edited(plain, tmp_path / "source", lambda c: c.update(tie_word_embeddings=True))
    assert "lm_head.weight" not in expected_shapes(load_config(source))
    assert "lm_head.weight" in expected_shapes(load_config(plain))


def test_refused_folders(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        prepare(plain.parent, tmp_path / "out")
    source = edited(plain, tmp_path / "source", lambda config: None)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{SECOND} is missing"):
        prepare(source, tmp_path / "out")
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        prepare(source, tmp_path / "out")


def test_towers_of_both_namings_are_read(plain: Path, tmp_path: Path) -> None:
    old, _ = load_tower(write_checkpoint(tmp_path / "old", names="old"))
    new, _ = load_tower(plain)
    old_state, new_state = old.state_dict(), new.state_dict()
    assert old_state.keys() == new_state.keys()
    assert all(torch.equal(old_state[name], new_state[name]) for name in old_state)
    assert merging_layers(load_config(plain)) == 3


def test_pictures_are_found_in_folders(tmp_path: Path) -> None:
    for name in ("b.PNG", "sub/a.jpeg", "notes.txt", "a.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [f.name for f in find_pictures(tmp_path)] == ["a.webp", "b.PNG", "a.jpeg"]
