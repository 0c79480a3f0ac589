"""Scenes for the kernels: a step of requests with one image each, as kernels and reference take it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_hybrid.attention import reference
from vllm_hybrid.attention.interface import TierBatch, rotation_angles
from vllm_hybrid.kv.page_facts import fact_words, new_page_facts, plan_facts
from vllm_hybrid.method import row_plan
from vllm_hybrid.method.row_plan import RowPlan, StepImages

BLOCK_SIZE = 16
# Page rows from one block of a layer to its next: other layers' rows of the block lie between.
ROWS_PER_BLOCK = 2 * BLOCK_SIZE
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
        plan: its rows.
        images: its images.
        positions: int64 [N].
        query_start: a request's stretch of virtual rows, on the host.
        query_ptr: int32 [requests + 1], the same as the device has it: padding stretches over nothing.
        ranked: requests whose last query ranks.
        facts: page facts of all requests, this step's rows included.
        block_table: int32 [requests, blocks].
        seq_lens: int32 [requests].
        page_slots: int64 [R], page row of each row of the step.
        pages: [rows, kv_heads, 2 * head_size].
        query: [R, heads, head_size], text rows rotated, image rows not.
        angles: float32 [positions, head_size].
        padding: requests, and rows, of nothing at the end.

    """

    plan: RowPlan
    images: StepImages | None
    positions: torch.Tensor
    query_start: list[int]
    query_ptr: torch.Tensor
    ranked: list[int]
    facts: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    page_slots: torch.Tensor
    pages: torch.Tensor
    query: torch.Tensor
    angles: torch.Tensor
    patches: int
    scale: float
    padding: int = 0

    def batch(self, keys: Any) -> TierBatch:
        """The step as an implementation takes it, given the key lists that the same one read."""
        return TierBatch(
            plan=self.plan,
            positions=self.positions,
            query_start=self.query_start,
            query_ptr=self.query_ptr,
            page_slots=self.page_slots,
            keys=keys,
            ranked=self.ranked,
        )

    def to(self, device: str, dtype: torch.dtype) -> Scene:
        """A copy on a device, its floating-point pages and queries in a dtype."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.to(device, dtype) if name in ("pages", "query") else value.to(device)
            elif isinstance(value, RowPlan):
                value = RowPlan(**{k: v.to(device) for k, v in vars(value).items()})
            elif isinstance(value, StepImages):
                first, owner = value.first_row.to(device), value.owner.to(device)
                value = StepImages(first, owner, value.first_rows, value.counts)
            moved[name] = value
        return Scene(**moved)

    def moved_behind(self, bytes_before: int) -> Scene:
        """The same scene with its pages behind so many bytes of others', which hold no number."""
        row_bytes = self.pages[0].numel() * self.pages.element_size()
        blocks = -(-bytes_before // (row_bytes * ROWS_PER_BLOCK))
        rows = blocks * ROWS_PER_BLOCK
        pages = self.pages.new_full((rows + self.pages.shape[0], *self.pages.shape[1:]), float("nan"))
        pages[rows:] = self.pages
        facts = self.facts.new_zeros(blocks + self.facts.shape[0], *self.facts.shape[1:])
        facts[blocks:] = self.facts
        return replace(
            self,
            pages=pages,
            facts=facts,
            block_table=self.block_table + blocks,
            page_slots=self.page_slots + rows,
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
    images = StepImages(torch.tensor(first_rows), owner, first_rows, [shape.live] * requests)
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
    query_start = [r * prompt for r in range(requests + 1)]
    step_images: StepImages | None = images
    seq_lens = torch.full((requests,), length, dtype=torch.int32)
    if shape.decodes:
        rows = torch.arange(requests)
        new = (1 + rows * blocks) * BLOCK_SIZE + prompt
        written = torch.cat([stored, new])
        stored = torch.cat([new, new.new_zeros(shape.padding)])
        plan, step_images = _decoded_rows(requests + shape.padding), None
        positions = torch.cat([torch.full_like(rows, prompt), rows.new_zeros(shape.padding)])
        query_start = list(range(requests + shape.padding + 1))
        table = torch.cat([table, table.new_zeros(shape.padding, blocks)])
        seq_lens = torch.cat([seq_lens, seq_lens.new_zeros(shape.padding)])
    else:
        written = stored
    width = (heads.kv_heads, 2 * heads.head_size)
    numbers = torch.randn(written.shape[0], *width, generator=draw)
    exponent = torch.arange(0, heads.head_size, 2) / heads.head_size
    ranked = list(range(requests)) if step_images is not None and shape.kept is None else []
    scene = Scene(
        plan=plan,
        images=step_images,
        positions=positions,
        query_start=query_start,
        query_ptr=torch.tensor(query_start, dtype=torch.int32).clamp(max=query_start[-1] - shape.padding),
        ranked=ranked,
        facts=facts,
        block_table=table,
        seq_lens=seq_lens,
        page_slots=_page_rows(stored),
        pages=numbers[:0],
        query=torch.randn(plan.rows.shape[0], heads.heads, heads.head_size, generator=draw),
        angles=rotation_angles(10000.0**-exponent, length + 1),
        patches=patches,
        scale=heads.head_size**-0.5,
        padding=shape.padding,
    ).to(device, dtype)
    # The pool is mostly empty, and large: it is made where it is used.
    rows = ROWS_PER_BLOCK * (1 + requests * blocks)
    scene.pages = torch.full((rows, *width), float("nan"), dtype=dtype, device=device)
    scene.pages[_page_rows(written).to(device)] = numbers.to(dtype).to(device)
    return scene


def _page_rows(slots: torch.Tensor) -> torch.Tensor:
    return slots // BLOCK_SIZE * ROWS_PER_BLOCK + slots % BLOCK_SIZE


def _decoded_rows(rows: int) -> RowPlan:
    own = torch.arange(rows)
    return RowPlan(rows=own, row_of=own, stored_at=own, image=torch.full_like(own, -1))


def _kept_rows(plan: RowPlan, images: StepImages, kept: int, draw: torch.Generator) -> RowPlan:
    """Any ``kept`` live tokens of every image and all text."""
    keep = plan.image < 0
    for image in range(len(images.counts)):
        own = (plan.image == image).nonzero()[:, 0]
        keep[own[torch.randperm(own.shape[0], generator=draw)[:kept]]] = True
    return row_plan.plan_kept_rows(plan, images, keep, kept * len(images.counts))


def reference_results(scene: Scene) -> dict[str, torch.Tensor]:
    """What attention and, where the step ranks, the ranking mass must be; float32 on the CPU.

    Rows of padding are 0.
    """
    keys = reference.walk_pages(scene.facts, scene.block_table, scene.seq_lens, scene.patches, ROWS_PER_BLOCK)
    batch = scene.batch(keys)
    real = len(scene.query_start) - 1 - scene.padding
    batch.query_start = scene.query_start[: real + 1]
    out = torch.zeros_like(scene.query)
    reference.attend(scene.query, scene.pages, batch, scene.angles, scene.scale, out)
    results = {"attend": out}
    if batch.ranked:
        results["mass"] = reference.attention_mass(scene.query, scene.pages, batch, scene.angles, scene.scale)
    return results
