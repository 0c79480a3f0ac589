"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, made once; tests must not write into it."""
    from vllm_hybrid.demo_model import write_demo_model

    return write_demo_model(tmp_path_factory.mktemp("demo") / "llava-hybrid")
