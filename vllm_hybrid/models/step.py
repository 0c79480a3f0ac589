"""One step of the language model in terms of live rows: from the runner's metadata to tier batches."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch

from vllm_hybrid.attention.backend import HybridMetadata, Implementation
from vllm_hybrid.attention.interface import TierBatch, page_rows
from vllm_hybrid.kv.page_facts import START, new_page_facts, plan_facts
from vllm_hybrid.method.fastv import choose, live_to_kept
from vllm_hybrid.method.row_plan import (
    RowPlan,
    StepImages,
    plan_kept_rows,
    plan_live_rows,
    to_device,
    true_places,
)
from vllm_hybrid.models.tensor_parallel import sum_over_ranks


@dataclass
class TierPages:
    """A tier's page facts and how its slots map to page rows; made when its KV cache is first seen.

    Attributes:
        patches: patches of an image.
        facts: see :mod:`vllm_hybrid.kv.page_facts`.
        block_size: slots of a block.
        rows_per_block: page rows between two blocks of one layer.

    """

    patches: int
    facts: torch.Tensor | None = None
    block_size: int = 0
    rows_per_block: int = 0
    _bound_to: tuple[object, ...] = field(default=(), repr=False)

    def bind(self, kv_cache: torch.Tensor) -> None:
        """Make room for the facts of a layer's pages [blocks, kv_heads, block_size, 2 * head_size].

        vLLM profiles graphs on a small cache and frees it, and the real one may come to lie at the same
        address, so everything that the facts depend on is compared.

        Raises:
            RuntimeError: the cache is new and a graph is being captured, which would clear the facts in
                each of its replays.

        """
        seen = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride(), kv_cache.dtype, kv_cache.device)
        if self._bound_to == seen:
            return
        if kv_cache.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is captured on a KV cache that no step has run on; warm up first"
            )
        blocks, _, self.block_size, _ = kv_cache.shape
        _, self.rows_per_block = page_rows(kv_cache)
        self.facts = new_page_facts(blocks, self.block_size, self.patches, kv_cache.device)
        self._bound_to = seen


def text_rows(num_rows: int, device: torch.device) -> RowPlan:
    """The plan of a step without images: every virtual row is live."""
    rows = torch.arange(num_rows, device=device)
    return RowPlan(rows=rows, row_of=rows, stored_at=rows, image=torch.full_like(rows, -1))


@dataclass
class Step:
    """What is known about a step before its layers run.

    Attributes:
        positions: int64 [N], virtual position of each virtual row.
        query_start: virtual rows of request r are query_start[r] .. query_start[r + 1].
        images: the images whose patches are in the step, None where there are none.
        prunes: whether image tokens are ranked and dropped after the lower tier.

    """

    positions: torch.Tensor
    query_start: list[int]
    images: StepImages | None
    prunes: bool

    def lower_plan(self) -> RowPlan:
        """The live rows."""
        if self.images is None:
            return text_rows(self.query_start[-1], self.positions.device)
        return plan_live_rows(self.query_start[-1], self.images)

    def ranked_requests(self) -> list[int]:
        """Requests whose last query ranks image tokens: those with an image in the step.

        The scheduler ends such a step at the prompt's last position.
        """
        if self.images is None or not self.prunes:
            return []
        return sorted({bisect_right(self.query_start, row) - 1 for row in self.images.first_rows})

    def upper_plan(self, lower: RowPlan, batch: TierBatch, ratio: float, heads: int) -> RowPlan:
        """The rows FastV keeps.

        Args:
            lower: the live rows.
            batch: the lower tier's batch, its ``mass`` filled by the ranking layer.
            ratio: share of each image's live tokens to drop, R.
            heads: attention heads over all ranks.

        Returns:
            The upper tier's rows; those of the lower tier where the step has no image.

        """
        if self.images is None:
            return lower
        assert batch.mass is not None, "the ranking layer runs before the choice"
        importance = sum_over_ranks(batch.mass) / heads
        # A prompt may end in an image; the row that answers for its last position has to live on.
        last = to_device([self.query_start[r + 1] - 1 for r in batch.ranked], importance.device)
        importance.index_fill_(0, lower.row_of[last], float("inf"))
        is_image = lower.image >= 0
        image_rows = true_places(is_image, sum(self.images.counts))
        chosen = choose(importance[image_rows], self.images.live_counts, ratio)
        keep = (~is_image).index_copy(0, image_rows, chosen)
        kept_images = sum(live_to_kept(n, ratio) for n in self.images.counts)
        return plan_kept_rows(lower, self.images, keep, kept_images)

    def tier_batch(
        self,
        plan: RowPlan,
        metadata: HybridMetadata,
        pages: TierPages,
        foreign: torch.Tensor,
        implementation: Implementation,
    ) -> TierBatch:
        """Store a tier's page facts and read every request's key list back.

        Args:
            plan: the tier's rows.
            metadata: the runner's metadata of the tier; receives the batch and its plan.
            pages: the tier's pages, bound to its cache.
            foreign: bool [most requests], receives whose pages hold another request's data where the
                implementation reports that instead of raising.
            implementation: who attends.

        Returns:
            The batch, also left in ``metadata``.

        """
        assert pages.facts is not None
        common = metadata.common
        slots = common.slot_mapping[: self.query_start[-1]][plan.stored_at].long()
        facts = pages.facts.view(-1, pages.facts.shape[2])
        # Block 0 is vLLM's null block: padding and capture rows point there and must say nothing.
        nowhere = facts.shape[0] - 1
        places = torch.where(slots >= pages.block_size, slots, nowhere)
        if self.images is None:
            facts[:, START].index_fill_(0, places, 0)
        else:
            facts.index_copy_(0, places, plan_facts(plan, self.images, self.positions))
        slots = slots.clamp(min=0)
        requests = len(self.query_start) - 1
        keys = implementation.walk_pages(
            pages.facts,
            common.block_table_tensor[:requests],
            common.seq_lens[:requests],
            pages.patches,
            pages.rows_per_block,
        )
        if implementation.mark_foreign is not None:
            implementation.mark_foreign(keys, foreign[:requests])
        batch = TierBatch(
            plan=plan,
            positions=self.positions,
            query_start=self.query_start,
            page_slots=slots // pages.block_size * pages.rows_per_block + slots % pages.block_size,
            query_ptr=common.query_start_loc[: requests + 1],
            keys=keys,
            ranked=self.ranked_requests(),
        )
        metadata.batch, metadata.plan = batch, implementation.plan(batch)
        return batch
