"""What serves the tower's proportional attention on CUDA: operations, bytes and rounding of the choices.

    python -m benchmarks.gpu.kernels.tower_attention

prints the tables of docs/kernels.md. All of it is counted; nothing is measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402

from benchmarks.gpu.prediction.cost_model import Reduction, Shape, tower_tokens  # noqa: E402

IMAGES = 25
MEAN_LIVE, MOST_LIVE = 90, 189
# Channels in memory are a multiple of 8; FlashAttention computes head sizes over 64 as 96.
WIDENED, COMPUTED = 72, 96
# A token's size, from which our kernel takes the bias.
SIZE_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Of one way to attend, over all layers and images: operations, bytes moved, bytes of the bias."""

    name: str
    flops: float
    bytes: float
    bias_bytes: float


def costs(shape: Shape) -> list[Cost]:
    """The choices for IMAGES pictures whose lengths fall to MEAN_LIVE tokens on average, MOST_LIVE at most.

    Args:
        shape: the model; its numbers are of 2 bytes.

    Returns:
        One entry per choice. Bytes are queries, keys, values and the result, and every copy of them that
        padding or widening takes.

    """
    packed = [attended for attended, _ in tower_tokens(shape, Reduction(MEAN_LIVE))]
    padded = [attended for attended, _ in tower_tokens(shape, Reduction(MOST_LIVE))]
    rows, padded_rows = IMAGES * sum(packed), IMAGES * sum(padded)
    row_bytes = shape.vision_width * shape.number_bytes

    def flops(lengths: list[float]) -> float:
        return IMAGES * sum(4 * n * n * shape.vision_width for n in lengths)

    head_size = shape.vision_width // shape.vision_heads
    wide = WIDENED / head_size
    # Three tensors are zeroed, their rows read and written, the padded tensors attended, the rows taken back.
    pad_moves = 3 * padded_rows + 6 * rows + 4 * padded_rows + 2 * rows
    # Three tensors are read and written wider, attended, and the result is narrowed.
    widen_moves = (3 + 3 * wide + 4 * wide + wide + 1) * rows
    return [
        Cost(
            "torch, padded to the longest, bias",
            flops(padded),
            pad_moves * row_bytes,
            padded_rows * shape.number_bytes,
        ),
        Cost(
            "block-diagonal, sizes in float32 (Triton)",
            flops(packed),
            4 * rows * row_bytes,
            rows * SIZE_BYTES,
        ),
        Cost(
            "block-diagonal, log(size) in channels",
            flops(packed) * COMPUTED / head_size,
            widen_moves * row_bytes,
            0.0,
        ),
    ]


def bias_error(dtype: torch.dtype, pieces: int, shape: Shape) -> float:
    """Greatest error of log(size) as a sum of pieces of a dtype, over all sizes a token can have.

    Args:
        dtype: of queries and keys.
        pieces: channels that the number is split over, each the rounding of what those before left.
        shape: the model.

    """
    head_size = shape.vision_width // shape.vision_heads
    wanted = torch.arange(1, shape.patches + 1, dtype=torch.float64).log()
    # Keys hold log(size) / scale, the scale being one over the root of the head size.
    left = (wanted * head_size**0.5).float().double()
    total = torch.zeros_like(left)
    for _ in range(pieces):
        piece = left.to(dtype).double()
        total, left = total + piece, left - piece
    return float((total / head_size**0.5 - wanted).abs().max())


def cost_table(shape: Shape) -> str:
    """Markdown of :func:`costs`."""
    lines = ["| attention of the tower | TFLOP | GB | bias, MB |", "|---|--:|--:|--:|"]
    lines += [
        f"| {cost.name} | {cost.flops / 1e12:.2f} | {cost.bytes / 1e9:.1f} | {cost.bias_bytes / 1e6:.1f} |"
        for cost in costs(shape)
    ]
    return "\n".join(lines)


def error_table(shape: Shape) -> str:
    """Markdown of :func:`bias_error`."""
    lines = ["| log(size) off by at most, in | 1 piece | 2 | 3 |", "|---|--:|--:|--:|"]
    for dtype in (torch.bfloat16, torch.float16):
        errors = (f"{bias_error(dtype, pieces, shape):.1e}" for pieces in (1, 2, 3))
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {' | '.join(errors)} |")
    return "\n".join(lines)


def main() -> None:
    print(f"{cost_table(Shape())}\n\n{error_table(Shape())}")


if __name__ == "__main__":
    main()
