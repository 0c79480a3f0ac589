"""What a request costs: the tokens of its images, and the KV memory that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vllm_hybrid.frontend.picture_levels import level_of
from vllm_hybrid.kv.tier_manager import TierManager
from vllm_hybrid.levels import Levels
from vllm_hybrid.method.fastv import live_to_kept
from vllm_hybrid.startup.settings import DEFAULT_BLOCK_SIZE


@dataclass(frozen=True)
class KVBytes:
    """Bytes of keys and values, over all ranks.

    Attributes:
        of_block: of a block of each tier.
        of_position: of one position in all layers.

    """

    of_block: Sequence[int]
    of_position: int

    @classmethod
    def of(cls, kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> KVBytes:
        """Those of an engine."""
        ranks = vllm_config.parallel_config.tensor_parallel_size
        groups = kv_cache_config.kv_cache_groups
        blocks = [group.kv_cache_spec.page_size_bytes * len(group.layer_names) * ranks for group in groups]
        sizes = [group.kv_cache_spec.block_size for group in groups]
        return cls(blocks, sum(block // size for block, size in zip(blocks, sizes, strict=True)))


def cost_of(
    request: Request,
    live: Mapping[int, int | None],
    levels: Levels,
    managers: Sequence[TierManager],
    kv_bytes: KVBytes,
) -> dict[str, Any]:
    """What a request costs, as its response tells it.

    Args:
        request: the request, whose blocks it still holds.
        live: live tokens of its images by number, None where they are not known.
        levels: the model's.
        managers: of all tiers, in the order of ``kv_bytes``.
        kv_bytes: bytes of keys and values.

    Returns:
        ``images``: of each its level, its positions, and how many live and kept tokens it has.
        ``kv_bytes``: of the blocks that the request holds, shared ones among them; None where it holds none
        any more, because it ends while it is preempted. ``kv_bytes_full``: of the blocks of
        :data:`DEFAULT_BLOCK_SIZE` positions in which the full model would hold it.

    """
    images = []
    for number, feature in enumerate(request.mm_features):
        level = level_of(feature.identifier, levels)
        count = live.get(number)
        kept = None if count is None else live_to_kept(count, level.fastv_ratio)
        tokens = {"live_tokens": count, "kept_tokens": kept}
        images.append({"level": level.name, "tokens": feature.mm_position.length, **tokens})
    tables = [manager.req_to_blocks.get(request.request_id, ()) for manager in managers]
    held = [sum(not block.is_null for block in table) for table in tables]
    # The last token of an answer has no keys and values.
    positions = max(request.num_tokens - 1, request.num_prompt_tokens)
    full_blocks = -(-positions // DEFAULT_BLOCK_SIZE)
    return {
        "images": images,
        "kv_bytes": sum(n * size for n, size in zip(held, kv_bytes.of_block, strict=True)) or None,
        "kv_bytes_full": full_blocks * DEFAULT_BLOCK_SIZE * kv_bytes.of_position,
    }
