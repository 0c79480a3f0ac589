"""Picture files: the pixels of the server, which files are pictures, and what is said of the others."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS

from tests.support import odd_pictures
from tests.support.odd_pictures import exif_block, oriented, picture, rational_orientation, saved, with_exif
from tests.support.server_pixels import ServerPixels
from vllm_hybrid.checkpoint.image_processor import load_image_processor
from vllm_hybrid.checkpoint.llava import load_tower
from vllm_hybrid.tools import calibrate, pictures
from vllm_hybrid.tools.pictures import find_pictures, load_rgb, picture_suffixes, readable_pictures, to_rgb
from vllm_hybrid.tools.progress import Notice
from vllm_hybrid.tools.show import as_the_tower_sees

PROCESSOR = CLIPImageProcessor()


@pytest.fixture(scope="module")
def tower(llava: Path) -> tuple[Any, Any]:
    return load_tower(llava)


def check_against_the_server(
    files: Iterator[tuple[str, bytes]], folder: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> tuple[int, int]:
    """Every file: calibration and ``show`` see what the server sees, or all refuse it.

    Returns:
        How many files were read, and how many refused.

    """
    read = refused = 0
    for number, (name, data) in enumerate(files):
        file = folder / f"{number}.png"
        file.write_bytes(data)
        try:
            expected = server_pixels.of_file(data)
        except Exception:
            with pytest.raises(ValueError, match=file.name):
                calibrate._pixel_values(*tower, [file])
            refused += 1
            continue
        (calibrated,) = calibrate._pixel_values(*tower, [file])
        assert torch.equal(calibrated, expected), name
        read += 1
    return read, refused


# ---- the server's pixels --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_modes_and_formats(
    rng: np.random.Generator, tmp_path: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> None:
    files = dict(odd_pictures.in_every_mode(rng))
    assert {f"PNG {mode}" for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")} <= files.keys()
    assert {f"TIFF {mode}" for mode in ("CMYK", "LAB", "YCbCr", "F", "I")} <= files.keys()
    assert check_against_the_server(iter(files.items()), tmp_path, server_pixels, tower)[0] > 20
    files = dict(odd_pictures.in_every_format(rng, ALLOWED_IMAGE_FORMATS))
    kinds = {name.partition(" ")[0] for name in files}
    assert {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"} <= kinds
    read, _ = check_against_the_server(iter(files.items()), tmp_path, server_pixels, tower)
    assert read > 0.8 * len(files)


@pytest.mark.filterwarnings("ignore")
def test_transparency_and_frames(
    rng: np.random.Generator, tmp_path: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> None:
    files = [*odd_pictures.with_transparency(rng), *odd_pictures.moving(rng)]
    assert check_against_the_server(iter(files), tmp_path, server_pixels, tower) == (len(files), 0)


@pytest.mark.filterwarnings("ignore")
def test_orientations(
    rng: np.random.Generator, tmp_path: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> None:
    """Right ones, those of another type, those out of range, and blocks that are no EXIF data."""
    short = struct.pack("<H", 6)
    blocks = {
        "long": exif_block(4, 1, struct.pack("<I", 6)),
        "byte": exif_block(1, 1, b"\6"),
        "text": exif_block(2, 2, b"6"),
        "undefined": exif_block(7, 4, b"6"),
        "two": exif_block(3, 2, short * 2),
        "negative": exif_block(9, 1, struct.pack("<i", -6)),
        "rational": rational_orientation(),
        "float": exif_block(11, 1, struct.pack("<f", 6)),
        "cut off": exif_block(3, 1, short)[:20],
        "no header": b"Exif\0\0XX*\0\x08\0\0\0",
        "far offset": b"Exif\0\0II*\0\xff\xff\0\0",
        "empty": b"Exif\0\0",
        "noise": rng.integers(0, 256, 60, dtype=np.uint8).tobytes(),
    }
    values: list[object] = [*range(10), 65535, (6, 6)]
    files = {f"{kind} {value}": oriented(rng, value, kind) for value in values for kind in ("JPEG", "PNG")}
    files |= {name: with_exif(rng, block) for name, block in blocks.items()}
    assert check_against_the_server(iter(files.items()), tmp_path, server_pixels, tower) == (len(files), 0)
    (tmp_path / "turned").write_bytes(oriented(rng, 6))
    with Image.open(tmp_path / "turned") as unturned:
        assert load_rgb(tmp_path / "turned").size == unturned.size[::-1]


@pytest.mark.filterwarnings("ignore")
def test_exif_data_that_pillow_cannot_handle(
    rng: np.random.Generator, tmp_path: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> None:
    """The server then takes the picture as it lies in the file."""
    files = dict(odd_pictures.turning_fails(rng))
    assert check_against_the_server(iter(files.items()), tmp_path, server_pixels, tower) == (len(files), 0)
    for data in files.values():
        (tmp_path / "odd").write_bytes(data)
        loaded = load_rgb(tmp_path / "odd")
        with Image.open(tmp_path / "odd") as as_it_lies:
            assert np.array_equal(np.asarray(loaded), np.asarray(as_it_lies.convert("RGB")))
        # ``show`` asks its engine about what load_rgb gives.
        assert torch.equal(server_pixels.of_picture(loaded), server_pixels.of_file(data))


@pytest.mark.filterwarnings("ignore")
def test_broken_files(
    rng: np.random.Generator, tmp_path: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> None:
    whole = {
        kind: saved(picture(rng), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")
    }
    files = [("empty", b""), ("text", b"no picture"), ("foreign disk", b"\0\5\x16\7\0\2\0\0Mac OS X")]
    for name, data in whole.items():
        files += [(f"{name} half", data[: len(data) // 2]), (f"{name} head", data[:24])]
        noise = bytearray(data)
        for place in rng.integers(20, len(data), 30):
            noise[place] = rng.integers(256)
        files.append((f"{name} noise", bytes(noise)))
    read, refused = check_against_the_server(iter(files), tmp_path, server_pixels, tower)
    assert read + refused == len(files) and refused >= 3 + len(whole)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", odd_pictures.MODES)
def test_pictures_in_memory(rng: np.random.Generator, mode: str, server_pixels: ServerPixels) -> None:
    image = picture(rng, mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and not rgb.info and not rgb.getexif()
    assert torch.equal(server_pixels.of_picture(rgb), server_pixels.of_picture(image))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    image.save(tmp_path / "picture.png")
    loaded = load_rgb(tmp_path / "picture.png")
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == ((255, 255, 255), (200, 0, 0))


# ---- the checkpoint's image processor -------------------------------------------------------------

CLIP: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}}
PADDING: dict[str, Any] = {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 336}}
CROP = {"crop_size": {"height": 336, "width": 336}}
PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {"preprocessor_config.json": CLIP | CROP},
    "padding": {"preprocessor_config.json": PADDING | CROP | {"do_pad": True}},
    "no padding": {"preprocessor_config.json": PADDING | CROP},
    "fast": {"preprocessor_config.json": CLIP | CROP | {"image_processor_type": "CLIPImageProcessorFast"}},
    "squeezed": {
        "preprocessor_config.json": CLIP | {"size": {"height": 336, "width": 336}, "do_center_crop": False}
    },
    "other values": {
        "preprocessor_config.json": CLIP
        | CROP
        | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    },
    "feature extractor": {
        "preprocessor_config.json": CROP
        | {"feature_extractor_type": "CLIPFeatureExtractor", "size": {"shortest_edge": 336}}
    },
    "inside": {
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_processor": PADDING | CROP | {"do_pad": True},
        }
    },
}


def with_processor(checkpoint: Path, target: Path, files: dict[str, dict[str, Any]]) -> Path:
    """A copy of a checkpoint with other files about its image processor; the rest are links."""
    shutil.copytree(checkpoint, target, copy_function=os.link)
    (target / "preprocessor_config.json").unlink()
    for name, content in files.items():
        (target / name).unlink(missing_ok=True)
        (target / name).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_made_as_the_checkpoint_says(
    rng: np.random.Generator, kind: str, llava: Path, tmp_path: Path
) -> None:
    other = with_processor(llava, tmp_path / "llava", PROCESSORS[kind])
    served, tower = ServerPixels(other), load_tower(other)
    for number, (width, height) in enumerate([(90, 41), (41, 90), (336, 336), (500, 375)]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.png")
        expected = served.of_file((tmp_path / f"{number}.png").read_bytes())
        (calibrated,) = calibrate._pixel_values(*tower, [tmp_path / f"{number}.png"])
        assert torch.equal(calibrated, expected)
        drawn = np.asarray(as_the_tower_sees(other, image), np.float64).transpose(2, 0, 1) / 255
        mean, std = (np.reshape(getattr(tower[1], name), (3, 1, 1)) for name in ("image_mean", "image_std"))
        assert np.abs((drawn - mean) / std - expected.numpy()).max() < 1e-4


def test_padding_makes_other_pixels(rng: np.random.Generator, llava: Path, tmp_path: Path) -> None:
    """Else the test above would show little."""
    padding = with_processor(llava, tmp_path / "llava", PROCESSORS["padding"])
    image = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    first, second = (
        load_image_processor(folder, 336)(images=[image], return_tensors="pt")["pixel_values"]
        for folder in (llava, padding)
    )
    assert (first - second).abs().max() > 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "preprocessor_config.json"),
        (
            {"preprocessor_config.json": CLIP | {"image_processor_type": "SeeingImageProcessor"}},
            "cannot be loaded",
        ),
        ({"preprocessor_config.json": CLIP | CROP | {"size": "large"}}, "cannot be loaded"),
        (
            {"preprocessor_config.json": CLIP | {"crop_size": {"height": 224, "width": 224}}},
            "makes 3 x 224 x 224 values of a picture, but the tower takes 3 x 336 x 336; correct size",
        ),
        ({"preprocessor_config.json": CLIP | {"do_center_crop": False}}, "correct size and crop_size"),
    ],
)
def test_a_processor_that_cannot_serve_is_refused(
    files: dict[str, dict[str, Any]], message: str, llava: Path, tmp_path: Path
) -> None:
    other = with_processor(llava, tmp_path / "llava", files)
    with pytest.raises(ValueError, match=message) as refusal:
        load_tower(other)
    assert "\n" not in str(refusal.value)


# ---- which files are pictures ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(folder / "a.jpg")
    shutil.copy(folder / "a.jpg", folder / "more" / "b.JFIF")
    return folder


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def test_every_format_of_the_server_is_found(folder: Path) -> None:
    for name in ("c.avif", "d.webp", "e.jp2", "f.jpeg", "g.tga", "h.PPM", "i.apng", "j.ico"):
        (folder / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_pictures(folder)
    assert len(found) == 10 and found == sorted(found)
    assert {".png", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe"} <= picture_suffixes()
    # Pillow opens these, the server does not.
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5", ".pdf"} & picture_suffixes()


def test_what_is_passed_over_is_counted(folder: Path) -> None:
    for name in ("._a.jpg", ".DS_Store", "x.txt", "more/y.txt", "more/z.json", "README", "s.svg", "e.eps"):
        (folder / name).write_text("x")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "a.jpg", folder / ".thumbnails" / "a.jpg")
    (folder / "linked").symlink_to(folder / "more")
    with pytest.warns(Notice) as told:
        assert names(find_pictures(folder)) == ["a.jpg", "b.JFIF"]
    (notice,) = told
    assert str(notice.message) == (
        f"{folder}: passed over 10 entries: 3 hidden, 2 .txt, 1 .eps, 1 .json, 1 .svg, 1 linked folder, "
        "1 of other kinds"
    )


def test_hidden_folders_are_one_entry_and_not_walked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be large, or closed, as a disk's .Trash-0 is."""
    (folder / ".Trash-0" / "files").mkdir(parents=True)
    (folder / "more" / ".git").mkdir()
    for number in range(3):
        (folder / ".Trash-0" / "files" / f"{number}.jpg").touch()
    walked = list_folders(monkeypatch)
    with pytest.warns(Notice, match="passed over 2 entries: 2 hidden$"):
        assert names(find_pictures(folder)) == ["a.jpg", "b.JFIF"]
    assert walked == [folder, folder / "more"]


def test_folders_that_cannot_be_listed_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lost+found").mkdir()
    (folder / ".Trash-0").mkdir()
    list_folders(monkeypatch, folder / "lost+found", folder / ".Trash-0")
    with pytest.warns(Notice, match="passed over 2 entries: 1 cannot be listed, 1 hidden$"):
        assert names(find_pictures(folder)) == ["a.jpg", "b.JFIF"]
    list_folders(monkeypatch, folder)
    with pytest.raises(PermissionError, match="pictures"):
        find_pictures(folder)


def list_folders(monkeypatch: pytest.MonkeyPatch, *closed: Path) -> list[Path]:
    """Records which folders are listed, and closes some to us, as no permission does to root."""
    listed, scandir = list[Path](), os.scandir

    def look(place: Any) -> Any:
        if Path(place) in closed:
            raise PermissionError(13, "Permission denied", str(place))
        listed.append(Path(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", look)
    return listed


def test_phones_pictures_without_the_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    pictures._reads_heif.cache_clear()
    try:
        (folder / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        with pytest.warns(Notice, match=r"1 entry: 1 \.heic \(install pillow-heif to read them\)$"):
            assert names(find_pictures(folder)) == ["a.jpg", "b.JFIF"]
        with pytest.raises(ValueError, match=r"c\.HEIC cannot be read .* \(install pillow-heif to read it\)"):
            load_rgb(folder / "c.HEIC")
    finally:
        pictures._reads_heif.cache_clear()


def test_phones_pictures_with_the_plugin(rng: np.random.Generator, folder: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    assert {".heic", ".heif"} <= picture_suffixes()
    Image.new("RGB", (40, 24), (200, 30, 60)).save(folder / "c.heic", quality=100)
    assert heif.is_supported(folder / "c.heic")
    assert names(find_pictures(folder)) == ["a.jpg", "c.heic", "b.JFIF"]
    loaded = load_rgb(folder / "c.heic")
    assert (loaded.mode, loaded.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(loaded, int) - (200, 30, 60)).max() < 12


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no pictures; give a folder of pictures"):
        find_pictures(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"holds no pictures, only 1 entry: 1 \.txt; give"):
        find_pictures(tmp_path)


# ---- those that cannot be read --------------------------------------------------------------------


def test_all_unreadable_files_are_known_up_front(folder: Path) -> None:
    whole = saved(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "none.bmp").touch()
    (folder / "gone.gif").symlink_to(folder / "nowhere.gif")
    files = find_pictures(folder)
    seen: list[tuple[str, int, int]] = []
    with pytest.raises(ValueError) as refusal:
        readable_pictures(files, PROCESSOR, progress=lambda *report: seen.append(report))
    text = str(refusal.value)
    assert text.startswith("4 of 6 files cannot be read as pictures: ") and "\n" not in text
    assert f"{folder / 'gone.gif'} (No such file or directory), {folder / 'half.jpg'} (" in text
    assert f"{folder / 'none.bmp'} (its format is not known) and 1 more; remove" in text
    assert "--skip-unreadable" in text and "object at" not in text
    assert seen == [("reading pictures", done, 6) for done in range(1, 7)]
    with pytest.warns(Notice, match="4 of 6 files cannot be read as pictures: .*; left out$"):
        assert names(readable_pictures(files, PROCESSOR, skip_unreadable=True)) == ["a.jpg", "b.JFIF"]


# Suffixes of rare picture formats that other programs' files have too.
RARE = ("scan.pcd", "curve.fit", "mail.im", "colours.rgb", "plan.msp", "brush.gbr", "x.iim", "synth.VST")


def test_files_with_a_rare_suffix_that_are_no_pictures(rng: np.random.Generator, folder: Path) -> None:
    for name in RARE:
        (folder / name).write_bytes(b"# no picture\n" + rng.bytes(300))
    (folder / "gone.pcd").symlink_to(folder / "nowhere")
    files = find_pictures(folder)
    assert len(files) == 3 + len(RARE)
    with pytest.warns(
        Notice, match=r"^passed over what holds no picture: 9 entries: 2 \.pcd, 1 \.fit, 1 \.gbr"
    ):
        assert names(readable_pictures(files, PROCESSOR)) == ["a.jpg", "b.JFIF"]
    (folder / "text.png").write_text("no picture")
    with pytest.warns(Notice), pytest.raises(ValueError, match=r"1 of 3 files .*text\.png"):
        readable_pictures(find_pictures(folder), PROCESSOR)
    with pytest.raises(ValueError, match=r"none of the files is a picture, only 1 entry: 1 \.pcd; give"):
        readable_pictures([folder / "scan.pcd"], PROCESSOR)


def test_a_rare_picture_that_is_broken_is_no_other_file(rng: np.random.Generator, folder: Path) -> None:
    whole = saved(picture(rng), "SGI")
    (folder / "c.rgb").write_bytes(whole)
    assert names(readable_pictures(find_pictures(folder), PROCESSOR)) == ["a.jpg", "c.rgb", "b.JFIF"]
    (folder / "c.rgb").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 3 files cannot be read as pictures: .*c\.rgb"):
        readable_pictures(find_pictures(folder), PROCESSOR)


def test_several_pictures_in_one_file(
    rng: np.random.Generator, folder: Path, server_pixels: ServerPixels, tower: tuple[Any, Any]
) -> None:
    """Cameras write them with a suffix of their own."""
    picture(rng).save(folder / "c.mpo", format="MPO", save_all=True, append_images=[picture(rng)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = readable_pictures(find_pictures(folder), PROCESSOR)
    assert names(files) == ["a.jpg", "c.mpo", "b.JFIF"]
    (calibrated,) = calibrate._pixel_values(*tower, [folder / "c.mpo"])
    assert torch.equal(calibrated, server_pixels.of_file((folder / "c.mpo").read_bytes()))


def test_readable_files_stay_in_their_order(folder: Path) -> None:
    files = find_pictures(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert readable_pictures([*reversed(files)], PROCESSOR) == [*reversed(files)]


def test_nothing_but_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"1 of 1 files .* \(its format is not known\); give a folder"):
        readable_pictures([tmp_path / "a.png"], PROCESSOR, skip_unreadable=True)
