"""Batch plan, pages and virtual unmerging attention, both implementations, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.support import reference
from tests.support.attention_world import (
    PATCHES,
    SHAPES,
    THETA,
    Ops,
    World,
    check_attention,
    check_importance,
    check_kept_rows,
    check_later_steps,
    conversations,
    kept_images,
    later_step,
    random_rows,
    rotated_queries,
    several_requests,
)
from vllm_hybrid.attention import cpu, interface
from vllm_hybrid.attention.reference import ReferenceAttention
from vllm_hybrid.method import row_plan
from vllm_hybrid.method.token_merging import PackedTokens

pytestmark = pytest.mark.usefixtures("two_threads")


@cache
def cpu_ops() -> Ops:
    """The C++ with the dense attention that serves, compiled for the first test that asks."""
    from vllm_hybrid.attention.cpu_dense import DenseCausalAttention

    return cpu.CpuAttention(DenseCausalAttention)


IMPLEMENTATIONS: dict[str, Callable[[], Ops]] = {"reference": ReferenceAttention, "cpu": cpu_ops}


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return IMPLEMENTATIONS[request.param]()


@pytest.fixture(params=SHAPES)
def world(request: pytest.FixtureRequest, seed: int) -> World:
    return several_requests(SHAPES[request.param])


def test_live_rows_attend_like_the_definition(world: World, ops: Ops, seed: int) -> None:
    check_attention(world, row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images), ops)


def test_last_rows_rank_like_the_definition(world: World, ops: Ops, seed: int) -> None:
    check_importance(world, world.ranked_by_last_rows(), ops)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_on_the_way_rank_like_the_definition(shape: str, ops: Ops, seed: int) -> None:
    several = conversations(SHAPES[shape])
    for _ in range(3):
        check_importance(several, several.ranked_on_the_way(), ops)


def test_nothing_is_ranked_without_a_ranking_query(world: World, ops: Ops, seed: int) -> None:
    check_importance(world, [], ops)


def test_kept_rows_attend_like_the_definition(world: World, ops: Ops, seed: int) -> None:
    check_kept_rows(world, ops)


def test_kept_rows_move_up_in_their_old_order(world: World, seed: int) -> None:
    lower = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
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


def test_decode_and_chunks_read_what_earlier_steps_stored(world: World, ops: Ops, seed: int) -> None:
    check_later_steps(world, ops)


def test_key_indices_agree_and_jump_over_holes(world: World, seed: int) -> None:
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    _, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, cpu_ops())
    slow, fast = (world.key_index(make()) for make in IMPLEMENTATIONS.values())
    for name, wanted in vars(slow).items():
        assert torch.equal(getattr(fast, name), wanted), name
    assert slow.member_pos.shape[0] == sum(world.lengths)


def test_a_page_of_another_request_is_an_error(world: World, ops: Ops, seed: int) -> None:
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    _, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, ops)
    swapped, lengths = world.table[[1, 0, 2, 3]], torch.tensor([world.lengths[1]] * 4)
    with pytest.raises(RuntimeError, match="another request's data"):
        ops.build_key_index(world.facts, swapped, lengths, PATCHES, world.step)


@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 1, 128), (2, 2, 96)])
@pytest.mark.parametrize("later", [0, 1, 9])
@pytest.mark.parametrize("text", [12, 310])
def test_bfloat16_stays_within_its_rounding(
    heads: tuple[int, int, int], text: int, later: int, seed: int
) -> None:
    """Whole prompts, and chunks of text behind what an earlier step stored, on every kernel there is."""
    lengths = [PATCHES + text, 2 * PATCHES + 2 * text]
    world = World(*heads, 8, lengths, [[2], [0, PATCHES]], [[11], [PATCHES, 1]])
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = (x.bfloat16() for x in random_rows(world, plan.rows.shape[0]))
    world.rows = world.rows.bfloat16()
    where = world.store(plan, key, value, cpu_ops())
    given = rotated_queries(world, plan, query).bfloat16()
    batch, keys = world.batch(plan, where, []), world.key_index(cpu_ops())
    asked = torch.arange(plan.rows.shape[0])
    if later:
        ends = world.query_start_loc_cpu[1:]
        virtual = torch.cat([torch.arange(end - later, end) for end in ends])
        asked = plan.row_of[virtual]
        rows = torch.arange(len(virtual))
        step = row_plan.plan_text_rows(len(virtual))
        starts = [0, later, 2 * later]
        batch = later_step(step, world.positions[virtual], starts, rows, world.lengths)
    out = torch.full_like(given[asked], torch.nan)
    attention = cpu_ops().plan(batch, keys)
    cpu_ops().attend(given[asked], world.rows, attention, world.cos_sin_cache, world.scale, out)
    got = dict(zip(asked.tolist(), out.float(), strict=True))
    for request in range(2):
        mine, positions = world.members(plan, request)
        q, k, v = (x[mine].float() for x in (query, key, value))
        wanted = reference.vtu_attention(q, k, v, positions, THETA)
        for row, answer in zip(mine, wanted, strict=True):
            if row in got:
                assert (got[row] - answer).abs().max() < 0.06


@pytest.mark.parametrize("heads", [(1, 1, 64), (6, 2, 64), (16, 16, 64), (20, 4, 128), (33, 3, 64)])
@pytest.mark.parametrize("requests", [1, 3])
def test_bfloat16_decodes_and_importances_equal_those_of_the_same_numbers_in_float32(
    heads: tuple[int, int, int], requests: int, seed: int
) -> None:
    lengths, starts = [PATCHES + 90, 2 * PATCHES + 7, 30], [[2], [0, PATCHES + 3], []]
    world = World(*heads, 8, lengths[:requests], starts[:requests], [[11], [PATCHES, 1], []][:requests])
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, cpu_ops())
    world.rows = world.rows.bfloat16()
    keys = world.key_index(cpu_ops())
    last = torch.tensor(world.query_start_loc_cpu[1:]) - 1
    order = torch.arange(requests)
    step = row_plan.plan_text_rows(requests)
    starts_of = list(range(requests + 1))
    batch = later_step(step, world.positions[last], starts_of, order, world.lengths)
    given = interface.rotate(query[plan.row_of[last]], world.cos_sin_cache[world.positions[last]]).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        rows, out = world.rows.to(dtype), torch.full_like(given, torch.nan, dtype=dtype)
        cpu_ops().attend(
            given.to(dtype), rows, cpu_ops().plan(batch, keys), world.cos_sin_cache, world.scale, out
        )
        everyone = torch.zeros(keys.kv_row_index.shape[0])
        cpu._decode(
            given.to(dtype), order, order, rows, keys, world.cos_sin_cache, world.scale, out.clone(), everyone
        )
        found.append((out.float(), everyone))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=2**-7)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    assert abs(float(found[0][1].sum()) - heads[0] * requests) < 1e-3


def packed(lengths: Tensor, size: Tensor) -> PackedTokens:
    """Merged tokens of these sizes."""
    owner = torch.zeros(len(lengths), 1 + int(lengths.sum()), dtype=torch.int64)
    return PackedTokens(torch.zeros(len(size), 1), size, lengths, owner)


@pytest.mark.parametrize("head_size", [64, 128])
def test_proportional_attention_weighs_keys_by_their_sizes(head_size: int, seed: int) -> None:
    lengths = torch.tensor([1, 97, 64, 6])
    query, key, value = (torch.randn(3, int(lengths.sum()), 5, head_size) / 2).bfloat16()
    size = torch.randint(1, 400, (int(lengths.sum()),)).float()
    scale = head_size**-0.5
    got = cpu_ops().proportional_attention(query, key, value, packed(lengths, size), scale)
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
    size = torch.randint(1, 500, (tokens,)).float()
    got = cpu_ops().proportional_attention(query, key, value, packed(lengths, size), 1.0)
    for image in torch.arange(tokens).split(lengths.tolist()):
        q, k, v = (x[image].double() for x in (query, key, value))
        logit = torch.einsum("qhd,khd->hqk", q, k) + size[image].double().log()
        wanted = torch.einsum("hqk,khd->qhd", logit.softmax(-1), v)
        torch.testing.assert_close(got[image].double(), wanted, atol=0.02, rtol=0.02)


def test_layouts_other_than_slots_with_their_heads_together_are_refused() -> None:
    with pytest.raises(ValueError, match="BLNHC"):
        interface.as_kv_rows(torch.empty(4, 2, 8, 64))
