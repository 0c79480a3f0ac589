"""What local_captions.yaml asks lmms-eval to call."""

from __future__ import annotations

import ast
import base64
import io
from typing import Any

from PIL import Image


def pictures(row: dict[str, Any]) -> list[Image.Image]:
    """The row's picture."""
    return [Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")]


def keep(row: dict[str, Any], answers: list[str]) -> dict[str, tuple[str, list[str]]]:
    """The answer and the references, for the score over all rows."""
    return {"CIDEr": (answers[0].strip(), ast.literal_eval(row["answer"]))}


def cider(kept: list[tuple[str, list[str]]]) -> float:
    """CIDEr of all rows, times 100, of captions split at spaces as `vllm-hybrid eval` does."""
    from pycocoevalcap.cider.cider import Cider

    right = {str(at): texts for at, (_, texts) in enumerate(kept)}
    given = {str(at): [answer] for at, (answer, _) in enumerate(kept)}
    return 100 * float(Cider().compute_score(right, given)[0])
