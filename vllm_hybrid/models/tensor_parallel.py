"""Sums over tensor-parallel ranks that every rank may decide by."""

from __future__ import annotations

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather


def sum_over_ranks(part: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' parts, equal to the last bit on every rank.

    An all-reduce does not promise that: vLLM's on CPUs has every rank begin with its own part, which from
    three ranks on rounds differently. A merge or a prune that two ranks decide differently leaves them
    with other rows, so the parts are gathered and added in the order of the ranks.
    """
    if get_tensor_model_parallel_world_size() == 1:
        return part
    return tensor_model_parallel_all_gather(part[None], dim=0).sum(dim=0)
