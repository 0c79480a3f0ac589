"""Pictures of merged and dropped regions, and that they show what the engine did."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.reference import Reference
from tests.support.tiny_checkpoints import (
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


@pytest.mark.engine
def test_show_draws_what_the_engine_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_checkpoint(tmp_path / "plain", seed=5)
    thresholds = pick_thresholds(plain, list(make_images().values()), [0.4, 0.4, 0.4])
    hybrid = {"thresholds": thresholds, "fastv_layer": 2, "fastv_ratio": 0.5}
    checkpoint = write_checkpoint(tmp_path / "hybrid", seed=5, hybrid=hybrid)
    reference = Reference(plain, hybrid)
    (picture,) = decided_images(reference, 1)
    picture.save(tmp_path / "picture.png")
    drawn: dict[str, show.Seen] = {}

    def keep(picture: Image.Image, question: str, reduced: show.Seen, full: show.Seen) -> Image.Image:
        drawn.update(reduced=reduced, full=full)
        return draw(picture, question, reduced, full)

    draw = show.draw
    monkeypatch.setattr(show, "draw", keep)
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
    ]
    monkeypatch.setattr(sys, "argv", ["vllm-hybrid", "show", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code

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
    assert Image.open(out).width > 3 * SIDE * PATCH * SCALE


def test_show_without_a_hybrid_section_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "plain")
    Image.new("RGB", (40, 40)).save(tmp_path / "picture.png")
    monkeypatch.setattr(sys, "argv", ["vllm-hybrid", "show", str(checkpoint), str(tmp_path / "picture.png")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code
    assert "nothing to show" in capsys.readouterr().err
