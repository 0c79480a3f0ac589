"""The seam between the model and whoever attends: what an implementation is given, and what it offers.

Three implementations stand behind :class:`AttentionOps`: ``reference`` (the readable oracle), ``cpu`` and
``gpu``. In a step the model writes page facts, has every request's key index built from its pages, plans the
attention once for all layers of a tier, and attends in each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

import torch

from vllm_hybrid.method import token_merging
from vllm_hybrid.method.device_tokens import DeviceTokens
from vllm_hybrid.method.row_plan import RowPlan
from vllm_hybrid.method.token_merging import PackedTokens


class KeyIndex:
    """The virtual keys of a batch of requests, in whatever form their implementation reads."""


@dataclass
class VirtualKeys(KeyIndex):
    """Virtual keys by row, in the order in which rows stand in the pages.

    Attributes:
        row_ptr: int64 [requests + 1], a request's stretch of rows.
        kv_row_index: int64 [rows], KV row of each row: block * kv_rows_per_block + offset.
        is_image: bool [rows], whether the row is an image token (its key is stored unrotated).
        member_ptr: int64 [rows + 1], a row's stretch of members.
        member_pos: int64 [keys], the virtual positions a row stands at, ascending inside a row.

    """

    row_ptr: torch.Tensor
    kv_row_index: torch.Tensor
    is_image: torch.Tensor
    member_ptr: torch.Tensor
    member_pos: torch.Tensor


@dataclass(frozen=True)
class RankingQuery:
    """A query whose attention ranks image tokens (FastV).

    Attributes:
        request: the request it belongs to.
        row: virtual row of the query; it sees the keys at its own and earlier positions.
        first_row: what it ranks are the image tokens at virtual rows ``first_row .. row``, whole images all.

    """

    request: int
    row: int
    first_row: int


@dataclass
class TierBatch:
    """What one tier's attention needs to know about the rows of a step.

    Attributes:
        row_plan: the live rows of the step.
        positions: int64 [N], virtual position of each virtual row.
        query_start_loc_cpu: entries r and r + 1 bound the virtual rows of request r.
        query_start_loc: int32 [requests + 1], the same where the rows are.
        kv_row_index: int64 [R], KV row each live row's keys and values are written to.
        ranking_queries: the queries that rank the step's image tokens, rows ascending, stretches disjoint.
        length_bounds: no request has more virtual positions, with this step's, on the host; a request that
            begins in this step has as many.
        has_images: whether the step brings images.

    """

    row_plan: RowPlan
    positions: torch.Tensor
    query_start_loc_cpu: list[int]
    query_start_loc: torch.Tensor
    kv_row_index: torch.Tensor
    ranking_queries: list[RankingQuery]
    length_bounds: list[int]
    has_images: bool

    @cached_property
    def row_counts(self) -> list[int]:
        """Virtual rows that each request brings."""
        starts = self.query_start_loc_cpu
        return [end - start for start, end in zip(starts, starts[1:], strict=False)]

    def live_stretch(self, request: int) -> tuple[int, int]:
        """First and one past the last live row of a request in this step; they are consecutive."""
        return self.live_rows(self.query_start_loc_cpu[request], self.query_start_loc_cpu[request + 1])

    def live_rows(self, begin: int, end: int) -> tuple[int, int]:
        """First and one past the last live row among the virtual rows ``begin .. end - 1``."""
        rows = self.row_plan.rows
        first, last = torch.searchsorted(rows, torch.tensor([begin, end], device=rows.device)).tolist()
        return first, last


@dataclass
class DecodeStep:
    """A step in which each request brings one row of text, as one tier sees it.

    Attributes:
        row_plan: the rows, request r's is row r.
        positions: int64 [requests], virtual position of each.
        query_start_loc_cpu: 0, 1, 2, ...
        query_start_loc: int32 [requests + 1], the same where the rows are; when a captured step is replayed
            for fewer requests, the last ones stretch over nothing.
        facts: int32 [blocks, block_size, words], the tier's page facts, which do not know the new rows yet.
        block_table: int32 [requests, blocks per request], see :meth:`AttentionOps.build_key_index`.
        seq_lens: int32 [requests], virtual length of each request with its new row; 0 where there is none.
        slots: int64 [requests], vLLM's slot of each new row, negative where there is none.
        patches: patches of an image.
        kv_rows_per_block: KV rows between two blocks of one layer.

    """

    row_plan: RowPlan
    positions: torch.Tensor
    query_start_loc_cpu: list[int]
    query_start_loc: torch.Tensor
    facts: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    patches: int
    kv_rows_per_block: int

    def batch(self, kv_row_index: torch.Tensor) -> TierBatch:
        """The rows as any step's, given where they are stored (int64 [requests])."""
        positions = self.block_table.shape[1] * self.facts.shape[1]
        return TierBatch(
            row_plan=self.row_plan,
            positions=self.positions,
            query_start_loc_cpu=self.query_start_loc_cpu,
            query_start_loc=self.query_start_loc,
            kv_row_index=kv_row_index,
            ranking_queries=[],
            length_bounds=[positions] * (len(self.query_start_loc_cpu) - 1),
            has_images=False,
        )


KeyIndexT = TypeVar("KeyIndexT", bound=KeyIndex)


@dataclass
class AttentionPlan(Generic[KeyIndexT]):
    """A tier's work in a step; implementations add how it is cut up.

    Attributes:
        batch: the rows.
        key_index: virtual keys of all requests, this step's rows included.

    """

    batch: TierBatch
    key_index: KeyIndexT


PlanT = TypeVar("PlanT", bound=AttentionPlan)


class DeviceTower(ABC):
    """Attention and merging of the vision tower where only the device knows how many tokens an image has.

    All shapes are chosen by the host, and nothing waits for the device.
    """

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: DeviceTokens, scale: float
    ) -> torch.Tensor:
        """Proportional attention inside every image (ToMe, arXiv 2210.09461, section 3.2).

        Args:
            query: [rows, heads, head_size], channels contiguous, packed like ``tokens.hidden``; keys and
                values alike.
            key: see query.
            value: see query.
            tokens: the images' tokens; log(size) is added to the logits of the keys, in float32.
            scale: factor on the logits.

        Returns:
            [rows, heads, head_size], zeros at padding.

        """

    @abstractmethod
    def metric(self, key: torch.Tensor) -> torch.Tensor:
        """float32 [rows, head_size]: keys [rows, heads, head_size] summed over heads."""

    @abstractmethod
    def merge(
        self,
        tokens: DeviceTokens,
        added: torch.Tensor,
        metric: torch.Tensor,
        threshold: torch.Tensor,
        capacity: int,
    ) -> DeviceTokens:
        """Add to the tokens' features and merge (DyMU, section 3.1); see :func:`token_merging.merge`.

        Args:
            tokens: the tokens.
            added: [rows, C], what attention adds to their features.
            metric: float32 [rows, D], the keys' sum over all heads.
            threshold: float32 [images], least cosine, exclusive; infinity where nothing merges.
            capacity: rows of the result. Where more are needed, ``bounds`` of the result says so, and
                nothing else of it counts.

        """

    @abstractmethod
    def owners(self, tokens: DeviceTokens, patches: int) -> torch.Tensor:
        """int64 [images, patches]: the live token that holds each patch after the last merge."""


class AttentionOps(ABC, Generic[KeyIndexT, PlanT]):
    """One implementation of virtual unmerging attention (DyMU, arXiv 2504.17040, section 3.2).

    Keys enter the softmax once per member position, rotated to it; a merged token's query attends once per
    member position, causally by virtual position, and its output is the mean over the copies.
    """

    flags_foreign_pages: ClassVar[bool] = False
    """Whether a page of another request is flagged; otherwise building the index raises."""

    compiles_on_launch: ClassVar[bool] = False
    """Whether kernels are compiled when they are first launched, so that somebody waits for it."""

    device_tower: ClassVar[DeviceTower | None] = None
    """The tower's operations where a read of lengths would wait for a device; None where lengths are free."""

    def write_pages(
        self, key: torch.Tensor, value: torch.Tensor, kv_rows: torch.Tensor, kv_row_index: torch.Tensor
    ) -> None:
        """Store the keys and values of a step's live rows.

        Args:
            key: [R, kv_heads, head_size], image rows unrotated.
            value: [R, kv_heads, head_size].
            kv_rows: rows of :func:`as_kv_rows`; written.
            kv_row_index: int64 [R], KV row of each.

        """
        kv_rows.index_copy_(0, kv_row_index, torch.cat([key, value], dim=-1).to(kv_rows.dtype))

    @abstractmethod
    def build_key_index(
        self,
        facts: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        patches: int,
        kv_rows_per_block: int,
    ) -> KeyIndexT:
        """Read every request's virtual keys from its live pages.

        Args:
            facts: int32 [blocks, block_size, words], the tier's page facts.
            block_table: int32 [requests, blocks per request]; entries inside holes may be stale, and nothing
                may follow from them.
            seq_lens: int32 [requests], virtual length of each request.
            patches: patches of an image.
            kv_rows_per_block: KV rows between two blocks of one layer.

        Returns:
            The index.

        Raises:
            RuntimeError: a page holds another request's data, unless that is flagged.

        """

    def flag_foreign_pages(self, key_index: KeyIndexT, flags: torch.Tensor) -> None:
        """Write into bool [requests] whose pages held another request's data, where that does not raise."""

    @abstractmethod
    def plan(self, batch: TierBatch, key_index: KeyIndexT) -> PlanT:
        """Sort a step's requests; done once per tier and step, used by every layer of the tier."""

    def plan_decodes(self, step: DecodeStep, foreign: torch.Tensor) -> PlanT | None:
        """Do all that comes before the layers of a step of decodes at once, where there is a way to.

        Args:
            step: the step; the facts of its rows are written.
            foreign: bool [requests], whether a page held another request's data; written.

        Returns:
            The plan; None where such a step is stored, read back and planned as any other.

        """
        return None

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: PlanT,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Virtual unmerging attention of every live row of a step.

        Args:
            query: [R, heads, head_size], text rows rotated, image rows not.
            kv_rows: rows of :func:`as_kv_rows`, this step's keys and values written.
            plan: the step's.
            cos_sin_cache: float32 [positions, head_size] of :func:`make_cos_sin_cache`.
            scale: factor on the scores.
            out: [R, heads, head_size]; written.

        """

    def attend_own_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: PlanT,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """As :meth:`attend`, by the step's own rows, where they are all that its prompts have.

        Args:
            query: see there.
            key: [R, kv_heads, head_size], what the step wrote.
            value: [R, kv_heads, head_size], likewise.
            kv_rows: see there.
            plan: see there.
            cos_sin_cache: see there.
            scale: see there.
            out: see there.

        Returns:
            Whether it did; if not, ``out`` is as it was.

        """
        return False

    def scratch_bytes(
        self, rows: int, positions: int, heads: int, kv_heads: int, head_size: int, number_bytes: int
    ) -> int:
        """Bytes that a layer's attention allocates beside its arguments, at most.

        Args:
            rows: virtual rows of a step, at most.
            positions: virtual positions of a request, at most.
            heads: query heads.
            kv_heads: key heads.
            head_size: channels of a head.
            number_bytes: bytes of a number.

        """
        return 0

    @abstractmethod
    def importance(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: PlanT,
        cos_sin_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """What the ranking queries give to the live rows that they rank (FastV, section 3.2).

        Args:
            query: [R, heads, head_size], text rows rotated, image rows not.
            kv_rows: rows of :func:`as_kv_rows`, this step's keys and values written.
            plan: the lower tier's, which has a key for every position; its batch names the ranking queries.
            cos_sin_cache: float32 [positions, head_size].
            scale: factor on the scores.

        Returns:
            float32 [R]: for a live row that is taken from a virtual row of a query's stretch that query's
            attention, summed over the given heads and the row's member positions; zero elsewhere.

        """

    def proportional_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: PackedTokens, scale: float
    ) -> torch.Tensor:
        """The vision tower's; see :func:`vllm_hybrid.method.token_merging.proportional_attention`."""
        return token_merging.proportional_attention(query, key, value, tokens, scale)


def make_cos_sin_cache(inverse_frequency: torch.Tensor, positions: int) -> torch.Tensor:
    """Cosines and sines of RoPE's angles for positions 0 .. positions - 1.

    Args:
        inverse_frequency: float [head_size / 2], radians per position.
        positions: how many positions.

    Returns:
        float32 [positions, head_size], the cosines followed by the sines (RoFormer, arXiv 2104.09864).

    """
    angle = torch.arange(positions, device=inverse_frequency.device)[:, None] * inverse_frequency.float()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """RoPE in half-split style.

    Args:
        x: [..., n, heads, head_size].
        cos_sin: float32 [n, head_size] of :func:`make_cos_sin_cache`, one row per entry of n.

    Returns:
        float32, the shape of x.

    """
    cos, sin = cos_sin[..., None, :].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def as_kv_rows(kv_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All slots of one layer's pages as rows that can be gathered and scattered by one index.

    Args:
        kv_cache: the layer's view [blocks, kv_heads, block_size, 2 * head_size] of a cache in which the
            block is outermost and a slot's heads lie together (layout BLNHC). Bytes are float8_e4m3fn.

    Returns:
        KV rows [rows, kv_heads, 2 * head_size], a view whose row ``block * kv_rows_per_block + offset`` is
        the slot ``offset`` of the block, and kv_rows_per_block.

    Raises:
        ValueError: the cache has another layout.

    """
    blocks, heads, block_size, width = kv_cache.shape
    block_stride, head_stride, slot_stride, unit = kv_cache.stride()
    slot = heads * width
    if unit != 1 or head_stride not in (width, slot) or slot_stride != slot or block_stride % slot:
        raise ValueError(
            f"KV cache strides {kv_cache.stride()} of shape {tuple(kv_cache.shape)} are not those of layout "
            "BLNHC; unset VLLM_KV_CACHE_LAYOUT"
        )
    step = block_stride // slot
    rows = (blocks - 1) * step + block_size
    found = kv_cache.as_strided((rows, heads, width), (slot, width, 1), kv_cache.storage_offset())
    return found.view(torch.float8_e4m3fn) if found.dtype == torch.uint8 else found, step


def kv_row_index(slots: torch.Tensor, block_size: int, kv_rows_per_block: int) -> torch.Tensor:
    """KV rows of :func:`as_kv_rows` that some slots are, int64 like ``slots`` and of its shape."""
    return slots // block_size * kv_rows_per_block + slots % block_size
