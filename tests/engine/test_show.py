"""Pictures of merged and dropped regions, and that they show what the engine did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.reference import Reference
from tests.support.tiny_checkpoints import (
    EOS,
    decided_images,
    make_images,
    pick_thresholds,
    prompt,
    write_checkpoint,
)
from vllm_hybrid import cli
from vllm_hybrid.tools import show
from vllm_hybrid.tools.regions import SCALE, kept_regions, merged_regions, side_by_side

SIDE, PATCH = 24, 14
QUESTION = "What is in the image?"


def random_picture(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (SIDE * PATCH, SIDE * PATCH, 3), dtype=np.uint8))


def inside_of_patches(sheet: Image.Image) -> np.ndarray:
    """[patches, pixels, 3]: every patch without the pixels at its rim, where borders are drawn."""
    size = PATCH * SCALE
    pixels = np.asarray(sheet).reshape(SIDE, size, SIDE, size, 3).transpose(0, 2, 1, 3, 4)
    return pixels[:, :, 2:-2, 2:-2].reshape(SIDE * SIDE, -1, 3)


def test_a_live_token_has_one_colour_the_mean_of_its_patches(rng: np.random.Generator) -> None:
    picture, owner = random_picture(rng), rng.integers(0, 5, SIDE * SIDE)
    painted = inside_of_patches(merged_regions(picture, owner))
    pixels = np.asarray(picture, dtype=np.float64).reshape(SIDE, PATCH, SIDE, PATCH, 3)
    patches = pixels.transpose(0, 2, 1, 3, 4).reshape(SIDE * SIDE, -1, 3)
    for token in range(5):
        mean = patches[owner == token].mean(axis=(0, 1))
        assert np.abs(painted[owner == token] - mean).max() <= 0.5


def test_borders_stand_between_tokens_and_only_there() -> None:
    owner = np.zeros((SIDE, SIDE), dtype=int)
    owner[:, SIDE // 2 :] = 1
    black = Image.new("RGB", (SIDE * PATCH, SIDE * PATCH))
    pixels = np.asarray(merged_regions(black, owner.ravel()))
    assert set(np.nonzero(pixels.any(axis=(0, 2)))[0]) == {SIDE // 2 * PATCH * SCALE}


def test_kept_regions_stay_and_dropped_ones_fade(rng: np.random.Generator) -> None:
    picture, owner = random_picture(rng), rng.permutation(SIDE * SIDE)
    kept = rng.random(SIDE * SIDE) < 0.5
    shown = inside_of_patches(kept_regions(picture, owner, kept))
    original = inside_of_patches(picture.resize((SIDE * PATCH * SCALE,) * 2, Image.Resampling.NEAREST))
    assert (shown[kept[owner]] == original[kept[owner]]).all()
    faded = shown[~kept[owner]]
    assert (faded.min(axis=-1) >= 255 * 0.8 - 1).all()
    assert (faded == faded[..., :1]).all()


def test_patches_that_do_not_tile_the_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="do not tile"):
        merged_regions(Image.new("RGB", (336, 336)), np.zeros(575, dtype=int))


def test_a_long_answer_is_wrapped_under_the_panels() -> None:
    panel = Image.new("RGB", (300, 300))
    short = side_by_side({"a": panel, "b": panel}, ["one line"])
    long = side_by_side({"a": panel, "b": panel}, ["many words " * 40])
    assert long.width == short.width >= 600
    assert long.height > short.height > 300


def run_show(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vllm-hybrid", "show", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.engine
def test_show_draws_what_the_engine_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine, at the level that was named, not the default one, and at full."""
    plain = write_checkpoint(tmp_path / "plain", seed=5)
    thresholds = pick_thresholds(plain, list(make_images().values()), [0.4, 0.4, 0.4])
    levels: dict[str, dict[str, Any]] = {
        "shown": {"thresholds": thresholds, "fastv_ratio": 0.9},
        "other": {"fastv_ratio": 0.5},
    }
    section = {"levels": levels, "default_level": "other", "fastv_layer": 2}
    checkpoint = write_checkpoint(tmp_path / "hybrid", seed=5, hybrid=section)
    reference = Reference(plain, {"fastv_layer": 2} | levels["shown"])
    # The first one is answered alike at both levels.
    picture = decided_images(reference, 2)[1]
    picture.save(tmp_path / "picture.png")
    drawn: dict[str, show.Seen] = {}
    started: list[object] = []

    def keep(picture: Image.Image, question: str, reduced: show.Seen, full: show.Seen) -> Image.Image:
        drawn.update(reduced=reduced, full=full)
        return draw(picture, question, reduced, full)

    def count(*arguments: object) -> tuple[show.Seen, show.Seen]:
        started.append(arguments)
        return in_own_process(*arguments)

    draw, in_own_process = show.draw, show._in_own_process
    monkeypatch.setattr(show, "draw", keep)
    monkeypatch.setattr(show, "_in_own_process", count)
    out = tmp_path / "sheet.png"
    arguments = [
        checkpoint,
        tmp_path / "picture.png",
        "--question",
        QUESTION,
        "--out",
        out,
        "--tokens",
        6,
        "--dtype",
        "float32",
        "--level",
        "shown",
    ]
    assert not run_show(monkeypatch, *arguments)
    assert len(started) == 1

    members = reference.encode(picture)[1]
    reduced = drawn["reduced"]
    assert [sorted(np.flatnonzero(reduced.owner == token)) for token in range(len(members))] == [
        sorted(held) for held in members
    ]
    # The chat template writes no beginning-of-sequence token, and a server adds none to a chat.
    ids = reference.prompt_ids(prompt(QUESTION))[1:]
    (choice,) = reference.choices(ids, [picture])
    assert reduced.kept is not None
    assert list(np.flatnonzero(reduced.kept)) == sorted(choice.kept)
    assert drawn["full"].owner is None
    for seen, own in ((reduced, reference), (drawn["full"], Reference(plain, {}))):
        said = [step.token for step in own.generate(ids, [picture], 6, stop_ids=[EOS])]
        assert seen.answer == own.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert reduced.answer != drawn["full"].answer
    assert Image.open(out).width > 3 * SIDE * PATCH * SCALE


@pytest.mark.parametrize(
    ("section", "arguments", "message"),
    [
        (None, [], "has no hybrid section, so there is nothing to show"),
        ({"fastv_ratio": 0}, [], "switches nothing on, so there is nothing to show"),
        ({"fastv_ratio": 2}, [], "hybrid.fastv_ratio is 2; give a number"),
        (
            {"levels": {"low": {"fastv_ratio": 0.5}}},
            ["--level", "lwo"],
            "--level is 'lwo', which is no level; use low or full",
        ),
        (
            {"levels": {"low": {"fastv_ratio": 0.5}, "mid": {"fastv_ratio": 0.1}}, "default_level": "full"},
            [],
            "merges and drops nothing, so there is nothing to show; choose with --level from low, mid",
        ),
        ({"fastv_ratio": 0.5}, ["--level", "full"], "level full of"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence_and_starts_no_engine(
    section: dict[str, Any] | None,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hybrid=section)
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    monkeypatch.setattr(show, "_in_own_process", lambda *_: pytest.fail("an engine starts"))
    monkeypatch.chdir(tmp_path)
    assert run_show(monkeypatch, checkpoint, tmp_path / "picture.png", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-hybrid: error: ") and message in error and error.count("\n") == 1


def test_a_section_for_another_architecture_cannot_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", hybrid={"fastv_ratio": 0.5}, architecture="LlavaForConditionalGeneration"
    )
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    assert run_show(monkeypatch, checkpoint, tmp_path / "picture.png") == 1
    assert "but not the architecture LlavaHybridForConditionalGeneration" in capsys.readouterr().err
