"""Scenes for the kernels: a step of requests with one image each, as kernels and reference take it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_hybrid.attention.interface import (
    AttentionOps,
    DecodeStep,
    RankingQuery,
    TierBatch,
    kv_row_index,
    make_cos_sin_cache,
)
from vllm_hybrid.attention.reference import ReferenceAttention
from vllm_hybrid.kv.page_facts import fact_words, new_page_facts, plan_facts
from vllm_hybrid.method import row_plan
from vllm_hybrid.method.row_plan import RowPlan, StepImages

BLOCK_SIZE = 16
# KV rows from one block of a layer to its next: other layers' rows of the block lie between.
KV_ROWS_PER_BLOCK = 2 * BLOCK_SIZE
TEXT_BEFORE = 5


@dataclass(frozen=True)
class Heads:
    """Shape of one attention layer."""

    heads: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class SceneShape:
    """What a scene is made of.

    Attributes:
        requests: how many, with one image each.
        live: live tokens of an image.
        patches: patches of an image.
        text: text tokens of a prompt, TEXT_BEFORE of them before the image.
        heads: shape of the layer.
        decodes: whether the step decodes one token of each request instead of prefilling it.
        kept: live tokens of an image that FastV left; None: all, which is the lower tier.
        padding: requests of nothing behind the others, as a captured graph has; of decodes alone.

    """

    requests: int
    live: int
    patches: int
    text: int
    heads: Heads
    decodes: bool
    kept: int | None = None
    padding: int = 0


@dataclass
class Scene:
    """A step of requests with one image each: the same facts for the kernels and for the reference.

    Attributes:
        row_plan: its rows.
        images: its images.
        positions: int64 [N].
        query_start_loc_cpu: a request's stretch of virtual rows, on the host.
        query_start_loc: int32 [requests + 1], the same as the device has it: padding stretches over nothing.
        ranking_queries: the last query of each request, over all its rows; none where nothing is ranked.
        facts: page facts of all requests, this step's rows included.
        block_table: int32 [requests, blocks].
        seq_lens: int32 [requests].
        slots: int64 [R], vLLM's slot of each row of the step.
        kv_row_index: int64 [R], KV row of each row of the step.
        kv_rows: [rows, kv_heads, 2 * head_size].
        query: [R, heads, head_size], text rows rotated, image rows not.
        cos_sin_cache: float32 [positions, head_size].
        padding: requests, and rows, of nothing at the end.

    """

    row_plan: RowPlan
    images: StepImages | None
    positions: torch.Tensor
    query_start_loc_cpu: list[int]
    query_start_loc: torch.Tensor
    ranking_queries: list[RankingQuery]
    facts: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    kv_row_index: torch.Tensor
    kv_rows: torch.Tensor
    query: torch.Tensor
    cos_sin_cache: torch.Tensor
    patches: int
    scale: float
    padding: int = 0

    def batch(self) -> TierBatch:
        """The step as an implementation takes it."""
        return TierBatch(
            row_plan=self.row_plan,
            positions=self.positions,
            query_start_loc_cpu=self.query_start_loc_cpu,
            query_start_loc=self.query_start_loc,
            kv_row_index=self.kv_row_index,
            ranking_queries=self.ranking_queries,
            length_bounds=[self.cos_sin_cache.shape[0]] * (len(self.query_start_loc_cpu) - 1),
            has_images=self.images is not None,
        )

    def decode_step(self) -> DecodeStep:
        """A step of decodes as an implementation takes it that plans those at once."""
        return DecodeStep(
            row_plan=self.row_plan,
            positions=self.positions,
            query_start_loc_cpu=self.query_start_loc_cpu,
            query_start_loc=self.query_start_loc,
            facts=self.facts,
            block_table=self.block_table,
            seq_lens=self.seq_lens,
            slots=self.slots,
            patches=self.patches,
            kv_rows_per_block=KV_ROWS_PER_BLOCK,
        )

    def plan(self, ops: AttentionOps[Any, Any], padding: int = 0) -> Any:
        """What an implementation makes of the step before its layers; see :meth:`results`."""
        if self.images is None:
            foreign = torch.zeros(self.seq_lens.shape[0], dtype=torch.bool, device=self.facts.device)
            plan = ops.plan_decodes(self.decode_step(), foreign)
            if plan is not None:
                return plan
        keys = ops.build_key_index(
            self.facts, self.block_table, self.seq_lens, self.patches, KV_ROWS_PER_BLOCK
        )
        batch = self.batch()
        batch.query_start_loc_cpu = batch.query_start_loc_cpu[: len(batch.query_start_loc_cpu) - padding]
        return ops.plan(batch, keys)

    def results(
        self, ops: AttentionOps[Any, Any], out: torch.Tensor, padding: int = 0
    ) -> dict[str, torch.Tensor]:
        """What an implementation makes of the step: ``attend`` and, where it ranks, ``importance``.

        Args:
            ops: the implementation.
            out: the shape of the queries; written.
            padding: requests at the end to leave out.

        """
        plan = self.plan(ops, padding)
        ops.attend(self.query, self.kv_rows, plan, self.cos_sin_cache, self.scale, out)
        found = {"attend": out}
        if self.ranking_queries:
            found["importance"] = ops.importance(
                self.query, self.kv_rows, plan, self.cos_sin_cache, self.scale
            )
        return found

    def to(self, device: str, dtype: torch.dtype) -> Scene:
        """A copy on a device, its floating-point pages and queries in a dtype."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.to(device, dtype) if name in ("kv_rows", "query") else value.to(device)
            elif isinstance(value, RowPlan):
                value = RowPlan(**{k: v.to(device) for k, v in vars(value).items()})
            elif isinstance(value, StepImages):
                first, owner = value.first_row.to(device), value.owner.to(device)
                value = replace(value, first_row=first, owner=owner)
            moved[name] = value
        return Scene(**moved)

    def moved_behind(self, bytes_before: int) -> Scene:
        """The same scene with its pages behind so many bytes of others', which hold no number."""
        row_bytes = self.kv_rows[0].numel() * self.kv_rows.element_size()
        blocks = -(-bytes_before // (row_bytes * KV_ROWS_PER_BLOCK))
        rows = blocks * KV_ROWS_PER_BLOCK
        kv_rows = self.kv_rows.new_full((rows + self.kv_rows.shape[0], *self.kv_rows.shape[1:]), float("nan"))
        kv_rows[rows:] = self.kv_rows
        facts = self.facts.new_zeros(blocks + self.facts.shape[0], *self.facts.shape[1:])
        facts[blocks:] = self.facts
        return replace(
            self,
            kv_rows=kv_rows,
            facts=facts,
            block_table=self.block_table + blocks,
            kv_row_index=self.kv_row_index + rows,
        )


def random_owner(patches: int, live: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [patches]: every live token holds at least one patch, the others at random."""
    owner = torch.randint(live, (patches,), generator=generator)
    owner[torch.randperm(patches, generator=generator)[:live]] = torch.arange(live)
    return owner


def make_scene(
    shape: SceneShape, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Scene:
    """A step of prompts, or of decodes whose prompts are in the pages.

    Args:
        shape: what it is made of.
        seed: of the random numbers, which are the same on every device.
        device: where to make it.
        dtype: of pages and queries.

    Returns:
        The scene; rows of pages that belong to nothing hold no number.

    Raises:
        ValueError: a step of prompts is to be padded.

    """
    if shape.padding and not shape.decodes:
        raise ValueError("only a step of decodes is padded, to the size of a captured graph")
    draw = torch.Generator().manual_seed(seed)
    requests, patches, heads = shape.requests, shape.patches, shape.heads
    prompt = shape.text + patches
    owner = torch.stack([random_owner(patches, shape.live, draw) for _ in range(requests)])
    first_rows = [r * prompt + TEXT_BEFORE for r in range(requests)]
    images = StepImages(
        torch.tensor(first_rows), owner, first_rows, [shape.live] * requests, [0.0] * requests
    )
    plan = row_plan.plan_live_rows(requests * prompt, images)
    if shape.kept is not None:
        plan = _kept_rows(plan, images, shape.kept, draw)
    positions = torch.arange(prompt).repeat(requests)
    length = prompt + shape.decodes
    blocks = -(-length // BLOCK_SIZE)
    # Block 0 is vLLM's null block.
    table = 1 + torch.arange(requests * blocks, dtype=torch.int32).view(requests, blocks)
    facts = new_page_facts(1 + requests * blocks, BLOCK_SIZE, patches, torch.device("cpu"))
    request = torch.arange(requests).repeat_interleave(prompt)
    slots = (1 + request * blocks) * BLOCK_SIZE + positions
    stored = slots[plan.stored_at]
    facts.view(-1, fact_words(patches))[stored] = plan_facts(plan, images, positions)
    query_start_loc_cpu = [r * prompt for r in range(requests + 1)]
    step_images: StepImages | None = images
    seq_lens = torch.full((requests,), length, dtype=torch.int32)
    if shape.decodes:
        rows = torch.arange(requests)
        new = (1 + rows * blocks) * BLOCK_SIZE + prompt
        written = torch.cat([stored, new])
        stored = torch.cat([new, new.new_zeros(shape.padding)])
        plan, step_images = row_plan.plan_text_rows(requests + shape.padding), None
        positions = torch.cat([torch.full_like(rows, prompt), rows.new_zeros(shape.padding)])
        query_start_loc_cpu = list(range(requests + shape.padding + 1))
        table = torch.cat([table, table.new_zeros(shape.padding, blocks)])
        seq_lens = torch.cat([seq_lens, seq_lens.new_zeros(shape.padding)])
    else:
        written = stored
    width = (heads.kv_heads, 2 * heads.head_size)
    numbers = torch.randn(written.shape[0], *width, generator=draw)
    exponent = torch.arange(0, heads.head_size, 2) / heads.head_size
    ranks = step_images is not None and shape.kept is None
    scene = Scene(
        row_plan=plan,
        images=step_images,
        positions=positions,
        query_start_loc_cpu=query_start_loc_cpu,
        query_start_loc=torch.tensor(query_start_loc_cpu, dtype=torch.int32).clamp(
            max=query_start_loc_cpu[-1] - shape.padding
        ),
        ranking_queries=[
            RankingQuery(r, (r + 1) * prompt - 1, r * prompt) for r in range(requests if ranks else 0)
        ],
        facts=facts,
        block_table=table,
        seq_lens=seq_lens,
        slots=stored,
        kv_row_index=kv_row_index(stored, BLOCK_SIZE, KV_ROWS_PER_BLOCK),
        kv_rows=numbers[:0],
        query=torch.randn(plan.rows.shape[0], heads.heads, heads.head_size, generator=draw),
        cos_sin_cache=make_cos_sin_cache(10000.0**-exponent, length + 1),
        patches=patches,
        scale=heads.head_size**-0.5,
        padding=shape.padding,
    ).to(device, dtype)
    # The pool is mostly empty, and large: it is made where it is used.
    rows = KV_ROWS_PER_BLOCK * (1 + requests * blocks)
    scene.kv_rows = torch.full((rows, *width), float("nan"), dtype=dtype, device=device)
    own = kv_row_index(written, BLOCK_SIZE, KV_ROWS_PER_BLOCK).to(device)
    scene.kv_rows[own] = numbers.to(dtype).to(device)
    return scene


def _kept_rows(plan: RowPlan, images: StepImages, kept: int, draw: torch.Generator) -> RowPlan:
    """Any ``kept`` live tokens of every image and all text."""
    keep = plan.image < 0
    for image in range(len(images.counts)):
        own = (plan.image == image).nonzero()[:, 0]
        keep[own[torch.randperm(own.shape[0], generator=draw)[:kept]]] = True
    return row_plan.plan_kept_rows(plan, images, keep, kept * len(images.counts))


def reference_results(scene: Scene) -> dict[str, torch.Tensor]:
    """What attention and, where the step ranks, the importance must be; float32 on the CPU.

    Rows of padding are 0.
    """
    return scene.results(ReferenceAttention(), torch.zeros_like(scene.query), scene.padding)
