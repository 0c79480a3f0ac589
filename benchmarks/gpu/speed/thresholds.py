"""Thresholds for the benchmark's tower, found beforehand and kept in `thresholds.json`.

    python -m benchmarks.gpu.speed.thresholds

calibrates them anew, in float32 on the CPU (about an hour on two busy cores), so that none of a GPU's time
goes into it. They hold for one tower only: the file keeps a value of every weight, and a torch that draws
other random numbers from the same seed is noticed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

FILE = Path(__file__).with_name("thresholds.json")
LIVES = (90, 195, 394)
# Processors without AVX2 draw the same numbers but for their last bits.
SAME = 1e-6


def fingerprint(tower: nn.Module) -> list[float]:
    """One value of every weight of a tower, the middle one, in the order of its state dict."""
    return [round(float(w.flatten()[w.numel() // 2]), 8) for w in tower.state_dict().values()]


def same_tower(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints are those of one tower but for rounding."""
    return len(first) == len(second) and all(abs(a - b) <= SAME for a, b in zip(first, second, strict=True))


def shape_of(vision_config: Any) -> dict[str, int]:
    """What tells one size of tower from another."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    return {name: int(getattr(vision_config, name)) for name in names}


def known_for(vision_config: Any, pictures: int) -> dict[str, Any] | None:
    """The file's content where it was made for a tower of this size and this number of pictures.

    Args:
        vision_config: of the tower.
        pictures: calibration pictures.

    Returns:
        ``fingerprint``, and ``found``: by wanted average of live tokens ``thresholds`` and ``counts``. None
        for another size or number of pictures, or where there is no file.

    """
    if not FILE.exists():
        return None
    content: dict[str, Any] = json.loads(FILE.read_text())
    if content["shape"] != shape_of(vision_config) or content["pictures"] != pictures:
        return None
    return content


def main() -> None:
    # The model looks its thresholds up here.
    from benchmarks.gpu.speed import model

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--size", choices=sorted(model.SIZES), default="7b")
    parser.add_argument("--lives", type=int, nargs="+", default=LIVES)
    parser.add_argument("--pictures", type=int, default=model.CALIBRATION_PICTURES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model.write_folder(Path(scratch) / "model", model.SIZES[args.size])
        vision = model.config(model.SIZES[args.size]).vision_config
        tower = model.seeded_tower(vision)
        found = {}
        for live in args.lives:
            found[str(live)] = model.calibrated(tower, folder, live, args.pictures)
            print(f"{live}: {sum(found[str(live)]['counts']) / args.pictures:.1f} on average", flush=True)
    content = {
        "command": "python -m benchmarks.gpu.speed.thresholds",
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
        "dtype": "float32",
        "shape": shape_of(vision),
        "pictures": args.pictures,
        "found": found,
        "fingerprint": fingerprint(tower),
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
