"""Pictures and options that an image processor would blow up beyond all memory are refused before it does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor
from vllm.exceptions import VLLMValidationError

from tests.support.odd_pictures import saved
from tests.support.server_pixels import ServerPixels
from vllm_hybrid.checkpoint.image_processor import check_size, most_pixels
from vllm_hybrid.checkpoint.llava import load_tower
from vllm_hybrid.tools import calibrate
from vllm_hybrid.tools.pictures import load_rgb, readable_pictures
from vllm_hybrid.tools.show import as_the_tower_sees, show

NARROW = (1, 200_000)
SAID = r"a picture of 1 x 200000 grows to .* pixels .* VLLM_MAX_IMAGE_PIXELS=178956970; give one"
SQUARE = {"height": 24, "width": 24}
PROCESSORS: dict[str, Any] = {
    "CLIP": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE),
    "padded": LlavaImageProcessor(do_pad=True, size={"shortest_edge": 24}, crop_size=SQUARE),
    "stretched": CLIPImageProcessor(size=SQUARE, crop_size=SQUARE),
}
# Options of a call, and the side of the square that they make of any picture on the way.
CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "edge": ({"size": {"shortest_edge": 50_000}}, 50_000),
    "square": ({"size": {"height": 40_000, "width": 40_000}}, 40_000),
    "number": ({"size": 50_000}, 50_000),
    "crop": ({"crop_size": {"height": 30_000, "width": 30_000}}, 30_000),
    "group": ({"images_kwargs": {"size": {"shortest_edge": 50_000}}}, 50_000),
    "common": ({"common_kwargs": {"crop_size": 30_000}}, 30_000),
}


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    file = tmp_path / "narrow.png"
    file.write_bytes(saved(Image.new("L", NARROW), "PNG"))
    return file


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_pixels_are_those_that_the_processor_makes(name: str) -> None:
    processor = PROCESSORS[name]
    for _ in range(20):
        size = random.randint(8, 200), random.randint(8, 200)
        made = processor(Image.new("RGB", size), do_center_crop=False, return_tensors="np")["pixel_values"][0]
        first = max(size) ** 2 if name == "padded" else size[0] * size[1]
        assert most_pixels(size, processor) == pytest.approx(max(first, made[0].size), rel=0.05), size


def test_a_crop_larger_than_the_picture_counts() -> None:
    changes = {"do_resize": False, "crop_size": {"height": 300, "width": 10}}
    assert most_pixels((20, 30), PROCESSORS["CLIP"], changes) == 300 * 20
    assert most_pixels((20, 30), PROCESSORS["CLIP"], {**changes, "do_center_crop": False}) == 600


def test_usual_pictures_pass() -> None:
    for processor in PROCESSORS.values():
        for size in ((1, 1), (100, 10_000), (13_000, 13_000)):
            check_size(size, processor)


def test_the_server_refuses_it(server_pixels: ServerPixels, narrow: Path) -> None:
    with pytest.raises(VLLMValidationError, match=SAID):
        server_pixels.of_file(narrow.read_bytes())
    with pytest.raises(VLLMValidationError, match=SAID):
        server_pixels.of_picture(Image.new("RGB", NARROW))


@pytest.mark.parametrize("name", CHANGES)
def test_the_server_refuses_options_of_a_request_that_do_the_same(
    server_pixels: ServerPixels, name: str
) -> None:
    changes, side = CHANGES[name]
    items = server_pixels.processor.info.parse_mm_data({"image": [Image.new("RGB", (30, 30))]})
    with pytest.raises(
        VLLMValidationError, match=rf"30 x 30 grows to {side**2:.4g} pixels".replace("+", r"\+")
    ):
        server_pixels.processor("USER: <image> ASSISTANT:", items, hf_processor_mm_kwargs=changes)


def test_what_runs_without_a_server_refuses_it(llava: Path, narrow: Path) -> None:
    tower, processor = load_tower(llava)
    with pytest.raises(ValueError, match=rf"1 of 1 files cannot be read as pictures: .*narrow\.png \({SAID}"):
        readable_pictures([narrow], processor)
    with pytest.raises(ValueError, match=rf"narrow\.png: {SAID}"):
        calibrate._pixel_values(tower, processor, [narrow])
    with pytest.raises(ValueError, match=SAID):
        as_the_tower_sees(llava, load_rgb(narrow))


def test_show_refuses_it_before_an_engine_starts(
    llava: Path, narrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = type("Config", (), {"hybrid": {"fastv_ratio": 0.5}})
    monkeypatch.setattr("vllm_hybrid.tools.show.check_checkpoint", lambda _: section)
    monkeypatch.setattr("vllm_hybrid.tools.show._in_own_process", lambda *_: pytest.fail("an engine starts"))
    with pytest.raises(ValueError, match=SAID):
        show(llava, load_rgb(narrow), "What?", None, 4, "float32")
