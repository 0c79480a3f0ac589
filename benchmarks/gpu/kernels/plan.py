"""Which scenes the kernels are checked and timed on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.kernels.scenes import Heads, SceneShape

BF16, FLOAT32 = torch.bfloat16, torch.float32
SEVEN_B = Heads(32, 32, 128)
GROUPED = Heads(32, 8, 128)
# Those of the checkpoints that checks/run.py serves.
SMALL = Heads(4, 2, 64)
LIVES = (90, 195, 394)
# A KV row's offset no longer fits in 32 bits: in bytes, and in numbers of two bytes.
BEHIND_BYTES = (1 << 31) + (1 << 20)
BEHIND_NUMBERS = (1 << 32) + (1 << 20)


@dataclass(frozen=True)
class Checked:
    """A scene to check.

    Attributes:
        shape: the scene's.
        dtype: of pages and queries.
        bytes_before: bytes of others' pages before the scene's.

    """

    shape: SceneShape
    dtype: torch.dtype = BF16
    bytes_before: int = 0


def checked_scenes(tiny: bool) -> dict[str, Checked]:
    """Scenes to check, by name."""
    if tiny:
        prompts = SceneShape(2, 7, 24, 9, Heads(2, 2, 32), decodes=False)
        decodes = replace(prompts, decodes=True)
        grouped = Heads(4, 2, 32)
        return {
            "prefill": Checked(prompts, FLOAT32),
            "prefill, kept rows": Checked(replace(prompts, kept=3, heads=grouped), FLOAT32),
            "decode": Checked(decodes, FLOAT32),
            "decode, grouped heads, padded, behind others' pages": Checked(
                replace(decodes, requests=3, padding=1, heads=grouped), FLOAT32, 1 << 16
            ),
        }
    prompts = SceneShape(2, 90, 576, 60, SEVEN_B, decodes=False)
    decodes = replace(prompts, requests=5, decodes=True)
    found = {}
    for step, shape in (("prefill", prompts), ("decode", decodes)):
        for live in (1, *LIVES, 576):
            found[f"{step}, {live} live"] = Checked(replace(shape, live=live))
        found |= {
            f"{step}, kept rows": Checked(replace(shape, live=195, kept=98)),
            f"{step}, grouped heads": Checked(replace(shape, heads=GROUPED)),
            f"{step}, float32": Checked(shape, FLOAT32),
            f"{step}, small heads, float32": Checked(replace(shape, heads=SMALL), FLOAT32),
            f"{step}, small heads": Checked(replace(shape, heads=SMALL)),
            f"{step}, behind 2^31 bytes": Checked(shape, bytes_before=BEHIND_BYTES),
            f"{step}, behind 2^31 numbers": Checked(shape, bytes_before=BEHIND_NUMBERS),
        }
    found["decode, padded"] = Checked(replace(decodes, requests=3, padding=1))
    found["decode, padded, grouped heads"] = Checked(replace(decodes, requests=5, padding=3, heads=GROUPED))
    return found


def timed_scenes(tiny: bool) -> dict[str, SceneShape]:
    """Scenes to time, by name: the shape served, in bf16."""
    if tiny:
        shape = SceneShape(2, 7, 24, 9, Heads(2, 2, 32), decodes=False)
        return {"prefill, 2 x 7 live": shape, "decode, 2 x 7 live": replace(shape, decodes=True)}
    return {
        f"{step}, {requests} x {live} live": SceneShape(requests, live, 576, 60, SEVEN_B, step == "decode")
        for step, counts in (("prefill", (1, 16)), ("decode", (1, 16, 64)))
        for requests in counts
        for live in LIVES
    }


# Small, because a sanitizer slows every access down.
SANITIZED = (
    SceneShape(2, 7, 24, 9, SMALL, decodes=False),
    SceneShape(2, 7, 24, 9, SMALL, decodes=False, kept=3),
    SceneShape(3, 7, 24, 9, SMALL, decodes=True, padding=1),
)
