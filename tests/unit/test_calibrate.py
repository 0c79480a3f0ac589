"""Threshold finding: the schedule, the edge of a batch's scores, and calibration of a tiny tower."""

from __future__ import annotations

import math
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from tests.support.reference import Reference
from tests.support.tiny_checkpoints import make_images, write_checkpoint
from vllm_hybrid.tools import calibrate as calibrating
from vllm_hybrid.tools.calibrate import (
    MOST_PASSES,
    TOLERANCE,
    batch_thresholds,
    calibrate,
    find_shift,
    live_counts,
    live_schedule,
    score_threshold,
)
from vllm_hybrid.tools.journal import Journal
from vllm_hybrid.tools.pictures import load_rgb
from vllm_hybrid.tools.progress import Notice
from vllm_hybrid.tools.stable_batches import stable_batches

PATCHES = 576


# ---- schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "layers"), [(90, 23), (195, 23), (394, 23), (575, 23), (100, 5), (2, 23)])
def test_schedule(tokens: int, layers: int) -> None:
    live = [PATCHES, *live_schedule(PATCHES, tokens, layers)]
    shares = [before - after for before, after in zip(live, live[1:], strict=False)]
    assert len(shares) == layers and live[-1] == pytest.approx(tokens)
    most = max(shares)
    for before, share in zip(live, shares, strict=False):
        assert share == pytest.approx(min(most, (before - 1) / 2))


def test_schedule_without_a_cap_is_constant() -> None:
    assert live_schedule(PATCHES, 346, 23) == pytest.approx([PATCHES - 10 * i for i in range(1, 24)])


@pytest.mark.parametrize(("tokens", "layers"), [(90, 23), (394, 23), (575, 23), (100, 5), (2, 23)])
def test_reverse_linear_merges_ever_more(tokens: int, layers: int) -> None:
    live = [PATCHES, *live_schedule(PATCHES, tokens, layers, "reverse-linear")]
    shares = [before - after for before, after in zip(live, live[1:], strict=False)]
    assert live[-1] == pytest.approx(tokens)
    for layer, (before, share) in enumerate(zip(live, shares, strict=False)):
        assert share == pytest.approx(min(shares[0] * (layer + 1), (before - 1) / 2))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="no schedule 'steep'; use one of constant, reverse-linear"):
        live_schedule(PATCHES, 100, 23, "steep")


@pytest.mark.parametrize(("tokens", "layers"), [(0, 23), (72, 3), (576, 3), (600, 3), (-1, 3), (100, 0)])
def test_numbers_out_of_reach(tokens: int, layers: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} live tokens cannot be had from 576 patches in {layers}"):
        live_schedule(PATCHES, tokens, layers)


def test_the_least_number_is_in_reach() -> None:
    assert live_schedule(PATCHES, 73, 3)[-1] == pytest.approx(73)


# ---- thresholds of a batch ------------------------------------------------------------------------


def test_score_threshold(draw: random.Random) -> None:
    scores = torch.tensor([draw.uniform(-1, 1) for _ in range(50)])
    for above in range(51):
        assert int((scores > score_threshold(scores, above)).sum()) == above
    assert bool((scores > score_threshold(scores, 99)).all())
    assert not bool((scores > score_threshold(scores, -3)).any())


def test_equal_scores_stay_together() -> None:
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    assert int((scores > score_threshold(scores, 2)).sum()) == 1
    assert int((scores > score_threshold(scores, 4)).sum()) == 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llava"), seed=5)


@pytest.fixture(scope="module")
def vision_model(checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint).model.vision_tower.eval()


@pytest.fixture(scope="module")
def image_processor(checkpoint: Path) -> Any:
    return AutoImageProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for seed in range(3):
        for name, image in make_images(seed).items():
            if name != "flat":
                paths.append(folder / f"{name}{seed}.png")
                image.save(paths[-1])
    return paths


def test_a_batch_shares_the_schedules_budget(
    checkpoint: Path, vision_model: Any, image_processor: Any, pictures: list[Path]
) -> None:
    """Layer by layer, by the reference: together the pictures keep what the schedule says, each its own."""
    images = [load_rgb(path) for path in pictures[:4]]
    pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
    schedule = live_schedule(PATCHES, 200, 3)
    thresholds = batch_thresholds(vision_model, pixels, schedule)
    for layer in range(3):
        upto = [*thresholds[: layer + 1], *[None] * (2 - layer)]
        counts = [len(Reference(checkpoint, {"thresholds": upto}).encode(image)[1]) for image in images]
        assert abs(sum(counts) - 4 * schedule[layer]) <= 2
    assert max(counts) > 1.1 * min(counts)


# ---- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "batch_size"), [(100, 15), (250, 4), (450, 1)])
def test_calibrated_pictures_keep_the_wanted_tokens(
    checkpoint: Path,
    vision_model: Any,
    image_processor: Any,
    pictures: list[Path],
    tokens: int,
    batch_size: int,
) -> None:
    thresholds = calibrate(vision_model, image_processor, pictures, tokens, batch_size)
    assert len(thresholds) == 3 and all(math.isfinite(t) for t in thresholds)
    reference = Reference(checkpoint, {"thresholds": thresholds})
    counts = [len(reference.encode(Image.open(path))[1]) for path in pictures]
    assert abs(np.mean(counts) - tokens) <= 0.03 * tokens
    measured = live_counts(vision_model, image_processor, pictures, thresholds, batch_size=7)
    # Single decisions may be a matter of rounding; the picture's count is not.
    assert all(abs(a - b) <= 2 for a, b in zip(measured, counts, strict=True))


def test_calibration_repeats(vision_model: Any, image_processor: Any, pictures: list[Path]) -> None:
    """The order in which pictures are listed does not matter, the seed does."""
    some = pictures[:8]
    first = calibrate(vision_model, image_processor, some, 250, 3, seed=1)
    assert first == calibrate(vision_model, image_processor, [*reversed(some)], 250, 3, seed=1)
    assert first != calibrate(vision_model, image_processor, some, 250, 3, seed=2)


def test_progress(vision_model: Any, image_processor: Any, pictures: list[Path]) -> None:
    calls: list[tuple[str, int, int]] = []
    calibrate(vision_model, image_processor, pictures[:5], 250, 2, progress=lambda *call: calls.append(call))
    assert calls[:3] == [("thresholds for 250 tokens", done, 5) for done in (2, 4, 5)]
    assert calls[3] == ("measuring 250 tokens, shift 0.0", 2, 5)


def test_calibration_goes_on_where_it_was_cut_off(
    tmp_path: Path,
    vision_model: Any,
    image_processor: Any,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Path] = []
    some = pictures[:8]
    load = calibrating.load_processable

    def noted(path: Path, by: Any) -> Any:
        loaded.append(path)
        return load(path, by)

    monkeypatch.setattr(calibrating, "load_processable", noted)
    whole = calibrate(vision_model, image_processor, some, 250, 2)
    all_loads = len(loaded)
    # Batches: 4 of thresholds, then 4 of the first measuring.
    for cut in (1, 4, 7):
        loaded.clear()
        file = tmp_path / f"{cut}.partial"

        def stop(stage: str, done: int, total: int, cut: int = cut) -> None:
            if len(loaded) >= 2 * cut:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(vision_model, image_processor, some, 250, 2, progress=stop, journal=Journal(file, "w"))
        # A machine that went down in the middle of a line leaves half of it.
        file.write_text(file.read_text() + '["half a li')
        found = calibrate(vision_model, image_processor, some, 250, 2, journal=Journal(file, "w"))
        assert found == whole
        assert len(loaded) == all_loads


def test_finished_batches_are_kept_when_pictures_come_or_go(
    tmp_path: Path,
    vision_model: Any,
    image_processor: Any,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    draw: random.Random,
) -> None:
    """What is found is what a run of its own finds, and only batches with other pictures are computed."""
    loaded: list[str] = []
    load, seed = calibrating.load_processable, draw.randrange(1000)

    def noted(path: Path, by: Any) -> Any:
        loaded.append(path.name)
        return load(path, by)

    monkeypatch.setattr(calibrating, "load_processable", noted)
    # Measuring starts again with other pictures.
    monkeypatch.setattr(calibrating, "find_shift", lambda average, tokens: (0.0, tokens))

    def thresholds(files: list[Path], journal: Path | None = None) -> list[float]:
        loaded.clear()
        kept = None if journal is None else Journal(journal, "w")
        return calibrate(vision_model, image_processor, files, 250, 2, seed, journal=kept, folder=folder)

    def sets(files: list[Path]) -> set[frozenset[str]]:
        names = [file.name for file in files]
        return {frozenset(names[n] for n in batch) for batch in stable_batches(names, 2, seed)}

    folder, file, all_of_them = pictures[0].parent, tmp_path / "t.partial", pictures[:9]
    thresholds(all_of_them, file)
    assert sorted(loaded) == sorted(f.name for f in all_of_them)
    gone = draw.choice(all_of_them)
    fewer = [f for f in all_of_them if f != gone]
    found = thresholds(fewer, file)
    changed = sets(fewer) - sets(all_of_them)
    assert sorted(loaded) == sorted(name for batch in changed for name in batch)
    assert found == thresholds(fewer)
    # A file that was written anew is another one, though it has the same name.
    touched = draw.choice(fewer)
    os.utime(touched, ns=(touched.stat().st_atime_ns, touched.stat().st_mtime_ns + 1))
    assert thresholds(fewer, file) == found
    assert touched.name in loaded and len(loaded) <= 2


def test_thresholds_do_not_depend_on_where_the_pictures_lie(
    tmp_path: Path,
    vision_model: Any,
    image_processor: Any,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrating, "find_shift", lambda average, tokens: (0.0, tokens))
    moved = [Path(shutil.copy(picture, tmp_path)) for picture in pictures[:6]]
    assert calibrate(vision_model, image_processor, moved, 250, 2) == calibrate(
        vision_model, image_processor, pictures[:6], 250, 2
    )


def test_a_picture_that_vanishes_is_named(
    tmp_path: Path, vision_model: Any, image_processor: Any, pictures: list[Path]
) -> None:
    gone = tmp_path / "gone.png"
    for journal in (None, Journal(tmp_path / "t.partial", "w")):
        with pytest.raises(ValueError, match=r"gone\.png cannot be read as a picture \(No such file"):
            calibrate(vision_model, image_processor, [*pictures[:2], gone], 250, journal=journal)


def test_a_journal_of_other_work_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    assert Journal(file, {"seed": 1}).result("a", lambda: [0.1 + 0.2]) == [0.1 + 0.2]
    assert Journal(file, {"seed": 1}).result("a", lambda: None) == [0.1 + 0.2]
    assert len(Journal(file, {"seed": 2})) == 0
    assert len(Journal(file, {"seed": 1})) == 0
    journal = Journal(file, {"seed": 1})
    journal.remove()
    assert not file.exists()


def test_a_miss_is_told(
    vision_model: Any, image_processor: Any, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no shift reaches the number, as with pictures that merge in one leap, the user learns it."""
    monkeypatch.setattr(calibrating, "find_shift", lambda average, tokens: (0.125, 206.4))
    with pytest.warns(Notice, match=r"keep 206\.4 tokens on average instead of 200"):
        shifted = calibrate(vision_model, image_processor, pictures[:2], 200)
    monkeypatch.setattr(calibrating, "find_shift", lambda average, tokens: (0.0, 205.6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrate(vision_model, image_processor, pictures[:2], 200)
    assert shifted == pytest.approx([t + 0.125 for t in found])


def test_refusals(tmp_path: Path, vision_model: Any, image_processor: Any, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="no calibration pictures"):
        calibrate(vision_model, image_processor, [], 100)
    with pytest.raises(ValueError, match="batch size is 0"):
        calibrate(vision_model, image_processor, pictures, 100, batch_size=0)
    with pytest.raises(ValueError, match="10 live tokens cannot be had .* give a number from 73 to 575"):
        calibrate(vision_model, image_processor, pictures, 10)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for path in (tmp_path / "broken.jpg", tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read as a picture"):
            calibrate(vision_model, image_processor, [path], 100)


# ---- the shift ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [20, 300, 5000])
@pytest.mark.parametrize("offset", [-150, -20, 0, 20, 150])
def test_shift_is_found(draw: random.Random, scale: float, offset: float) -> None:
    """A steep or flat, monotone average that starts anywhere."""
    wanted = draw.uniform(160, 400)
    asked: list[float] = []

    def average(shift: float) -> float:
        asked.append(shift)
        return wanted + offset + scale * shift

    shift, reached = find_shift(average, wanted)
    assert len(asked) == len(set(asked)) <= MOST_PASSES
    assert reached == average(shift)
    assert abs(reached - wanted) <= TOLERANCE * wanted
    if abs(offset) <= TOLERANCE * wanted:
        assert shift == 0


def test_the_nearest_is_taken_where_a_step_leaps_over_the_number() -> None:
    assert find_shift(lambda shift: 90 if shift < 0.033 else 150, 100)[1] == 90
