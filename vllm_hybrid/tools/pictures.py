"""Picture files: which files of a folder are pictures, and their pixels as the server sees them.

vLLM's own reader reads them, so that what is calibrated and shown is what is served, however odd the file:
its EXIF orientation, transparency, mode and number of frames are treated in one place.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vllm_hybrid.checkpoint.image_processor import check_size
from vllm_hybrid.errors import one_line
from vllm_hybrid.tools.progress import Notice, Progress
from vllm_hybrid.tools.threads import in_threads

# What phones write. The server takes none of it, whoever sends it converts it first; Pillow reads it with a
# plugin.
HEIF_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
HEIF_PLUGIN = "pillow-heif"
_HEIF_HINT = f" (install {HEIF_PLUGIN} to read them)"
# A file with a suffix of these is taken for a picture whatever it holds, so that a broken one is not lost
# from sight. Pillow's other suffixes are also those of files that are no pictures (.im, .rgb, .fit, .vst).
_COMMON_FORMATS = frozenset({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "TIFF", "WEBP"})
# Formats that another one's reader reads: what cameras write with several JPEG pictures in one file.
_READ_AS = {"MPO": "JPEG"}
# Files named in a sentence, and kinds of files counted in one.
MOST_NAMED = 3
MOST_KINDS = 6


def load_rgb(path: str | Path) -> Image.Image:
    """Read a picture file as the server reads the same bytes.

    Returns:
        RGB and nothing but pixels: upright by its EXIF orientation where that can be read, transparent parts
        white, of several frames the first.

    Raises:
        ValueError: the file is missing or is no picture that can be read.

    """
    try:
        return _read(Path(path).read_bytes())
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a broken file.
        raise ValueError(
            f"{path} cannot be read as a picture ({_reason(path, error)}); remove it or convert it"
        ) from error


def load_processable(path: str | Path, image_processor: Any) -> Image.Image:
    """A picture file as :func:`load_rgb` reads it, if an image processor can take its shape.

    Raises:
        ValueError: it cannot be read, or would grow beyond all memory; the cause says why.

    """
    image = load_rgb(path)
    try:
        check_size(image.size, image_processor)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture in memory as the server treats it; see :func:`load_rgb`.

    Raises:
        OSError: its file, which Pillow reads late, is broken.

    """
    convert = _vllm_image()
    upright = convert.normalize_image(image)
    upright.load()
    return _only_pixels(convert.convert_image_mode(upright, "RGB"))


def picture_suffixes() -> frozenset[str]:
    """Suffixes, in lower case and with their dot, of the files that :func:`load_rgb` can read."""
    Image.init()
    readable = {name for name in _vllm_image().ALLOWED_IMAGE_FORMATS if name in Image.OPEN}
    suffixes = {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if _READ_AS.get(name, name) in readable
    }
    return frozenset(suffixes | HEIF_SUFFIXES if _reads_heif() else suffixes - HEIF_SUFFIXES)


def find_pictures(folder: str | Path) -> list[Path]:
    """The picture files in a folder and the folders in it, in the order of their paths.

    Hidden files and folders (their names begin with a dot, as those that macOS writes beside each file of a
    foreign disk), linked folders, folders that cannot be listed and files with other suffixes are passed
    over; a Notice counts them.

    Raises:
        ValueError: there is no such folder, or no picture in it.
        OSError: the folder cannot be listed.

    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder; give a folder of pictures")
    suffixes, files, passed = picture_suffixes(), list[Path](), Counter[str]()
    for file, kind in _listed(Path(folder)):
        if kind in suffixes:
            files.append(file)
        else:
            passed[kind] += 1
    if not files:
        found = f", only {_counted(passed)}" if passed else ""
        raise ValueError(f"{folder} holds no pictures{found}; give a folder of pictures")
    if passed:
        warnings.warn(f"{folder}: passed over {_counted(passed)}", Notice, stacklevel=2)
    return sorted(files)


def readable_pictures(
    files: Sequence[Path],
    image_processor: Any,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """The files that can be read, each read whole to know it.

    Files that hold no known format and whose suffix is seldom a picture's (.pcd, .rgb) are passed over; a
    Notice counts them.

    Args:
        files: picture files.
        image_processor: what will process them; a picture that it cannot, for its shape, is not readable.
        skip_unreadable: leave out what cannot be read, and say so by a Notice.
        progress: called as progress(stage, pictures done, pictures).

    Returns:
        The readable files in the order of ``files``.

    Raises:
        ValueError: a picture cannot be read and none are to be left out, or none can be read; one sentence
            says how many and names the first few.

    """
    faults = _unreadable(files, image_processor, progress)
    others = {file for file, error in faults.items() if _is_no_picture(file, error)}
    if others:
        counted = _counted(Counter(file.suffix.lower() for file in others))
        if len(others) == len(files):
            raise ValueError(f"none of the files is a picture, only {counted}; give a folder of pictures")
        warnings.warn(f"passed over what holds no picture: {counted}", Notice, stacklevel=2)
        files = [file for file in files if file not in others]
    bad = {file: _reason(file, error) for file, error in faults.items() if file not in others}
    return _left(files, bad, skip_unreadable)


def _left(files: Sequence[Path], bad: dict[Path, str], skip_unreadable: bool) -> list[Path]:
    """The files without the bad ones, of which a sentence tells."""
    if not bad:
        return list(files)
    named = ", ".join(f"{file} ({reason})" for file, reason in list(bad.items())[:MOST_NAMED])
    more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    sentence = f"{len(bad)} of {len(files)} files cannot be read as pictures: {named}{more}"
    if not skip_unreadable:
        raise ValueError(f"{sentence}; remove or convert them, or leave them out with --skip-unreadable")
    if len(bad) == len(files):
        raise ValueError(f"{sentence}; give a folder of pictures")
    warnings.warn(f"{sentence}; left out", Notice, stacklevel=3)
    return [file for file in files if file not in bad]


def _unreadable(
    files: Sequence[Path], image_processor: Any, progress: Progress | None
) -> dict[Path, BaseException]:
    """What cannot be read, and why."""
    # Before there are threads: imports and Pillow's list of formats are not made for them.
    picture_suffixes()
    bad: dict[Path, BaseException] = {}
    fault = functools.partial(_fault, image_processor)
    with closing(in_threads(fault, files)) as read:
        for done, (file, error) in enumerate(read, start=1):
            if error is not None:
                bad[file] = error
            if progress is not None:
                progress("reading pictures", done, len(files))
    return bad


def _fault(image_processor: Any, file: Path) -> BaseException | None:
    try:
        load_processable(file, image_processor)
    except ValueError as error:
        assert error.__cause__ is not None
        return error.__cause__
    return None


def _is_no_picture(file: Path, error: BaseException) -> bool:
    """Whether nothing but a suffix that is seldom a picture's tells of a picture in a file."""
    cause = error.__cause__ or error
    unknown = isinstance(cause, UnidentifiedImageError) or (isinstance(cause, OSError) and cause.strerror)
    return bool(unknown) and file.suffix.lower() not in _common_suffixes()


@functools.cache
def _common_suffixes() -> frozenset[str]:
    suffixes = Image.registered_extensions().items()
    return HEIF_SUFFIXES | {suffix for suffix, name in suffixes if name in _COMMON_FORMATS}


def _reason(path: str | Path, error: BaseException) -> str:
    """Why a file cannot be read, without the type and the address of what Pillow held it in."""
    cause = error.__cause__ or error
    if isinstance(cause, UnidentifiedImageError):
        if Path(path).suffix.lower() in HEIF_SUFFIXES and not _reads_heif():
            return f"install {HEIF_PLUGIN} to read it"
        return "its format is not known"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return one_line(cause).rstrip(".") or type(cause).__name__


def _read(data: bytes) -> Image.Image:
    try:
        return _only_pixels(_vllm_reader().load_bytes(data).media)
    except ValueError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError) or not _reads_heif():
            raise
    with Image.open(BytesIO(data), formats=("HEIF",)) as image:
        return to_rgb(image)


def _only_pixels(image: Image.Image) -> Image.Image:
    """A copy without EXIF and the like, which nobody behind can misread or read a second time."""
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    return bare


def _listed(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files below a folder, each with its suffix in lower case, or else why it is none to look at."""
    closed: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=closed.append):
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        # What is taken out of this list is not walked.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in hidden:
            yield Path(place) / name, "hidden"
        for name in folders:
            if (Path(place) / name).is_symlink():
                yield Path(place) / name, "linked folder"
        for name in files:
            if not name.startswith("."):
                yield Path(place) / name, _kind(Path(place) / name)
    for error in closed:
        if Path(error.filename) == folder:
            raise error
        yield Path(error.filename), "cannot be listed"


def _kind(file: Path) -> str:
    try:
        plain = stat.S_ISREG(file.stat().st_mode)
    except OSError:
        # A link to nothing is a picture that cannot be read, not one that is not there.
        plain = True
    return (file.suffix.lower() or "without a suffix") if plain else "special"


def _counted(kinds: Counter[str]) -> str:
    """For example: 12 files: 1 .heic (install pillow-heif to read them), 9 .txt, 2 hidden."""
    ordered = sorted(kinds, key=lambda kind: (kind not in HEIF_SUFFIXES, -kinds[kind], kind))
    parts = [f"{kinds[kind]} {kind}" + (_HEIF_HINT if kind in HEIF_SUFFIXES else "") for kind in ordered]
    others = kinds.total() - sum(kinds[kind] for kind in ordered[:MOST_KINDS])
    shown = [*parts[:MOST_KINDS], *([f"{others} of other kinds"] if others else [])]
    return f"{kinds.total()} {'entry' if kinds.total() == 1 else 'entries'}: {', '.join(shown)}"


@functools.cache
def _reads_heif() -> bool:
    """Whether Pillow reads HEIF, which takes a plugin that is not everywhere."""
    try:
        register = importlib.import_module("pillow_heif").register_heif_opener
    except ImportError:
        return False
    register()
    return True


@functools.cache
def _vllm_image() -> Any:
    """vLLM's functions on pictures."""
    with _quiet_logs():
        from vllm.multimodal import image
    return image


@functools.cache
def _vllm_reader() -> Any:
    """What vLLM reads the pictures of requests with."""
    with _quiet_logs():
        from vllm.multimodal.media.image import ImageMediaIO
    return ImageMediaIO()


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """What vLLM logs about its build when it is imported is no part of a command's output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
