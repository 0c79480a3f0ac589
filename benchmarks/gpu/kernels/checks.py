"""Whether the kernels' results on a scene are right: against plain torch, and in a second run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.kernels.calls import poisoned_memory, results
from benchmarks.gpu.kernels.scenes import SceneShape, make_scene, reference_results
from benchmarks.gpu.kernels.tower_scenes import (
    TowerShape,
    kernel_results,
    make_tower_scene,
    tower_reference,
)
from vllm_hybrid.attention.gpu_tower import GpuTower


@dataclass(frozen=True)
class Bound:
    """Error allowed against float32 on the CPU.

    Attributes:
        overall: ||difference|| / ||wanted||.
        row: the same of the worst row.

    """

    overall: float
    row: float


# In bf16 the operands of a product are rounded, and so are copies and answers: doing that in plain torch
# moves the answers of these scenes by 0.0018 to 0.0026, the worst row by up to 0.0038. A key that is left out
# moves them by some 0.01. Importance is computed in float32 whatever the pages hold. In the tower rounding
# moves answers by 0.0017 (0.0026), features behind four merges by 0.0025 (0.0036); a member that is left out
# of a mean of n moves that row by one in the root of n. Which tokens there are is no matter of rounding.
EXACT = {torch.bfloat16: Bound(0, 0), torch.float32: Bound(0, 0)}
BOUNDS = {
    "attend": {torch.bfloat16: Bound(5e-3, 1e-2), torch.float32: Bound(1e-5, 5e-5)},
    "importance": {torch.bfloat16: Bound(1e-5, 1e-4), torch.float32: Bound(1e-5, 1e-4)},
    "hidden": {torch.bfloat16: Bound(5e-3, 1e-2), torch.float32: Bound(1e-5, 5e-5)},
    "sizes": EXACT,
    "bounds": EXACT,
    "owners": EXACT,
}


def errors(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """How far a result is off.

    Args:
        got: [rows, ...], any device and dtype.
        wanted: the same shape, on the CPU.

    Returns:
        ||got - wanted|| / ||wanted|| of all of it and of the worst row; infinite where a number is missing,
        and of a row that should be 0 and is not.

    """
    found, wanted = got.float().cpu(), wanted.float()
    difference, size = (
        x.flatten(1).norm(dim=1) if x.dim() > 1 else x.abs() for x in (found - wanted, wanted)
    )
    if not bool(torch.isfinite(difference).all()):
        return float("inf"), float("inf")
    off = torch.where(difference == 0, 0.0, difference / size)
    return float(difference.norm() / wanted.norm()), float(off.max())


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two results are the same to the last bit."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def check(
    shape: SceneShape,
    seed: int,
    device: str,
    dtype: torch.dtype,
    bytes_before: int = 0,
    poisoned: bool = True,
) -> dict[str, Any]:
    """Run the kernels on a scene twice, on memory that holds no numbers, and compare.

    Args:
        shape: the scene's.
        seed: of its random numbers.
        device: where the kernels run.
        dtype: of pages and queries.
        bytes_before: bytes of others' pages before the scene's.
        poisoned: False leaves memory as it is allocated, for a tool that knows what was written.

    Returns:
        ``errors`` and ``row_errors`` by result, ``bits``, and ``agrees`` by aspect.

    """
    # Both sides start from the numbers that the dtype holds.
    scene = make_scene(shape, seed).to("cpu", dtype).to("cpu", torch.float32)
    wanted = reference_results(scene)
    scene = scene.to(device, dtype)
    if bytes_before:
        scene = scene.moved_behind(bytes_before)
    with poisoned_memory() if poisoned else contextlib.nullcontext():
        got, again = results(scene), results(scene)
    return verdict(got, again, wanted, dtype) | {
        "page_bytes": scene.kv_rows.numel() * scene.kv_rows.element_size(),
        "page_numbers": scene.kv_rows.numel(),
        "seed": seed,
    }


def check_tower(
    shape: TowerShape, seed: int, device: str, dtype: torch.dtype, poisoned: bool = True
) -> dict[str, Any]:
    """As :func:`check`, of the kernels of the tower.

    Args:
        shape: the scene's.
        seed: of its random numbers.
        device: where the kernels run.
        dtype: of features, queries, keys and values.
        poisoned: False leaves memory as it is allocated, for a tool that knows what was written.

    """
    scene, tower = make_tower_scene(shape, seed, dtype), GpuTower()
    wanted = tower_reference(scene)
    scene = scene.to(device, dtype)
    with poisoned_memory() if poisoned else contextlib.nullcontext():
        got, again = kernel_results(scene, tower), kernel_results(scene, tower)
    return verdict(got, again, wanted, dtype) | {"seed": seed}


def verdict(
    got: dict[str, torch.Tensor],
    again: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What two runs on a scene amount to; see :func:`check`."""
    off = {name: errors(got[name], wanted[name]) for name in wanted}
    agrees = {}
    for name, (overall, row) in off.items():
        bound = BOUNDS[name][dtype]
        agrees[name] = overall <= bound.overall and row <= bound.row
    agrees["bits"] = all(same_bits(got[name], again[name]) for name in wanted)
    return {
        "errors": {name: overall for name, (overall, _) in off.items()},
        "row_errors": {name: row for name, (_, row) in off.items()},
        "agrees": agrees,
    }
