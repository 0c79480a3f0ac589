"""Pages of one layer with requests in them, and what every implementation of attention must make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support import reference
from vllm_hybrid.attention import cpu, interface
from vllm_hybrid.attention.interface import TierBatch
from vllm_hybrid.kv import page_facts
from vllm_hybrid.method import row_plan
from vllm_hybrid.method.row_plan import RowPlan, StepImages

THETA = 10_000.0
PATCHES = 40
Attend = Callable[..., None]


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
        self.rows, self.step = interface.page_rows(raw[:, 1].permute(0, 2, 1, 3))
        firsts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.query_start = firsts
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])
        self.request = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        starts = [firsts[r] + s for r, own in enumerate(self.image_starts) for s in own]
        owner = [owners(n) for own in self.live for n in own]
        self.images = StepImages.of(
            starts,
            torch.stack(owner) if owner else torch.empty(0, PATCHES, dtype=torch.int64),
        )
        inverse = THETA ** -(torch.arange(0, self.head_size, 2) / self.head_size)
        self.angles = interface.rotation_angles(inverse, max(self.lengths))
        self.scale = self.head_size**-0.5

    def members(self, plan: RowPlan, request: int) -> tuple[list[int], list[list[int]]]:
        """Live rows of a request and the virtual positions of each, straight from row_of."""
        stretch = range(self.query_start[request], self.query_start[request + 1])
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

    def store(self, plan: RowPlan, key: Tensor, value: Tensor) -> Tensor:
        """Write facts, and keys rotated as the server stores them; returns the page rows."""
        block, offset = self.slots(plan)
        self.facts[block, offset] = page_facts.plan_facts(plan, self.images, self.positions)
        where = block * self.step + offset
        turned = interface.rotate(key, self.angles[self.positions[plan.rows]])
        stored = torch.where((plan.image >= 0)[:, None, None], key, turned)
        cpu.write_pages(stored, value, self.rows, where)
        return where

    def batch(self, plan: RowPlan, where: Tensor, walk: Any, ranked: list[int]) -> TierBatch:
        keys = walk(self.facts, self.table, torch.tensor(self.lengths), PATCHES, self.step)
        query_ptr = torch.tensor(self.query_start, dtype=torch.int32)
        return TierBatch(plan, self.positions, self.query_start, query_ptr, where, keys, ranked)


SHAPES = {
    "one head": (1, 1, 64, 7),
    "grouped heads": (6, 2, 64, 5),
    "wide heads": (2, 2, 128, 16),
    "block of one": (2, 1, 32, 1),
}


def random_rows(world: World, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value before rotation."""
    return (
        torch.randn(rows, world.heads, world.head_size) * 2,
        torch.randn(rows, world.kv_heads, world.head_size),
        torch.randn(rows, world.kv_heads, world.head_size),
    )


def turned_queries(world: World, plan: RowPlan, query: Tensor) -> Tensor:
    turned = interface.rotate(query, world.angles[world.positions[plan.rows]])
    return torch.where((plan.image >= 0)[:, None, None], query, turned)


def kept_images(lower: RowPlan, keep: Tensor) -> int:
    return int((keep & (lower.image >= 0)).sum())


def check_attention(world: World, plan: RowPlan, implementation: tuple[Any, Attend, Any]) -> None:
    walk, attend, mass = implementation
    query, key, value = random_rows(world, plan.rows.shape[0])
    where = world.store(plan, key, value)
    ranked = [r for r, starts in enumerate(world.image_starts) if starts]
    batch = world.batch(plan, where, walk, ranked)
    given = turned_queries(world, plan, query)
    out = torch.full_like(query, torch.nan)
    attend(given, world.rows, batch, world.angles, world.scale, out)
    got_mass = mass(given, world.rows, batch, world.angles, world.scale)
    for request, length in enumerate(world.lengths):
        rows, positions = world.members(plan, request)
        wanted = reference.vtu_attention(query[rows], key[rows], value[rows], positions, THETA)
        torch.testing.assert_close(out[rows], wanted, atol=2e-5, rtol=1e-4)
        last_stands = any(length - 1 in own for own in positions)
        if request in ranked and last_stands:
            wanted_mass = reference.attention_mass(query[rows], key[rows], positions, length - 1, THETA).sum(
                0
            )
            torch.testing.assert_close(got_mass[rows], wanted_mass, atol=2e-5, rtol=1e-4)
        elif request not in ranked:
            assert not got_mass[rows].any()


def check_kept_rows(world: World, implementation: tuple[Any, Attend, Any]) -> None:
    """Rows that FastV keeps attend like the definition."""
    lower = row_plan.plan_live_rows(world.query_start[-1], world.images)
    keep = (lower.image < 0) | (torch.rand(lower.rows.shape[0]) < 0.5)
    for image in range(world.images.first_row.shape[0]):
        keep[(lower.image == image).nonzero()[0]] |= not keep[lower.image == image].any()
    # The row that answers for a prompt's end always stays.
    keep[lower.row_of[torch.tensor(world.query_start[1:]) - 1]] = True
    check_attention(
        world, row_plan.plan_kept_rows(lower, world.images, keep, kept_images(lower, keep)), implementation
    )


def check_later_steps(world: World, implementation: tuple[Any, Attend, Any]) -> None:
    """Decodes and chunks read what earlier steps stored."""
    walk, attend, _ = implementation
    plan = row_plan.plan_live_rows(world.query_start[-1], world.images)
    query, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value)
    # The last positions of each request once more, as a later step would bring them: a chunk of text for
    # the text request, one decoded position for the others that end in text.
    later = {0: 1, 1: 1, 2: 4}
    starts, picked = [0], []
    for request, count in later.items():
        end = world.query_start[request + 1]
        picked += range(end - count, end)
        starts.append(len(picked))
    virtual = torch.tensor(picked)
    rows = torch.arange(len(picked))
    step = RowPlan(rows, rows, rows, torch.full_like(rows, -1))
    chosen = list(later)
    keys = walk(world.facts, world.table[chosen], torch.tensor(world.lengths)[chosen], PATCHES, world.step)
    query_ptr = torch.tensor(starts, dtype=torch.int32)
    batch = TierBatch(step, world.positions[virtual], starts, query_ptr, rows, keys, [])
    given = interface.rotate(query[plan.row_of[virtual]], world.angles[world.positions[virtual]])
    out = torch.full_like(given, torch.nan)
    attend(given, world.rows, batch, world.angles, world.scale, out)
    for number, request in enumerate(chosen):
        own, positions = world.members(plan, request)
        wanted = reference.vtu_attention(query[own], key[own], value[own], positions, THETA)
        stretch = slice(starts[number], starts[number + 1])
        torch.testing.assert_close(out[stretch], wanted[-later[request] :], atol=2e-5, rtol=1e-4)
