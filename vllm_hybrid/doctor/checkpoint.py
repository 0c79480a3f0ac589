"""Check of a checkpoint: that it is whole, of a model that is served, and what it switches on."""

from __future__ import annotations

from pathlib import Path

from vllm_hybrid.doctor import fresh
from vllm_hybrid.doctor.finding import Finding

_LOOK = """
from vllm_hybrid.doctor.checkpoint import look_at
found(look_at(sys.argv[1]))
"""


def check_checkpoint(folder: Path) -> list[Finding]:
    """What serving a folder would refuse about it."""
    ran = fresh.run(_LOOK, str(folder))
    if ran.result is None:
        return [
            Finding(
                "checkpoint", str(folder), f"cannot be looked at ({ran.error})", "close the gaps above first"
            )
        ]
    says, whole = ran.result
    return [Finding("checkpoint", f"{folder}, {says}") if whole else Finding("checkpoint", str(folder), says)]


def look_at(folder: str) -> tuple[str, bool]:
    """What a checkpoint switches on, or what is wrong with it, and which of the two it is.

    Args:
        folder: its path.

    """
    from vllm_hybrid.checkpoint import llava
    from vllm_hybrid.errors import one_line

    try:
        config = llava.check_checkpoint(folder)
        hybrid = llava.parse_hybrid(getattr(config, "hybrid", None), config)
    except (ValueError, OSError) as error:
        return one_line(error), False
    return hybrid.in_words(), True
