"""Distributions that are said to be installed, as far as the check of vLLM's version looks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError

import pytest

from vllm_hybrid.startup import versions


def pretend_installed(monkeypatch: pytest.MonkeyPatch, installed: Mapping[str, str]) -> None:
    """Have :mod:`vllm_hybrid.startup.versions` find these versions by name, and no others."""

    def lookup(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "version", lookup)
