"""The two KV tiers: their cache specs, block sizes, and managers that give holes back.

Layers below ``fastv_layer`` keep every live token (lower tier), the others only kept ones (upper tier).
Each tier is a KV-cache group of its own, so each has its own block table and its own holes. The block
sizes are chosen so that a block takes the same bytes in both tiers and one pool serves both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request


class Tier(StrEnum):
    """Where a decoder layer stands: below FastV's choice or after it."""

    LOWER = "lower"
    UPPER = "upper"


def tier_block_sizes(block_size: int, lower_layers: int, upper_layers: int) -> dict[Tier, int]:
    """Tokens per block of each tier, so that lower and upper blocks have equal bytes.

    Args:
        block_size: tokens the smaller block should hold, about.
        lower_layers: decoder layers before FastV's choice, >= 1.
        upper_layers: decoder layers after it; 0 when nothing is pruned and one tier holds all layers.

    Returns:
        Tokens per block by tier. The sizes are in the inverse ratio of the layer counts exactly; the
        smaller one is the multiple of its share nearest to ``block_size``.

    """
    if upper_layers == 0:
        return {Tier.LOWER: block_size}
    common = math.gcd(lower_layers, upper_layers)
    lower_share, upper_share = upper_layers // common, lower_layers // common
    unit = max(1, round(block_size / min(lower_share, upper_share)))
    return {Tier.LOWER: unit * lower_share, Tier.UPPER: unit * upper_share}


class TierManager(FullAttentionManager):
    """Blocks of one tier. Blocks wholly inside an image's hole go back to the pool early."""

    # Page facts are not part of vLLM's block copies, so a shared block is never copied on write.
    supports_fine_grained_hash_lookup = False

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer blocks to other prompts up to the first image: what follows it has holes, and in the
        upper tier depends on the question."""
        if request.mm_features:
            num_tokens = min(num_tokens, min(f.mm_position.offset for f in request.mm_features))
        SingleTypeKVCacheManager.cache_blocks(
            self, request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def give_back(self, request_id: str, first_slot: int, end_slot: int) -> int:
        """Free the blocks that lie wholly inside a hole.

        Args:
            request_id: the request that owns the hole.
            first_slot: virtual position of the hole's first slot.
            end_slot: one past its last slot.

        Returns:
            Number of blocks freed; 0 when the hole was already given back.

        """
        free_before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(
            request_id, -(-first_slot // self.block_size), end_slot // self.block_size
        )
        return self.block_pool.get_num_free_blocks() - free_before


@dataclass(frozen=True, kw_only=True)
class _TierSpec(FullAttentionSpec):
    """Spec of one tier. Merging refuses the other tier, which keeps the tiers in separate groups."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        assert all(type(spec) is cls for spec in specs), "layers of different KV tiers share no group"
        assert all(spec == specs[0] for spec in specs), "layers of a KV tier have one spec"
        return copy.deepcopy(specs[0])


@register_kv_cache_spec(manager_class=TierManager)
@dataclass(frozen=True, kw_only=True)
class LowerTierSpec(_TierSpec):
    """KV of the layers that see every live token."""


@register_kv_cache_spec(manager_class=TierManager)
@dataclass(frozen=True, kw_only=True)
class UpperTierSpec(_TierSpec):
    """KV of the layers that see only kept tokens."""


SPEC_OF_TIER: dict[Tier, type[KVCacheSpec]] = {Tier.LOWER: LowerTierSpec, Tier.UPPER: UpperTierSpec}
