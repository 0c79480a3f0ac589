"""Keys of cached blocks where image tokens were pruned: what the pages hold depends on what ranked them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.request import Request

RankingPositions = Callable[[Request], list[int]]


def ranked_block_hasher(
    unit: int, hash_function: Callable[[Any], bytes], ranking_positions: RankingPositions
) -> Callable[[Request], list[BlockHash]]:
    """A hasher of a request's blocks that are not hashed yet, to put in the place of vLLM's.

    Which tokens of an image the upper tier keeps, and so what it computes from there on, follows from all
    positions up to the one that ranks the image. The key of the block in which the image begins says them,
    and all later keys follow from that one.

    Args:
        unit: positions of a block.
        hash_function: vLLM's, of any nested tuples.
        ranking_positions: gives the position that ranks each image of a request.

    """

    def hasher(request: Request) -> list[BlockHash]:
        hashes: list[BlockHash] = []
        parent = request.block_hashes[-1] if request.block_hashes else None
        first = len(request.block_hashes) * unit
        image = 0
        for start in range(first, request.num_tokens - unit + 1, unit):
            extra, image = generate_block_hash_extra_keys(request, start, start + unit, image)
            ranked = _ranked_by(request, ranking_positions, start, start + unit)
            tokens = request.all_token_ids[start : start + unit]
            parent = hash_block_tokens(hash_function, parent, tokens, ((extra or ()) + ranked) or None)
            hashes.append(parent)
        return hashes

    return hasher


def _ranked_by(
    request: Request, ranking_positions: RankingPositions, start: int, end: int
) -> tuple[Any, ...]:
    """What follows each image that begins in a stretch, up to the position that ranks it.

    Of one that needs nothing behind it nothing is said: its tokens and its identifier are in the keys anyway.
    """
    features = request.mm_features
    if not features or features[-1].mm_position.offset < start:
        return ()
    return tuple(
        (
            "ranked",
            last - start,
            tuple(request.all_token_ids[feature.mm_position.offset : last + 1]),
            tuple(
                (other.identifier, other.mm_position.offset - start)
                for other in features
                if feature.mm_position.offset < other.mm_position.offset <= last
            ),
        )
        for feature, last in zip(features, ranking_positions(request), strict=True)
        if start <= feature.mm_position.offset < end
        and last >= feature.mm_position.offset + feature.mm_position.length
    )
