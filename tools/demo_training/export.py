"""The trained model as a checkpoint in the hub's LLaVA-1.5 format, as vllm-hybrid demo-model writes them."""

from __future__ import annotations

from pathlib import Path

from tools.demo_training.curriculum import Student
from tools.demo_training.network import hub_weights
from tools.demo_training.state import StateFolder
from vllm_hybrid.demo.model import Weights, write_demo_model


def trained_weights(folder: StateFolder) -> Weights:
    """The weights that training saved last, by the hub's names, float32.

    Raises:
        ValueError: training has saved nothing there.

    """
    state = folder.load()
    if state is None or "student" not in state:
        raise ValueError(f"{folder.path} holds no state of training; give the folder of --state")
    student = Student(state["seed"])
    student.load_state_dict(state["student"])
    return hub_weights(student.model)


def export(folder: StateFolder, out: Path) -> Path:
    """Write the checkpoint with processor, tokenizer and thresholds; a checkpoint there is replaced."""
    weights = trained_weights(folder)
    return write_demo_model(out, force=True, weights=lambda: weights)
