"""Batch plan, pages and virtual unmerging attention, both implementations, against the reference."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from vllm_hybrid.attention import cpu, interface
from vllm_hybrid.attention import reference as oracle
from vllm_hybrid.attention.interface import TierBatch
from vllm_hybrid.kv import page_facts
from vllm_hybrid.method import row_plan
from vllm_hybrid.method.row_plan import RowPlan, StepImages

pytestmark = pytest.mark.usefixtures("two_threads")
THETA = 10_000.0
PATCHES = 40
Attend = Callable[..., None]


def _attend_cpu(
    query: Tensor, rows: Tensor, batch: TierBatch, angles: Tensor, scale: float, out: Tensor
) -> None:
    plan = cpu.plan_attention(batch)
    cpu.attend(query, rows, batch, plan, angles, scale, out)


IMPLEMENTATIONS: dict[str, tuple[Any, Attend, Any]] = {
    "reference": (oracle.walk_pages, oracle.attend, oracle.attention_mass),
    "cpu": (cpu.walk_pages, _attend_cpu, cpu.attention_mass),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> tuple[Any, Attend, Any]:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def seed() -> int:
    """A fresh seed each run, shown by pytest when a test fails."""
    chosen = secrets.randbelow(1 << 31)
    torch.manual_seed(chosen)
    return chosen


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


@pytest.fixture(params=SHAPES)
def world(request: pytest.FixtureRequest, seed: int) -> World:
    heads, kv_heads, head_size, block_size = SHAPES[request.param]
    return World(
        heads,
        kv_heads,
        head_size,
        block_size,
        lengths=[3 + PATCHES + 6, 2 * PATCHES + 5, 11, PATCHES + 1],
        image_starts=[[3], [0, PATCHES + 2], [], [0]],
        live=[[9], [1, PATCHES], [], [17]],
    )


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


def test_live_rows_attend_like_the_definition(
    world: World, implementation: tuple[Any, Attend, Any], seed: int
) -> None:
    check_attention(world, row_plan.plan_live_rows(world.query_start[-1], world.images), implementation)


def test_kept_rows_attend_like_the_definition(
    world: World, implementation: tuple[Any, Attend, Any], seed: int
) -> None:
    lower = row_plan.plan_live_rows(world.query_start[-1], world.images)
    keep = (lower.image < 0) | (torch.rand(lower.rows.shape[0]) < 0.5)
    for image in range(world.images.first_row.shape[0]):
        keep[(lower.image == image).nonzero()[0]] |= not keep[lower.image == image].any()
    # The row that answers for a prompt's end always stays.
    keep[lower.row_of[torch.tensor(world.query_start[1:]) - 1]] = True
    check_attention(
        world, row_plan.plan_kept_rows(lower, world.images, keep, kept_images(lower, keep)), implementation
    )


def test_kept_rows_move_up_in_their_old_order(world: World, seed: int) -> None:
    lower = row_plan.plan_live_rows(world.query_start[-1], world.images)
    keep = (lower.image < 0) | (torch.rand(lower.rows.shape[0]) < 0.6)
    upper = row_plan.plan_kept_rows(lower, world.images, keep, kept_images(lower, keep))
    assert torch.equal(upper.rows, lower.rows[keep])
    for image, first in enumerate(world.images.first_row.tolist()):
        mine = upper.image == image
        assert upper.stored_at[mine].tolist() == list(range(first, first + int(mine.sum())))
    text = upper.image < 0
    assert torch.equal(upper.stored_at[text], upper.rows[text])
    dropped = ~keep[lower.row_of]
    assert torch.equal(upper.row_of < 0, dropped)


def test_decode_and_chunks_read_what_earlier_steps_stored(
    world: World, implementation: tuple[Any, Attend, Any], seed: int
) -> None:
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


def test_walks_agree_and_jump_over_holes(world: World, seed: int) -> None:
    plan = row_plan.plan_live_rows(world.query_start[-1], world.images)
    _, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value)
    lengths = torch.tensor(world.lengths)
    slow = oracle.walk_pages(world.facts, world.table, lengths, PATCHES, world.step)
    fast = cpu.walk_pages(world.facts, world.table, lengths, PATCHES, world.step)
    for name, wanted in vars(slow).items():
        assert torch.equal(getattr(fast, name), wanted), name
    assert slow.member_pos.shape[0] == sum(world.lengths)


@pytest.mark.parametrize("walk", [oracle.walk_pages, cpu.walk_pages])
def test_a_page_of_another_request_is_an_error(world: World, walk: Any, seed: int) -> None:
    plan = row_plan.plan_live_rows(world.query_start[-1], world.images)
    _, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value)
    swapped = world.table[[1, 0, 2, 3]]
    with pytest.raises(RuntimeError, match="another request's data"):
        walk(world.facts, swapped, torch.tensor([world.lengths[1]] * 4), PATCHES, world.step)


@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 128), (2, 2, 96)])
@pytest.mark.parametrize("later", [0, 1, 9])
@pytest.mark.parametrize("text", [12, 310])
def test_bfloat16_stays_within_its_rounding(
    heads: tuple[int, int, int], text: int, later: int, seed: int
) -> None:
    """Whole prompts, and chunks of text behind what an earlier step stored, on every kernel there is."""
    lengths = [PATCHES + text, 2 * PATCHES + 2 * text]
    world = World(*heads, 8, lengths, [[2], [0, PATCHES]], [[11], [PATCHES, 1]])
    plan = row_plan.plan_live_rows(world.query_start[-1], world.images)
    query, key, value = (x.bfloat16() for x in random_rows(world, plan.rows.shape[0]))
    world.rows = world.rows.bfloat16()
    block, offset = world.slots(plan)
    world.facts[block, offset] = page_facts.plan_facts(plan, world.images, world.positions)
    turned = interface.rotate(key, world.angles[world.positions[plan.rows]]).bfloat16()
    stored = torch.where((plan.image >= 0)[:, None, None], key, turned)
    where = block * world.step + offset
    cpu.write_pages(stored, value, world.rows, where)
    given = turned_queries(world, plan, query).bfloat16()
    batch = world.batch(plan, where, cpu.walk_pages, [])
    asked = torch.arange(plan.rows.shape[0])
    if later:
        ends = world.query_start[1:]
        virtual = torch.cat([torch.arange(end - later, end) for end in ends])
        asked = plan.row_of[virtual]
        rows = torch.arange(len(virtual))
        step = RowPlan(rows, rows, rows, torch.full_like(rows, -1))
        starts = [0, later, 2 * later]
        batch = TierBatch(
            step, world.positions[virtual], starts, torch.tensor(starts).int(), rows, batch.keys, []
        )
    out = torch.full_like(given[asked], torch.nan)
    _attend_cpu(given[asked], world.rows, batch, world.angles, world.scale, out)
    got = dict(zip(asked.tolist(), out.float(), strict=True))
    for request in range(2):
        mine, positions = world.members(plan, request)
        exact = (x[mine].float() for x in (query, key, value))
        wanted = reference.vtu_attention(*exact, positions, THETA)
        for row, answer in zip(mine, wanted, strict=True):
            if row in got:
                assert (got[row] - answer).abs().max() < 0.06


@pytest.mark.parametrize("heads", [(1, 1, 64), (6, 2, 64), (16, 16, 64), (20, 4, 128), (33, 3, 64)])
@pytest.mark.parametrize("requests", [1, 3])
def test_bfloat16_decodes_and_masses_equal_those_of_the_same_numbers_in_float32(
    heads: tuple[int, int, int], requests: int, seed: int
) -> None:
    lengths, starts = [PATCHES + 90, 2 * PATCHES + 7, 30], [[2], [0, PATCHES + 3], []]
    world = World(*heads, 8, lengths[:requests], starts[:requests], [[11], [PATCHES, 1], []][:requests])
    plan = row_plan.plan_live_rows(world.query_start[-1], world.images)
    query, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value)
    world.rows = world.rows.bfloat16()
    keys = cpu.walk_pages(world.facts, world.table, torch.tensor(world.lengths), PATCHES, world.step)
    last = torch.tensor(world.query_start[1:]) - 1
    order = torch.arange(requests)
    step = RowPlan(order, order, order, torch.full_like(order, -1))
    starts_of = list(range(requests + 1))
    batch = TierBatch(
        step, world.positions[last], starts_of, torch.tensor(starts_of).int(), order, keys, order.tolist()
    )
    given = interface.rotate(query[plan.row_of[last]], world.angles[world.positions[last]]).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        rows, out = world.rows.to(dtype), torch.full_like(given, torch.nan, dtype=dtype)
        _attend_cpu(given.to(dtype), rows, batch, world.angles, world.scale, out)
        everyone = torch.zeros(keys.row_page.shape[0])
        cpu._decode(
            given.to(dtype), order, order, rows, keys, world.angles, world.scale, out.clone(), everyone
        )
        found.append((out.float(), everyone))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=2**-7)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    assert abs(float(found[0][1].sum()) - heads[0] * requests) < 1e-3


@pytest.mark.parametrize("head_size", [64, 128])
def test_proportional_attention_weighs_keys_by_their_sizes(head_size: int, seed: int) -> None:
    lengths = torch.tensor([1, 97, 64, 6])
    query, key, value = (torch.randn(3, int(lengths.sum()), 5, head_size) / 2).bfloat16()
    size = torch.randint(1, 400, (int(lengths.sum()),)).float()
    scale = head_size**-0.5
    got = cpu.proportional_attention(query, key, value, lengths, size.log(), scale)
    if not cpu.extension().bf16_serves(head_size):
        assert got is None
        return
    for image in torch.arange(int(lengths.sum())).split(lengths.tolist()):
        q, k, v = (x[image].double() for x in (query, key, value))
        weight = (torch.einsum("qhd,khd->hqk", q, k) * scale).exp() * size[image].double()
        wanted = torch.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdim=True), v)
        torch.testing.assert_close(got[image].double(), wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("rise", [-9.0, 0.0, 0.25, 9.0])
def test_scores_may_rise_and_fall_by_any_amount_along_a_sequence(rise: float, seed: int) -> None:
    """Scores that bf16 holds exactly, so that only weights and values are rounded."""
    if not cpu.extension().bf16_serves(64):
        pytest.skip("this CPU has no bf16 kernel")
    lengths = torch.tensor([700, 129, 33])
    tokens = int(lengths.sum())
    query, key = torch.zeros(2, tokens, 2, 64)
    query[:, :, 5] = torch.tensor([1.0, 0.5])
    key[:, :, 5] = (rise * (torch.arange(tokens) // 8 * 8) + torch.randint(0, 6, (tokens,)))[:, None]
    query, key, value = (x.bfloat16() for x in (query, key, torch.randn(tokens, 2, 64)))
    log_size = torch.randint(1, 500, (tokens,)).log()
    got = cpu.proportional_attention(query, key, value, lengths, log_size, 1.0)
    assert got is not None
    for image in torch.arange(tokens).split(lengths.tolist()):
        q, k, v = (x[image].double() for x in (query, key, value))
        logit = torch.einsum("qhd,khd->hqk", q, k) + log_size[image].double()
        wanted = torch.einsum("hqk,khd->qhd", logit.softmax(-1), v)
        torch.testing.assert_close(got[image].double(), wanted, atol=0.02, rtol=0.02)


def test_layouts_other_than_slots_with_their_heads_together_are_refused() -> None:
    with pytest.raises(ValueError, match="BLNHC"):
        interface.page_rows(torch.empty(4, 2, 8, 64))
