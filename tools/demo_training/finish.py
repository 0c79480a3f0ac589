"""What follows the last stage: a checkpoint, and its accuracy by task."""

from __future__ import annotations

import json

from tools.demo_training.export import export
from tools.demo_training.measure import report
from tools.demo_training.state import StateFolder

_PICTURES, _BLANK_PICTURES = 400, 100


def finish(folder: StateFolder) -> None:
    """Write ``checkpoint`` and ``accuracy.json`` into the state's folder and the shares into the log."""
    checkpoint = export(folder, folder.path / "checkpoint")
    folder.log(f"exported {checkpoint}")
    shares = report(checkpoint, _PICTURES, _BLANK_PICTURES)
    (folder.path / "accuracy.json").write_text(json.dumps(shares, indent=2) + "\n")
    for kind, tasks in shares.items():
        folder.log(kind + " " + " ".join(f"{task} {100 * of['share']:.1f}" for task, of in tasks.items()))
