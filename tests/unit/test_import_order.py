"""Folders of the package import each other in one direction, as docs/design.md lists them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "vllm_hybrid"
# Each may import itself and those before it. A module of the package's own folder goes by its name.
ORDER = (
    "errors",
    "files",
    "levels",
    "config",
    "environment",
    "method",
    "kv",
    "attention",
    "checkpoint",
    "startup",
    "frontend",
    "models",
    "engine",
    "registration",
    "doctor",
    "tools",
    "evaluation",
    "demo",
    "cli",
)
# What is plain tensor code imports no vLLM.
WITHOUT_VLLM = (
    *("errors", "files", "levels", "config", "environment", "method", "kv/page_facts", "doctor"),
    *("attention/interface", "attention/reference", "attention/cpu.py", "attention/cpu_build"),
    *("attention/gpu", "attention/triton_kernels"),
    *("models/encoder_output", "models/picture_shares"),
)
# The tools beside the server need nothing that only a server loads.
SERVER = ("attention", "frontend", "models", "engine", "registration")
BESIDE = ("doctor", "tools", "evaluation", "demo")


def imported(module: ast.Module) -> Iterator[str]:
    """Full names of what a module imports anywhere, names and modules alike."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a line says where a name lives"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, set[str]]:
    """What each file of the package imports, by its path inside the package."""
    return {
        file.relative_to(PACKAGE).as_posix(): set(imported(ast.parse(file.read_text())))
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def layers(names: set[str]) -> set[str]:
    """First parts, inside the package, of those names that belong to it; the version is nobody's."""
    own = {name.split(".")[1] for name in names if name.startswith("vllm_hybrid.")}
    return own - {"__version__"}


@pytest.mark.parametrize("file", [name for name in imports() if name != "__init__.py"])
def test_imports_go_down_the_list(file: str) -> None:
    layer = file.split("/")[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(layer) + 1])
    assert layers(imports()[file]) <= allowed


def test_plain_tensor_code_imports_no_vllm() -> None:
    plain = {file: names for file, names in imports().items() if file.startswith(WITHOUT_VLLM)}
    assert len(plain) > 15
    assert not {f: n for f, names in plain.items() for n in names if n == "vllm" or n.startswith("vllm.")}


def test_tools_do_without_the_server() -> None:
    for file, names in imports().items():
        if file.startswith(tuple(f"{folder}/" for folder in BESIDE)):
            assert not layers(names) & set(SERVER), file


def test_only_the_choice_of_an_implementation_imports_the_reference() -> None:
    importers = {file for file, names in imports().items() if any("attention.reference" in n for n in names)}
    assert importers == {"attention/select.py"}
