"""Pages of one layer with requests in them, and what every implementation of attention must make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support import reference
from vllm_hybrid.attention import interface
from vllm_hybrid.attention.interface import AttentionOps, RankingQuery, TierBatch
from vllm_hybrid.kv import page_facts
from vllm_hybrid.method import row_plan
from vllm_hybrid.method.row_plan import RowPlan, StepImages

THETA = 10_000.0
PATCHES = 40
Ops = AttentionOps[Any, Any]

# How close answers in float32 are: scores of ten and more are rounded in their last bit, and the weights they
# give by as much as that.
FLOAT32 = {"atol": 2e-5, "rtol": 1e-4}


def owners(live: int, patches: int = PATCHES) -> Tensor:
    """A random owner map in which each of ``live`` tokens holds at least one patch."""
    owner = torch.cat([torch.arange(live), torch.randint(live, (patches - live,))])
    return owner[torch.randperm(patches)]


@dataclass
class World:
    """Pages of one layer and tier with several requests in them, and what each row was when it was stored."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    lengths: list[int]
    image_starts: list[list[int]]
    live: list[list[int]]

    def __post_init__(self) -> None:
        blocks = [-(-length // self.block_size) for length in self.lengths]
        total = sum(blocks) + 3
        names = torch.randperm(total - 1)[: sum(blocks)] + 1
        self.table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for request, mine in enumerate(names.split(blocks)):
            self.table[request, : len(mine)] = mine.int()
        # Whatever was there before: stale facts and values must never be read.
        shape = (total, self.block_size, page_facts.fact_words(PATCHES))
        self.facts = torch.randint(1, 90, shape, dtype=torch.int32)
        raw = torch.full((total, 3, self.block_size, self.kv_heads, 2 * self.head_size), 1e9)
        self.rows, self.step = interface.as_kv_rows(raw[:, 1].permute(0, 2, 1, 3))
        firsts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.query_start_loc_cpu = firsts
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])
        self.request = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        starts = [firsts[r] + s for r, own in enumerate(self.image_starts) for s in own]
        owner = [owners(n) for own in self.live for n in own]
        self.images = StepImages.of(
            starts,
            torch.stack(owner) if owner else torch.empty(0, PATCHES, dtype=torch.int64),
            torch.zeros(len(owner), dtype=torch.int64),
            [0.0],
            self.positions,
        )
        inverse = THETA ** -(torch.arange(0, self.head_size, 2) / self.head_size)
        self.cos_sin_cache = interface.make_cos_sin_cache(inverse, max(self.lengths))
        self.scale = self.head_size**-0.5

    def members(self, plan: RowPlan, request: int) -> tuple[list[int], list[list[int]]]:
        """Live rows of a request and the virtual positions of each, straight from row_of."""
        stretch = range(self.query_start_loc_cpu[request], self.query_start_loc_cpu[request + 1])
        held: dict[int, list[int]] = {}
        for place in stretch:
            row = int(plan.row_of[place])
            if row >= 0:
                held.setdefault(row, []).append(int(self.positions[place]))
        return sorted(held), [held[row] for row in sorted(held)]

    def slots(self, plan: RowPlan) -> tuple[Tensor, Tensor]:
        at = plan.stored_at
        block = self.table[self.request[at], self.positions[at] // self.block_size].long()
        return block, self.positions[at] % self.block_size

    def store(self, plan: RowPlan, key: Tensor, value: Tensor, ops: Ops) -> Tensor:
        """Write facts, and keys rotated as the server stores them; returns the KV rows."""
        block, offset = self.slots(plan)
        self.facts[block, offset] = page_facts.plan_facts(plan, self.images, self.positions)
        where = block * self.step + offset
        rotated = interface.rotate(key, self.cos_sin_cache[self.positions[plan.rows]]).to(key.dtype)
        stored = torch.where((plan.image >= 0)[:, None, None], key, rotated)
        ops.write_pages(stored, value, self.rows, where)
        return where

    def key_index(self, ops: Ops) -> Any:
        """The virtual keys of all requests, read from their pages."""
        return ops.build_key_index(self.facts, self.table, torch.tensor(self.lengths), PATCHES, self.step)

    def batch(self, plan: RowPlan, where: Tensor, ranking: list[RankingQuery]) -> TierBatch:
        query_start_loc = torch.tensor(self.query_start_loc_cpu, dtype=torch.int32)
        return TierBatch(
            row_plan=plan,
            positions=self.positions,
            query_start_loc_cpu=self.query_start_loc_cpu,
            query_start_loc=query_start_loc,
            kv_row_index=where,
            ranking_queries=ranking,
            length_bounds=self.lengths,
            has_images=bool(self.images.counts),
        )

    def ranked_by_last_rows(self) -> list[RankingQuery]:
        """Each request's last row ranks all its images."""
        return [
            RankingQuery(r, self.query_start_loc_cpu[r + 1] - 1, self.query_start_loc_cpu[r] + starts[0])
            for r, starts in enumerate(self.image_starts)
            if starts
        ]

    def ranked_on_the_way(self) -> list[RankingQuery]:
        """Any text rows behind images, some of them or none; what they leave is the last row's."""
        queries = []
        for request, starts in enumerate(self.image_starts):
            first, end = self.query_start_loc_cpu[request : request + 2]
            unranked = None
            ends = [*starts[1:], self.lengths[request]] if starts else []
            for start, following in zip(starts, ends, strict=True):
                unranked = start if unranked is None else unranked
                text = range(start + PATCHES, following)
                if text and torch.rand(()) < 0.6:
                    row = text[int(torch.randint(len(text), ()))]
                    queries.append(RankingQuery(request, first + row, first + unranked))
                    unranked = None
            if unranked is not None:
                queries.append(RankingQuery(request, end - 1, first + unranked))
        return queries


SHAPES = {
    "one head": (1, 1, 64, 7),
    "grouped heads": (6, 2, 64, 5),
    "wide heads": (2, 2, 128, 16),
    "block of one": (2, 1, 32, 1),
}


def several_requests(shape: tuple[int, int, int, int]) -> World:
    """Requests with one image, two, none, and one at the start; heads, key heads, head size, block size."""
    lengths = [3 + PATCHES + 6, 2 * PATCHES + 5, 11, PATCHES + 1]
    return World(*shape, lengths, [[3], [0, PATCHES + 2], [], [0]], [[9], [1, PATCHES], [], [17]])


def conversations(shape: tuple[int, int, int, int]) -> World:
    """Requests with up to three images and text between and behind them, some of which end in an image."""
    lengths = [3 * PATCHES + 15, 9, 2 * PATCHES + 6, 3 * PATCHES + 3, PATCHES + 4]
    starts = [[2, PATCHES + 7, 2 * PATCHES + 7], [], [0, PATCHES + 6], [1, PATCHES + 1, 2 * PATCHES + 3], [2]]
    live = [[9, PATCHES, 1], [], [5, 17], [3, 12, 20], [8]]
    return World(*shape, lengths, starts, live)


def random_rows(world: World, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value before rotation."""
    return (
        torch.randn(rows, world.heads, world.head_size) * 2,
        torch.randn(rows, world.kv_heads, world.head_size),
        torch.randn(rows, world.kv_heads, world.head_size),
    )


def rotated_queries(world: World, plan: RowPlan, query: Tensor) -> Tensor:
    rotated = interface.rotate(query, world.cos_sin_cache[world.positions[plan.rows]])
    return torch.where((plan.image >= 0)[:, None, None], query, rotated)


def kept_images(lower: RowPlan, keep: Tensor) -> int:
    return int((keep & (lower.image >= 0)).sum())


def later_step(
    plan: RowPlan, positions: Tensor, starts: list[int], where: Tensor, lengths: list[int]
) -> TierBatch:
    """A step of text of requests that began before."""
    query_start_loc = torch.tensor(starts, dtype=torch.int32)
    return TierBatch(plan, positions, starts, query_start_loc, where, [], lengths, has_images=False)


def check_attention(world: World, plan: RowPlan, ops: Ops) -> None:
    query, key, value = random_rows(world, plan.rows.shape[0])
    where = world.store(plan, key, value, ops)
    attention = ops.plan(world.batch(plan, where, []), world.key_index(ops))
    given = rotated_queries(world, plan, query)
    out = torch.full_like(query, torch.nan)
    ops.attend(given, world.rows, attention, world.cos_sin_cache, world.scale, out)
    for request in range(len(world.lengths)):
        rows, positions = world.members(plan, request)
        wanted = reference.vtu_attention(query[rows], key[rows], value[rows], positions, THETA)
        torch.testing.assert_close(out[rows], wanted, **FLOAT32)


def check_importance(world: World, ranking: list[RankingQuery], ops: Ops) -> None:
    """What ranking queries give to the live rows that they rank, and zero to all others."""
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = random_rows(world, plan.rows.shape[0])
    where = world.store(plan, key, value, ops)
    attention = ops.plan(world.batch(plan, where, ranking), world.key_index(ops))
    given = rotated_queries(world, plan, query)
    got = ops.importance(given, world.rows, attention, world.cos_sin_cache, world.scale)
    wanted = torch.zeros(plan.rows.shape[0])
    for asking in ranking:
        rows, positions = world.members(plan, asking.request)
        at = int(world.positions[asking.row])
        by_head = reference.importance_by_head(query[rows], key[rows], positions, at, THETA)
        for row, mass in zip(rows, by_head.sum(0), strict=True):
            if asking.first_row <= int(plan.rows[row]) <= asking.row:
                wanted[row] = mass
    torch.testing.assert_close(got, wanted, **FLOAT32)


def check_kept_rows(world: World, ops: Ops) -> None:
    """Rows that FastV keeps attend like the definition."""
    lower = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    keep = (lower.image < 0) | (torch.rand(lower.rows.shape[0]) < 0.5)
    for image in range(world.images.first_row.shape[0]):
        keep[(lower.image == image).nonzero()[0]] |= not keep[lower.image == image].any()
    # The row that answers for a prompt's end always stays.
    keep[lower.row_of[torch.tensor(world.query_start_loc_cpu[1:]) - 1]] = True
    check_attention(world, row_plan.plan_kept_rows(lower, world.images, keep, kept_images(lower, keep)), ops)


def check_later_steps(world: World, ops: Ops) -> None:
    """Decodes and chunks read what earlier steps stored."""
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, ops)
    # The last positions of each request once more, as a later step would bring them: a chunk of text for
    # the text request, one decoded position for the others that end in text.
    later = {0: 1, 1: 1, 2: 4}
    starts = [0]
    picked: list[int] = []
    for request, count in later.items():
        end = world.query_start_loc_cpu[request + 1]
        picked += range(end - count, end)
        starts.append(len(picked))
    virtual = torch.tensor(picked)
    rows = torch.arange(len(picked))
    step = row_plan.plan_text_rows(len(picked))
    chosen = list(later)
    lengths = torch.tensor(world.lengths)[chosen]
    keys = ops.build_key_index(world.facts, world.table[chosen], lengths, PATCHES, world.step)
    batch = later_step(step, world.positions[virtual], starts, rows, lengths.tolist())
    given = interface.rotate(query[plan.row_of[virtual]], world.cos_sin_cache[world.positions[virtual]])
    out = torch.full_like(given, torch.nan)
    ops.attend(given, world.rows, ops.plan(batch, keys), world.cos_sin_cache, world.scale, out)
    for number, request in enumerate(chosen):
        own, positions = world.members(plan, request)
        wanted = reference.vtu_attention(query[own], key[own], value[own], positions, THETA)
        stretch = slice(starts[number], starts[number + 1])
        torch.testing.assert_close(out[stretch], wanted[-later[request] :], **FLOAT32)


def last_rows(world: World, plan: RowPlan) -> Tensor:
    """bool [rows of plan], the rows of the requests' last positions."""
    last = torch.zeros(plan.rows.shape[0], dtype=torch.bool)
    last[plan.row_of[torch.tensor(world.query_start_loc_cpu[1:]) - 1]] = True
    return last


def decode_step(world: World, plan: RowPlan, unwritten: Tensor) -> interface.DecodeStep:
    """The step that brings each request's last position, which is text, as one row.

    Args:
        world: the requests.
        plan: of all rows.
        unwritten: bool [rows of plan], rows whose facts and keys are not in the pages yet: the last ones.

    """
    block, offset = world.slots(plan)
    slots = (block * world.block_size + offset)[unwritten]
    requests = len(world.lengths)
    return interface.DecodeStep(
        row_plan=row_plan.plan_text_rows(requests),
        positions=torch.tensor(world.lengths) - 1,
        query_start_loc_cpu=list(range(requests + 1)),
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32),
        facts=world.facts,
        block_table=world.table,
        seq_lens=torch.tensor(world.lengths).int(),
        slots=slots,
        patches=PATCHES,
        kv_rows_per_block=world.step,
    )


def check_decodes(world: World, ops: Ops, dtype: torch.dtype = torch.float32) -> None:
    """A step of decodes alone, planned at once: everything but the last rows was there before."""
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = (x.to(dtype) for x in random_rows(world, plan.rows.shape[0]))
    world.rows = world.rows.to(dtype)
    last = torch.tensor(world.query_start_loc_cpu[1:]) - 1
    new = last_rows(world, plan)
    stale = world.facts.clone()
    where = world.store(plan, key, value, ops)
    block, offset = (x[new] for x in world.slots(plan))
    world.facts[block, offset] = stale[block, offset]
    world.rows[where[new]] = 1e9
    foreign = torch.ones(len(world.lengths), dtype=torch.bool)
    attention = ops.plan_decodes(decode_step(world, plan, new), foreign)
    assert attention is not None and not foreign.any()
    assert not world.facts[block, offset, page_facts.START].any()
    rotated = interface.rotate(key[new], world.cos_sin_cache[world.positions[last]]).to(dtype)
    assert torch.equal(attention.batch.kv_row_index, where[new])
    ops.write_pages(rotated, value[new], world.rows, attention.batch.kv_row_index)
    given = interface.rotate(query[new], world.cos_sin_cache[world.positions[last]]).to(dtype)
    out = torch.full_like(given, torch.nan)
    ops.attend(given, world.rows, attention, world.cos_sin_cache, world.scale, out)
    check_last_rows(world, plan, (query, key, value), out)


def check_last_rows(world: World, plan: RowPlan, given: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    """Answers of each request's last row, from query, key and value of all rows before rotation."""
    close = FLOAT32 if out.dtype == torch.float32 else {"atol": 0.06, "rtol": 0}
    for request in range(len(world.lengths)):
        rows, positions = world.members(plan, request)
        query, key, value = (x[rows].float() for x in given)
        wanted = reference.vtu_attention(query, key, value, positions, THETA)
        torch.testing.assert_close(out[request].float(), wanted[-1], **close)
