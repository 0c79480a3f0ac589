"""One step of the language model in terms of live rows: from the runner's metadata to attention plans."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_hybrid.attention.interface import (
    AttentionPlan,
    DecodeStep,
    KeyIndex,
    RankingQuery,
    TierBatch,
    as_kv_rows,
    kv_row_index,
)
from vllm_hybrid.attention.select import AnyAttentionOps
from vllm_hybrid.kv.page_facts import START, new_page_facts, plan_facts
from vllm_hybrid.method.fastv import select_tokens
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
    """A tier's page facts and how its slots map to KV rows; made when its KV cache is first seen.

    Attributes:
        patches: patches of an image.
        facts: see :mod:`vllm_hybrid.kv.page_facts`.
        block_size: slots of a block.
        kv_rows_per_block: KV rows between two blocks of one layer.

    """

    patches: int
    facts: torch.Tensor | None = None
    block_size: int = 0
    kv_rows_per_block: int = 0
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
        _, self.kv_rows_per_block = as_kv_rows(kv_cache)
        self.facts = new_page_facts(blocks, self.block_size, self.patches, kv_cache.device)
        self._bound_to = seen

    def write_facts(self, slots: torch.Tensor, facts: torch.Tensor | None) -> None:
        """Store the facts of a step's live rows.

        Args:
            slots: int64 [R], vLLM's slot of each row, negative where there is none.
            facts: int32 [R, words]; None where all rows are text.

        """
        assert self.facts is not None
        rows = self.facts.view(-1, self.facts.shape[2])
        # Block 0 is vLLM's null block: padding and capture rows point there and must say nothing. What they
        # write goes to the block behind the last.
        places = torch.where(slots >= self.block_size, slots, rows.shape[0] - 1)
        if facts is None:
            rows[:, START].index_fill_(0, places, 0)
        else:
            rows.index_copy_(0, places, facts)

    @torch.inference_mode()
    def copy_facts(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the facts of whole blocks.

        Args:
            copies: numbers of the blocks that are read and of those that are written. All are read first.

        """
        assert self.facts is not None, "no block was ever written"
        blocks = [block for pair in copies for block in pair]
        source, target = to_device(blocks, self.facts.device).view(-1, 2).T
        self.facts.index_copy_(0, target, self.facts[source])

    def kv_row_index(self, slots: torch.Tensor) -> torch.Tensor:
        """KV rows, int64 [R], of slots (int64 [R]); 0 where there is none."""
        return kv_row_index(slots.clamp(min=0), self.block_size, self.kv_rows_per_block)


@dataclass
class Step:
    """What is known about a step before its layers run.

    Attributes:
        positions: int64 [N], virtual position of each virtual row.
        query_start_loc_cpu: entries r and r + 1 bound the virtual rows of request r.
        images: the images whose patches are in the step, None where there are none.
        text_rows: the plan of a step without images that has as many rows as a step can have.

    """

    positions: torch.Tensor
    query_start_loc_cpu: list[int]
    images: StepImages | None
    text_rows: RowPlan

    @property
    def decodes(self) -> bool:
        """Whether every request brings one row, of text."""
        starts = self.query_start_loc_cpu
        return self.images is None and starts == list(range(len(starts)))

    def lower_rows(self) -> RowPlan:
        """The live rows."""
        if self.images is None:
            return self.text_rows.first(self.query_start_loc_cpu[-1])
        return plan_live_rows(self.query_start_loc_cpu[-1], self.images)

    @cached_property
    def ranking_queries(self) -> list[RankingQuery]:
        """The queries that rank the step's images, where tokens of them are dropped.

        Each ranks the images behind the one before it, also those between them that lose nothing.

        An image's ranking row is the end of the first assistant header behind it, or else the last row of its
        request: the scheduler ends a step there, at the prompt's last position, where no header follows. A
        header behind the last row is another request's.
        """
        if self.images is None:
            return []
        starts, first_rows = self.query_start_loc_cpu, self.images.first_rows
        header_ends = self.images.header_ends or [starts[-1]] * len(first_rows)
        queries: dict[int, RankingQuery] = {}
        for first_row, header_end, ratio in zip(first_rows, header_ends, self.images.ratios, strict=True):
            if ratio == 0:
                continue
            request = bisect_right(starts, first_row) - 1
            row = min(header_end, starts[request + 1] - 1)
            queries.setdefault(row, RankingQuery(request, row, first_row))
        return list(queries.values())

    def upper_rows(self, lower: RowPlan, importance: torch.Tensor, heads: int) -> RowPlan:
        """The rows FastV keeps, in a step with images.

        Args:
            lower: the live rows.
            importance: float32 [R of lower], what its ranking query gives each row, summed over the heads at
                hand.
            heads: attention heads over all ranks.

        """
        images = self.images
        assert images is not None
        mean = sum_over_ranks(importance) / heads
        # A prompt may end in an image, which its last position ranks: the row that answers for it lives on.
        ranking = to_device([query.row for query in self.ranking_queries], mean.device)
        mean.index_fill_(0, lower.row_of[ranking], float("inf"))
        is_image = lower.image >= 0
        image_rows = true_places(is_image, sum(images.counts))
        kept = to_device(images.kept_counts, mean.device)
        selected = select_tokens(mean[image_rows], images.live_counts, kept)
        keep = (~is_image).index_copy(0, image_rows, selected)
        return plan_kept_rows(lower, images, keep, sum(images.kept_counts))

    def slots(self, row_plan: RowPlan, common: CommonAttentionMetadata) -> torch.Tensor:
        """vLLM's slot, int64 [R], of each row of a tier; negative where there is none."""
        return common.slot_mapping[: self.query_start_loc_cpu[-1]][row_plan.stored_at].long()

    def facts(self, row_plan: RowPlan) -> torch.Tensor | None:
        """Page facts of a tier's rows, int32 [R, words]; None where all are text."""
        return None if self.images is None else plan_facts(row_plan, self.images, self.positions)

    def tier_batch(
        self, row_plan: RowPlan, common: CommonAttentionMetadata, kv_row_index: torch.Tensor
    ) -> TierBatch:
        """The batch of a tier, given its rows and where they are stored."""
        requests = len(self.query_start_loc_cpu) - 1
        return TierBatch(
            row_plan=row_plan,
            positions=self.positions,
            query_start_loc_cpu=self.query_start_loc_cpu,
            query_start_loc=common.query_start_loc[: requests + 1],
            kv_row_index=kv_row_index,
            ranking_queries=self.ranking_queries,
            length_bounds=_length_bounds(common, requests),
            has_images=self.images is not None,
        )


def _length_bounds(common: CommonAttentionMetadata, requests: int) -> list[int]:
    """No request has more virtual positions; known to the host without asking the device."""
    bounds = common.seq_lens_cpu_upper_bound
    return [common.max_seq_len] * requests if bounds is None else bounds[:requests].tolist()


def store_facts_and_plan(
    step: Step,
    row_plan: RowPlan,
    common: CommonAttentionMetadata,
    pages: TierPages,
    foreign: torch.Tensor,
    ops: AnyAttentionOps,
) -> AttentionPlan[KeyIndex]:
    """Store a tier's page facts, read every request's key index back, and plan the attention.

    Args:
        step: the step.
        row_plan: the tier's rows.
        common: the runner's metadata of the tier.
        pages: the tier's pages, bound to its cache; their facts are written.
        foreign: bool [most requests]; written with whose pages hold another request's data, where the
            implementation flags that.
        ops: who attends.

    Returns:
        The plan, for every layer of the tier.

    """
    requests = len(step.query_start_loc_cpu) - 1
    assert pages.facts is not None
    if step.decodes:
        decodes = _decode_step(step, row_plan, common, pages)
        plan = ops.plan_decodes(decodes, foreign[:requests])
        if plan is not None:
            return plan
    slots = step.slots(row_plan, common)
    pages.write_facts(slots, step.facts(row_plan))
    key_index = ops.build_key_index(
        pages.facts,
        common.block_table_tensor[:requests],
        common.seq_lens[:requests],
        pages.patches,
        pages.kv_rows_per_block,
    )
    ops.flag_foreign_pages(key_index, foreign[:requests])
    return ops.plan(step.tier_batch(row_plan, common, pages.kv_row_index(slots)), key_index)


def _decode_step(
    step: Step, row_plan: RowPlan, common: CommonAttentionMetadata, pages: TierPages
) -> DecodeStep:
    requests = len(step.query_start_loc_cpu) - 1
    assert pages.facts is not None
    return DecodeStep(
        row_plan=row_plan,
        positions=step.positions,
        query_start_loc_cpu=step.query_start_loc_cpu,
        query_start_loc=common.query_start_loc[: requests + 1],
        facts=pages.facts,
        block_table=common.block_table_tensor[:requests],
        seq_lens=common.seq_lens[:requests],
        slots=common.slot_mapping[:requests].long(),
        patches=pages.patches,
        kv_rows_per_block=pages.kv_rows_per_block,
    )
