"""Every kernel compiles for every architecture within bounds on registers, spills and shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.support.kernel_builds import (
    ARCHITECTURES,
    BRIEF,
    FP8_ARCHITECTURES,
    FULL,
    SHAPES,
    TOWER,
    Build,
    launched_kernels,
    table,
)
from tests.support.paths import ROOT


def has_ptxas() -> bool:
    """Whether Triton is installed with its NVIDIA backend; Triton itself is not imported."""
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "backends" / "nvidia" / "bin" / "ptxas").exists() for folder in folders or ())


pytestmark = [
    pytest.mark.skipif(not has_ptxas(), reason="Triton and its NVIDIA backend are not installed"),
    pytest.mark.slow,
]

# Most registers per thread. They leave room for four blocks of decode on a multiprocessor, whichever of
# Triton 3.6.0, 3.7.1 and 3.9.0 compiles. One block reads one request: there, nothing else wants the room.
MOST_REGISTERS = {
    "combine": 48,
    "decode": 128,
    "dense": 248,
    "expand_keys": 168,
    "expand_queries": 128,
    "join": 56,
    "key_index": 255,
    "log_sum": 128,
    "match": 104,
    "mean": 40,
    "metric": 40,
    "owners": 32,
    "plan": 160,
    "probabilities": 128,
    "sum": 32,
    "tower_attention": 176,
    "write": 40,
}
# Four where nothing is said. sm_120 has the least shared memory.
FEWEST_BLOCKS = {"dense": 1, "expand_keys": 3, "key_index": 1, "plan": 3, "tower_attention": 1}
# Bytes of a block; a multiprocessor of sm_80 grants 163 KiB to one, of sm_90 and sm_100 227, of sm_120 99.
MOST_SHARED = {
    "combine": 8192,
    "decode": 8192,
    "dense": 69632,
    "expand_keys": 8192,
    "join": 4096,
    "match": 16384,
    "metric": 8192,
    "tower_attention": 65536,
}
# Bytes that threads move to memory and back; sm_100 has a library for what this kernel does.
MOST_SPILLED = {("dense", 100): 16}
ATTENTION = {"decode", "dense", "log_sum", "probabilities"}
READING_PAGES = {"decode", "expand_keys", "log_sum", "probabilities"}
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.fixture(scope="module")
def page() -> tuple[str, str]:
    """The version of Triton that the page about kernels has a table of, and the table."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    found = re.search(r"^Triton ([\d.]+), .*:\n\n((?:\|.*\n)+)", text, re.M)
    assert found
    return found[1], found[2].strip()


@pytest.fixture(scope="module")
def dtypes(page: tuple[str, str]) -> dict[int, tuple[torch.dtype, ...]]:
    """Those compiled for an architecture: all with the page's Triton, otherwise few, for it takes minutes."""
    return FULL if version("triton") == page[0] else BRIEF


@pytest.fixture(scope="module")
def builds(dtypes: dict[int, tuple[torch.dtype, ...]]) -> list[Build]:
    """Variants, compiled in a process where nothing interprets or stands in for Triton's backends."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    brief = ["--brief"] if dtypes is BRIEF else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_builds", "--json", *brief],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Build(**row) for row in json.loads(done.stdout)]
    print("\n" + table(found))
    return found


def test_every_kernel_is_compiled_for_every_architecture(builds: list[Build]) -> None:
    wanted = {name.removeprefix("_") for name in launched_kernels()}
    assert wanted == set(MOST_REGISTERS)
    for architecture in ARCHITECTURES:
        assert {one.kernel for one in builds if one.architecture == architecture} == wanted


def test_attention_is_compiled_for_every_shape_and_dtype(
    builds: list[Build], dtypes: dict[int, tuple[torch.dtype, ...]]
) -> None:
    names = {sm: [str(dtype).removeprefix("torch.") for dtype in these] for sm, these in dtypes.items()}
    wanted = {(sm, shape.name, name) for sm in ARCHITECTURES for shape in SHAPES for name in names[sm]}
    for kernel in ATTENTION:
        built = {(b.architecture, b.heads, b.dtype) for b in builds if b.kernel == kernel}
        assert wanted <= built
    fp8 = {(a, s.name) for a in FP8_ARCHITECTURES for s in SHAPES}
    for kernel in READING_PAGES:
        assert {
            (b.architecture, b.heads) for b in builds if b.kernel == kernel and "float8" in b.dtype
        } == fp8


def test_nothing_spills(builds: list[Build]) -> None:
    for one in builds:
        assert one.spilled <= MOST_SPILLED.get((one.kernel, one.architecture), 0), one
        assert one.stack <= MOST_SPILLED.get((one.kernel, one.architecture), 0), one


def test_registers_and_shared_memory_are_bounded(builds: list[Build]) -> None:
    for one in builds:
        assert 0 < one.registers <= MOST_REGISTERS[one.kernel], one
        assert one.shared <= MOST_SHARED.get(one.kernel, 1024), one
        assert one.blocks >= FEWEST_BLOCKS.get(one.kernel, 4), one


def test_dense_attention_multiplies_on_tensor_cores(builds: list[Build]) -> None:
    for one in builds:
        # Elsewhere a single query is a matrix of one row: no tensor core is of use.
        wanted = MATRIX_INSTRUCTION[one.architecture] if one.kernel in ("dense", "tower_attention") else ""
        assert one.products == wanted, one


def test_the_tower_reads_features_16_bytes_at_a_time(builds: list[Build]) -> None:
    features = [one for one in builds if one.kernel in ("tower_attention", "metric", "join")]
    assert {one.heads for one in features} == {TOWER.name}
    assert [one for one in features if one.widest_load != 16] == []


def test_pages_are_read_16_bytes_at_a_time(builds: list[Build]) -> None:
    assert [one for one in builds if one.kernel in ATTENTION | READING_PAGES and one.widest_load != 16] == []


def test_the_page_about_kernels_has_a_row_for_each(builds: list[Build], page: tuple[str, str]) -> None:
    compiled = table(builds)
    if version("triton") == page[0]:
        assert page[1] == compiled
    # Another Triton needs other registers, but has the same kernels, heads, architectures and warps.
    rows = [[line.split(" | ")[:4] for line in lines.splitlines()] for lines in (page[1], compiled)]
    assert rows[0] == rows[1]
