"""Picture files of every mode, format and oddity that people have, from one random source."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageOps

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
# What Pillow raises while it turns a picture by EXIF data that it then cannot write back.
TURNING_ERRORS = (TypeError, struct.error, AttributeError, ValueError)
_ORIENTATION = 0x0112
_TAGS = (
    0x010E,
    0x010F,
    0x011A,
    0x0128,
    0x0131,
    0x0132,
    0x8769,
    0x8825,
    0x829A,
    0x02BC,
    0x0213,
    0x014A,
    0x927C,
)
_TYPES = (*range(1, 14), 16, 0, 99)


def picture(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    """Random pixels of a mode, taller or wider than broad, with an alpha channel where the mode has one."""
    width, height = (int(side) for side in rng.choice(np.arange(20, 60), 2, replace=False))
    if mode in ("I", "F", "I;16"):
        values = rng.integers(0, 2**16, (height, width))
        return Image.fromarray(values.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    colours = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode == "RGBA":
        return colours
    if mode in ("LA", "PA"):
        made = Image.new(mode, (width, height))
        made.putdata([(int(a), int(b)) for a, b in rng.integers(0, 256, (width * height, 2))])
        if mode == "PA":
            made.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        return made
    return colours.convert("RGB").convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file of Pillow's format ``kind``."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_every_mode(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Files by name: every mode in formats that know many, as they are or in a mode that holds them."""
    for kind in ("PNG", "TIFF", "WEBP"):
        for mode in MODES:
            with contextlib.suppress(OSError, ValueError, KeyError):
                yield f"{kind} {mode}", saved(picture(rng, mode), kind)


def in_every_format(rng: np.random.Generator, formats: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Files by name: of those formats all that Pillow writes, each in a random mode of those it takes."""
    Image.init()
    for kind in sorted(set(formats) & set(Image.SAVE)):
        for mode in rng.permutation(MODES):
            try:
                yield f"{kind} {mode}", saved(picture(rng, str(mode)), kind)
            except (OSError, ValueError, KeyError, AttributeError):
                continue  # The format knows no such mode.
            break


def oriented(rng: np.random.Generator, value: object, kind: str = "JPEG") -> bytes:
    """A file with an EXIF orientation of any value that EXIF can hold."""
    image = picture(rng)
    exif = image.getexif()
    exif[_ORIENTATION] = value
    return saved(image, kind, exif=exif)


def with_exif(rng: np.random.Generator, exif: bytes) -> bytes:
    """A JPEG file with a block of EXIF data, right or wrong."""
    return saved(picture(rng), "JPEG", exif=exif)


def rational_orientation() -> bytes:
    """EXIF data whose only entry is the orientation 6 / 1."""
    return exif_block(5, 1, struct.pack("<I", 26)) + struct.pack("<II", 6, 1)


def exif_block(kind: int, count: int, value: bytes) -> bytes:
    """EXIF data whose only entry is an orientation of a TIFF type, up to 4 bytes long."""
    entry = struct.pack("<HHI", _ORIENTATION, kind, count) + value.ljust(4, b"\0")
    return _block([entry])


def random_exif(rng: np.random.Generator) -> bytes:
    """EXIF data that turns the picture, with some other entries of random types, lengths and values."""
    entries = [struct.pack("<HHIHH", _ORIENTATION, 3, 1, int(rng.choice([2, 3, 6, 8])), 0)]
    for tag in rng.choice(_TAGS, int(rng.integers(1, 5)), replace=False):
        count = int(rng.choice([0, 1, 1, 1, 2, 3, 70000]))
        value = np.where(rng.random(4) < 0.3, rng.integers(0, 256, 4), rng.choice([0, 8, 0, 0], 4))
        entries.append(struct.pack("<HHI", int(tag), int(rng.choice(_TYPES)), count) + bytes(value.tolist()))
    return _block(entries) + rng.integers(0, 256, 40, dtype=np.uint8).tobytes()


def turning_fails(rng: np.random.Generator, of_each: int = 2) -> Iterator[tuple[str, bytes]]:
    """Files that Pillow cannot turn, for each of the kinds of errors it raises then."""
    wanted = {error: of_each for error in TURNING_ERRORS}
    while wanted:
        data = with_exif(rng, random_exif(rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
                continue
            except Image.UnidentifiedImageError:
                continue
            except Exception as error:  # Some kinds are too rare to wait for.
                kind = next((known for known in TURNING_ERRORS if isinstance(error, known)), type(error))
        if kind not in wanted:
            continue
        yield f"{kind.__name__} {wanted[kind]}", data
        wanted[kind] -= 1
        if not wanted[kind]:
            del wanted[kind]


def with_transparency(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Files in which a colour, an entry of the palette or each of its entries is transparent."""
    yield "P one", saved(picture(rng, "P"), "PNG", transparency=3)
    yield "P each", saved(picture(rng, "P"), "PNG", transparency=bytes(range(256)))
    yield "GIF", saved(picture(rng, "P"), "GIF", transparency=3)
    grey = picture(rng, "L")
    yield "L", saved(grey, "PNG", transparency=grey.getpixel((3, 3)))
    colour = picture(rng)
    yield "RGB", saved(colour, "PNG", transparency=colour.getpixel((3, 3)))
    yield "1", saved(picture(rng, "1"), "PNG", transparency=0)


def moving(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Files of several frames."""
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        frames = [Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)) for _ in range(3)]
        yield kind, saved(frames[0], kind, save_all=True, append_images=frames[1:])
    frames = [Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)) for _ in range(2)]
    yield "MPO", saved(frames[0], "MPO", save_all=True, append_images=frames[1:])


def _block(entries: list[bytes]) -> bytes:
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + struct.pack("<I", 0)
