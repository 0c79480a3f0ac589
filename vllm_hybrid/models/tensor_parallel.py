"""What tensor-parallel ranks exchange: sums that every rank may decide by, and shares of pictures."""

from __future__ import annotations

import torch
from vllm.config.multimodal import MultiModalConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from vllm_hybrid.models.picture_shares import Ranks


def gather_from_ranks(part: torch.Tensor) -> torch.Tensor:
    """[ranks, ...] of tensors [...] that have one shape on all ranks, in the order of the ranks.

    Of floating-point tensors: on CPUs vLLM's gather through shared memory takes no others.
    """
    return tensor_model_parallel_all_gather(part[None], dim=0)


def sum_over_ranks(part: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' parts, equal to the last bit on every rank.

    An all-reduce does not promise that: vLLM's on CPUs has every rank begin with its own part, which from
    three ranks on rounds differently. A merge or a prune that two ranks decide differently leaves them
    with other rows, so the parts are gathered and added in the order of the ranks.
    """
    if get_tensor_model_parallel_world_size() == 1:
        return part
    return gather_from_ranks(part).sum(dim=0)


def ranks_with_whole_towers(config: MultiModalConfig) -> Ranks | None:
    """The ranks that each have all of the vision tower; None where they divide its heads, or one is alone."""
    size = get_tensor_model_parallel_world_size()
    if size == 1 or config.mm_encoder_tp_mode != "data":
        return None
    return Ranks(size, get_tensor_model_parallel_rank(), gather_from_ranks)
