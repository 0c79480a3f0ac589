"""Answers of a tiny hybrid engine on this machine's device against the tests' reference, in float32."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Matrix products in full float32, so that merges and prunes fall as the reference's do.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Rounding differs between a GPU's sums and the reference's; a wrong key or position is off by far more.
TOLERANCE = 5e-3
PICTURES = 4
TOKENS = 8


def main() -> None:
    import torch

    from tests import engines

    section = engines.hybrid_section("both")
    # The bundle leaves FlashAttention out.
    options: dict[str, Any] = {"mm_encoder_attn_backend": "TORCH_SDPA"} if torch.version.cuda else {}
    served = engines.serve(section, **options)
    asks = [served.decided(image) for image in engines.images(PICTURES)]
    outputs = served.generate(asks, TOKENS)
    try:
        worst, agrees = served.check(asks, outputs, TOLERANCE), True
    except AssertionError as error:
        print(error, file=sys.stderr)
        worst, agrees = served.check(asks, outputs, float("inf")), False
    message = {"worst": worst, "tolerance": TOLERANCE, "agrees": agrees, "requests": len(asks)}
    print("CELL " + json.dumps({"check": message}), flush=True)


if __name__ == "__main__":
    main()
