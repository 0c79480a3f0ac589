"""Live tokens of the demo model's levels on pictures that calibration has not seen; busier ones get more.

python benchmarks/calibration.py llava-hybrid
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_hybrid.checkpoint.llava import load_tower  # noqa: E402
from vllm_hybrid.demo.model import LEVELS, write_scenes  # noqa: E402
from vllm_hybrid.tools.calibrate import live_counts  # noqa: E402

# Scenes of a series that neither training nor calibration draws from.
UNSEEN_SERIES = 5


def busyness(file: Path) -> float:
    """Bytes of the picture as a JPEG: what it holds, by a measure that knows no tower."""
    buffer = io.BytesIO()
    with Image.open(file) as picture:
        picture.save(buffer, "JPEG")
    return float(buffer.tell())


def rank_correlation(first: list[float], second: list[int]) -> float:
    """Spearman's rank correlation, from -1 to 1; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: list[float] | list[int]) -> np.ndarray:
    array = np.array(values, float)
    below = (array[None] < array[:, None]).sum(1)
    equal = (array[None] == array[:, None]).sum(1)
    return below + (equal - 1) / 2


def unseen_counts(checkpoint: Path, pictures: int) -> tuple[dict[str, list[int]], list[float]]:
    """Live tokens of each level and busyness of so many unseen scenes."""
    levels = json.loads((checkpoint / "config.json").read_text())["hybrid"]["levels"]
    tower, image_processor = load_tower(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        files = write_scenes(Path(folder), UNSEEN_SERIES, pictures)
        counts = {
            level: live_counts(tower, image_processor, files, levels[level]["thresholds"], batch_size=8)
            for level in LEVELS
        }
        return counts, [busyness(file) for file in files]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    options = parser.parse_args()
    counts, busy = unseen_counts(options.checkpoint, options.pictures)
    print("| level | wanted | average | fewest | most | rank correlation with JPEG bytes |")
    print("|---|---|---|---|---|---|")
    for level, live in counts.items():
        mean = sum(live) / len(live)
        print(
            f"| {level} | {LEVELS[level]} | {mean:.1f} | {min(live)} | {max(live)} | "
            f"{rank_correlation(busy, live):.2f} |"
        )


if __name__ == "__main__":
    main()
