"""The two KV tiers: their cache specs and block sizes.

Layers below ``fastv_layer`` keep every live token (lower tier), the others only kept ones (upper tier).
Each tier is a KV-cache group of its own, so each has its own block table and its own holes. The block
sizes are chosen so that a block takes the same bytes in both tiers and one pool serves both.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from vllm_hybrid.kv.tier_manager import TierManager


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
