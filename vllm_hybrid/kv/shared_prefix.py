"""What a prompt finds in the prefix cache, over both tiers."""

from __future__ import annotations

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_hybrid.kv.tier_manager import Match, TierManager, image_around


class SharedPrefixManager(KVCacheManager):
    """vLLM's KV-cache manager, with a lookup that knows images, their holes, and tiers of any block sizes.

    vLLM's own compares prompts by the least common multiple of the tiers' block sizes, 240 tokens for a 7B
    model with K = 2. This one does by their greatest common divisor, 16 there.
    """

    @classmethod
    def take_over(cls, manager: KVCacheManager) -> None:
        """Make a manager one of this class; vLLM's scheduler makes its own and offers no way to name another.

        Args:
            manager: it is changed.

        """
        manager.__class__ = cls
        if isinstance(manager.coordinator, HybridKVCacheCoordinator):
            # Blocks are offered to the last one, not to the last common end of blocks of all tiers.
            manager.coordinator.enable_partial_hash_hits = True

    @property
    def tier_managers(self) -> list[TierManager]:
        """The tiers' managers, the lower tier's first."""
        return [m for m in self.coordinator.single_type_managers if isinstance(m, TierManager)]

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        """The longest prefix of a request that all tiers hold.

        Args:
            request: the request.
            max_cache_hit_length: positions that it may have at most, from vLLM 0.33 on.

        Returns:
            Its blocks, its length in virtual positions, and 0. It cuts no image, and leaves at least one
            position to compute. It is empty where a block would have to be copied and the pool is too
            small for that: the request would wait for ever.

        """
        if not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        length = request.num_tokens - 1 if max_cache_hit_length is None else max_cache_hit_length
        found = [(manager, manager.match(request, length)) for manager in self.tier_managers]
        before = None
        while length != before:
            before = length
            for manager, match in found:
                length = manager.longest(match, length)
            cut = image_around(request, length)
            length = length if cut is None else cut.offset
        blocks = _take(request, found, length)
        most = [
            manager.most_blocks(shared, length, request.num_tokens)
            for (manager, _), shared in zip(found, blocks, strict=True)
        ]
        if sum(most) >= self.block_pool.num_gpu_blocks:
            length = 0
            blocks = _take(request, found, length)
        return self.create_kv_cache_blocks(blocks), length, 0

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        """A request's blocks in the order of their positions, over all tiers.

        They are freed from the last on, and evicted in that order. Tier by tier, as vLLM has it, one tier
        would lose its first blocks before the other its last, and a prefix needs both.
        """
        blocks = [
            ((number + 1) * manager.block_size, block)
            for manager in self.coordinator.single_type_managers
            for number, block in enumerate(manager.pop_blocks_for_free(request.request_id))
        ]
        return [block for _, block in sorted(blocks, key=lambda placed: placed[0])]

    def free(self, request: Request) -> None:
        """Free a request's blocks, the last positions first."""
        self.block_pool.free_blocks(reversed(self.pop_blocks_for_free(request)))


def _take(
    request: Request, found: list[tuple[TierManager, Match]], length: int
) -> tuple[list[KVCacheBlock], ...]:
    """The blocks of each tier for a prefix of a request, whose images it shares from now on."""
    return tuple(manager.take(request.request_id, match, length) for manager, match in found)
