"""The Triton kernels against the reference's definition; run by test_kernels.py through Triton's interpreter.

Triton decides when it is imported whether kernels are compiled or interpreted, so these tests need a process
of their own and are not collected with the others.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools  # noqa: E402
import inspect  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from tests.support import attention_world as shared  # noqa: E402
from tests.support import kernel_memory  # noqa: E402
from tests.support.attention_world import FLOAT32, PATCHES, World  # noqa: E402
from tests.support.compiled_kernels import noted_launches  # noqa: E402
from tests.support.step_trace import trace_step  # noqa: E402
from tests.support.triton_interpreter import spare_repeated_work  # noqa: E402
from tests.support.vllm_contract import resolve  # noqa: E402
from vllm_hybrid.attention import gpu, interface, prefill  # noqa: E402
from vllm_hybrid.attention.dense import flash_attention  # noqa: E402
from vllm_hybrid.attention.interface import TierBatch, VirtualKeys  # noqa: E402
from vllm_hybrid.attention.reference import build_key_index  # noqa: E402
from vllm_hybrid.attention.triton_kernels import decode as decode_kernel  # noqa: E402
from vllm_hybrid.attention.triton_kernels.decode import split_count  # noqa: E402
from vllm_hybrid.attention.triton_kernels.dense import causal_attention  # noqa: E402
from vllm_hybrid.attention.triton_kernels.lists import (  # noqa: E402
    SEGMENT,
    RowLists,
    new_key_lists,
    query_lists,
)
from vllm_hybrid.attention.triton_kernels.write import write  # noqa: E402
from vllm_hybrid.kv import page_facts  # noqa: E402
from vllm_hybrid.method import row_plan  # noqa: E402
from vllm_hybrid.models.step import Step, TierPages, store_facts_and_plan  # noqa: E402

spare_repeated_work()
GPU = gpu.GpuAttention()

SHAPES = shared.SHAPES | {"odd head": (4, 1, 80, 3), "groups of three": (3, 1, 32, 6)}


@pytest.fixture(autouse=True)
def watched_memory() -> Iterator[None]:
    with kernel_memory.watched():
        yield


@triton.jit
def _copy(values, out, count: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, count)
    tl.store(out + at, tl.load(values + at))


@pytest.mark.parametrize(("given", "room", "what"), [(7, 8, "1 of 8 reads"), (8, 6, "2 of 8 writes")])
def test_memory_outside_of_the_arguments_is_noticed(given: int, room: int, what: str) -> None:
    values, out = torch.arange(64.0), torch.zeros(64)
    with pytest.raises(InterpreterError, match=what):
        _copy[(1,)](values[:given], out[:room], 8)
    _copy[(1,)](values[:8], out[:8], 8)
    assert torch.equal(out[:8], values[:8])


@pytest.fixture(params=SHAPES)
def world(request: pytest.FixtureRequest, seed: int) -> World:
    return shared.several_requests(SHAPES[request.param])


def test_live_rows(world: World) -> None:
    shared.check_attention(world, row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images), GPU)


def test_last_rows_rank(world: World) -> None:
    shared.check_importance(world, world.ranked_by_last_rows(), GPU)


def test_rows_on_the_way_rank(seed: int) -> None:
    for shape in ((2, 2, 64, 5), (4, 1, 80, 7)):
        world = shared.conversations(shape)
        shared.check_importance(world, world.ranked_on_the_way(), GPU)


def test_a_request_without_keys_ranks_nothing(seed: int) -> None:
    """A page of another request leaves a request no keys; the others' importance stays."""
    world = shared.conversations((2, 2, 64, 5))
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = shared.random_rows(world, plan.rows.shape[0])
    batch = world.batch(plan, world.store(plan, key, value, GPU), world.ranked_on_the_way())
    keys = world.key_index(GPU)
    pages = (query, world.rows)
    before = GPU.importance(*pages, GPU.plan(batch, keys), world.cos_sin_cache, world.scale)
    keys.count[0] = -1
    after = GPU.importance(*pages, GPU.plan(batch, keys), world.cos_sin_cache, world.scale)
    first, end = batch.live_stretch(0)
    assert before[first:end].any() and not after[first:end].any()
    assert torch.equal(before[end:], after[end:])


def test_kept_rows(world: World, seed: int) -> None:
    shared.check_kept_rows(world, GPU)


@pytest.mark.parametrize("processors", [1, 132])
def test_decodes_and_chunks(
    world: World,
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(decode_kernel, "_processors", lambda device: processors)
    shared.check_later_steps(world, GPU)


@pytest.mark.parametrize("upper", [False, True])
def test_key_indices_agree(world: World, upper: bool) -> None:
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    if upper:
        keep = (plan.image < 0) | (torch.rand(plan.rows.shape[0]) < 0.5)
        for image in range(len(world.images.counts)):
            keep[(plan.image == image).nonzero()[-1]] = True
        plan = row_plan.plan_kept_rows(plan, world.images, keep, shared.kept_images(plan, keep))
    _, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    lengths = torch.tensor(world.lengths)
    wanted = build_key_index(world.facts, world.table, lengths, PATCHES, world.step)
    # A padding request has no length, and whatever block table.
    table = torch.cat([world.table, world.table[:1]])
    lengths = torch.cat([lengths, lengths.new_zeros(1)]).int()
    got = GPU.build_key_index(world.facts, table, lengths, PATCHES, world.step)
    assert got.count[-1] == 0
    for request in range(len(world.lengths)):
        rows = slice(int(wanted.row_ptr[request]), int(wanted.row_ptr[request + 1]))
        per_row = wanted.member_ptr.diff()[rows]
        members = slice(
            int(wanted.member_ptr[wanted.row_ptr[request]]),
            int(wanted.member_ptr[wanted.row_ptr[request + 1]]),
        )
        position, order = wanted.member_pos[members].sort()
        kv_row = wanted.kv_row_index[rows].repeat_interleave(per_row)[order]
        image = wanted.is_image[rows].repeat_interleave(per_row)[order]
        count = int(got.count[request])
        assert count == len(position)
        assert torch.equal(got.kv_row_index[request, :count].long(), kv_row)
        assert torch.equal(got.rope_pos[request, :count].long(), torch.where(image, position, 0))
        check_rows_of_a_request(got.rows, request, wanted, rows)


def check_rows_of_a_request(got: RowLists, request: int, wanted: VirtualKeys, rows: slice) -> None:
    """Text rows in their order, and image rows with all their positions in segments."""
    image = wanted.is_image[rows]
    assert torch.equal(
        got.text_row[request, : got.text_count[request]].long(), wanted.kv_row_index[rows][~image]
    )
    segments = int(got.segment_count[request])
    starts = got.segment_start[request, : segments + 1].tolist()
    listed: dict[int, list[int]] = {}
    for row, first, past in zip(
        got.segment_row[request, :segments].tolist(), starts, starts[1:], strict=False
    ):
        assert 0 < past - first <= SEGMENT
        # Only a row's last segment has room left.
        assert len(listed.get(row, ())) % SEGMENT == 0
        listed.setdefault(row, []).extend(got.position[request, first:past].tolist())
    pointers = wanted.member_ptr[rows.start : rows.stop + 1].tolist()
    members = [wanted.member_pos[a:b].tolist() for a, b in zip(pointers, pointers[1:], strict=False)]
    per_row = zip(wanted.kv_row_index[rows].tolist(), image.tolist(), members, strict=True)
    assert listed == {row: own for row, is_image, own in per_row if is_image}


def test_a_page_of_another_request_leaves_no_keys(world: World) -> None:
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    _, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    lengths = torch.tensor([world.lengths[1]] * 4)
    got = GPU.build_key_index(world.facts, world.table[[1, 0, 2, 3]], lengths, PATCHES, world.step)
    assert got.count[1] == -1
    foreign = torch.tensor([True, False, True, True])
    GPU.flag_foreign_pages(got, foreign)
    assert foreign.tolist() == (got.count < 0).tolist()


def test_key_indices_stay_inside_their_lists_whatever_pages_say(world: World) -> None:
    """Block tables may name pages of others by mistake: no facts may lead the kernel out of its memory."""
    blocks, block_size, words = world.facts.shape
    facts = torch.randint(-(1 << 31), (1 << 31) - 1, (blocks, block_size, words), dtype=torch.int32)
    position = torch.arange(world.table.shape[1] * block_size).view(-1, block_size)
    for own in world.table.long():
        # An image here or there, of a likely or an impossible number of live rows.
        image = torch.rand(position.shape) < 0.1
        facts[own, :, page_facts.START] = torch.where(image, position + 1, 0).int()
        likely = torch.randint(-1, PATCHES + 3, position.shape)
        facts[own, :, page_facts.COUNT] = torch.where(torch.rand(position.shape) < 0.8, likely, 1 << 30).int()
    lengths = torch.randint(1, world.table.shape[1] * block_size + 1, (len(world.lengths),)).int()
    got = GPU.build_key_index(facts, world.table, lengths, PATCHES, world.step)
    assert ((got.count >= -1) & (got.count <= lengths)).all()
    rows = got.rows
    assert (rows.text_count + rows.segment_count <= got.count.clamp(min=0)).all()
    for request, segments in enumerate(rows.segment_count.tolist()):
        if got.count[request] < 0:
            continue
        starts = rows.segment_start[request, : segments + 1]
        assert ((starts >= 0) & (starts <= got.count[request])).all()
        position = rows.position[request, : starts[-1]]
        assert ((position >= 0) & (position < lengths[request])).all()


@pytest.mark.parametrize("processors", [1, 132])
def test_a_step_of_decodes(world: World, processors: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(decode_kernel, "_processors", lambda device: processors)
    # The last request of the world ends in an image; a decode brings text.
    texts = [[3], [0, PATCHES + 2], [], [1]]
    lengths = [3 + PATCHES + 6, 2 * PATCHES + 5, 11, PATCHES + 2]
    shape = (world.heads, world.kv_heads, world.head_size, world.block_size)
    shared.check_decodes(World(*shape, lengths, texts, [[9], [1, PATCHES], [], [17]]), GPU)


def test_a_captured_decode_writes_every_row(seed: int) -> None:
    """A graph captured for four requests is replayed for two: the rows that fill it up are answered too."""
    world = World(4, 2, 64, 8, lengths=[9, PATCHES + 7], image_starts=[[], [3]], live=[[], [11]])
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    _, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    last = shared.last_rows(world, plan)
    step = shared.decode_step(world, plan, last)
    requests, real = 4, 2
    # The host's view is the capture's; the device's is the replay's.
    step.row_plan = row_plan.plan_text_rows(requests)
    step.positions = torch.cat([step.positions, torch.zeros(2, dtype=torch.int64)])
    step.query_start_loc_cpu = list(range(requests + 1))
    step.query_start_loc = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    step.seq_lens = torch.tensor([*world.lengths, 0, 0], dtype=torch.int32)
    step.slots = torch.cat([step.slots, torch.tensor([-1, 0])])
    step.block_table = torch.zeros(requests, world.table.shape[1], dtype=torch.int32)
    step.block_table[:real] = world.table
    null_block = world.facts[0].clone()
    attention = GPU.plan_decodes(step, torch.ones(requests, dtype=torch.bool))
    assert torch.equal(world.facts[0], null_block)
    assert attention.batch.kv_row_index[real:].tolist() == [0, 0]
    query = torch.randn(requests, 4, 64)
    out = torch.full_like(query, torch.nan)
    GPU.attend(query, world.rows, attention, world.cos_sin_cache, world.scale, out)
    assert not out[:real].isnan().any() and out[:real].any()
    assert torch.equal(out[real:], torch.zeros_like(out[real:]))


def test_a_step_of_decodes_is_planned_by_one_kernel_for_each_tier(seed: int) -> None:
    world = World(2, 2, 64, 5, [PATCHES + 12, PATCHES + 30], [[4], [2]], [[11], [23]])
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    _, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    last = shared.last_rows(world, plan)
    given = shared.decode_step(world, plan, last)
    pages = TierPages(PATCHES, world.facts, world.block_size, world.step)
    common = SimpleNamespace(
        query_start_loc=given.query_start_loc,
        block_table_tensor=given.block_table,
        seq_lens=given.seq_lens,
        slot_mapping=given.slots,
    )
    foreign = torch.ones(2, 8, dtype=torch.bool)
    text_rows = row_plan.plan_text_rows(100)
    with trace_step() as trace:
        step = Step(given.positions, [0, 1, 2], None, text_rows)
        rows = step.lower_rows()
        for tier in range(2):
            store_facts_and_plan(step, rows, common, pages, foreign[tier], GPU)  # type: ignore[arg-type]
    assert len(trace.launches) == 2 and all(each.startswith("_key_index ") for each in trace.launches)
    assert trace.waits == []
    assert not foreign[:, :2].any()


def test_a_decode_with_a_page_of_another_request_is_flagged(seed: int) -> None:
    world = World(2, 2, 64, 5, [PATCHES + 7, PATCHES + 9], [[3], [4]], [[7], [11]])
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    _, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    last = shared.last_rows(world, plan)
    step = shared.decode_step(world, plan, last)
    step.block_table = world.table[[0, 0]]
    step.seq_lens = torch.tensor([PATCHES + 7, PATCHES + 9], dtype=torch.int32)
    # Where the image of the second begins the pages of the first hold the second row of theirs.
    step.block_table[1, 0] = world.table[1, 0]
    foreign = torch.zeros(2, dtype=torch.bool)
    attention = GPU.plan_decodes(step, foreign)
    assert foreign.tolist() == [False, True]
    out = torch.full((2, 2, 64), torch.nan)
    GPU.attend(torch.randn(2, 2, 64), world.rows, attention, world.cos_sin_cache, 1.0, out)
    assert out[0].any() and not out[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 2, 64), (2, 2, 128)])
def test_decodes_in_half_precision(heads: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    world = World(*heads, 8, [PATCHES + 12, 30], [[4], []], [[11], []])
    shared.check_decodes(world, GPU, dtype)


def test_fp8_pages_hold_the_nearest_numbers(seed: int) -> None:
    """All numbers of FP8, some between them, and some beyond."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes[~codes.isnan()].sort().values
    between = values[:-1] + values.diff() * torch.rand(len(values) - 1)
    extremes = torch.tensor([-1e30, -500.0, 449.0, 1e30])
    given = torch.cat([values, between, extremes]).bfloat16()[:508].view(2, 2, 127)
    pages = torch.zeros(5, 2, 254).to(torch.float8_e4m3fn)
    write(given, -given, pages, torch.tensor([3, 1]))
    wanted = given.clamp(-448, 448).to(torch.float8_e4m3fn)
    for row, place in ((0, 3), (1, 1)):
        assert torch.equal(pages[place, :, :127].float(), wanted[row].float())
        assert torch.equal(pages[place, :, 127:].float(), -wanted[row].float())
    assert not pages[[0, 2, 4]].float().any()


@pytest.mark.parametrize("shape", [(4, 2, 64), (2, 2, 128), (4, 1, 80)])
def test_decodes_from_fp8_pages(shape: tuple[int, int, int], seed: int) -> None:
    """The answer is the full one of the numbers that FP8 keeps; against unrounded ones it is off a little."""
    world = World(*shape, 8, [PATCHES + 12, 30], [[4], []], [[11], []])
    world.rows = world.rows.clamp(-448, 448).to(torch.float8_e4m3fn)
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = shared.random_rows(world, plan.rows.shape[0])
    # Image keys are stored unrotated, so that what is kept of them is known; text keys are kept exactly.
    world.store(plan, key, value, GPU)
    last = shared.last_rows(world, plan)
    attention = GPU.plan_decodes(shared.decode_step(world, plan, last), torch.zeros(2, dtype=torch.bool))
    given = shared.rotated_queries(world, plan, query)[last]
    exact, rounded = torch.empty_like(given), torch.empty_like(given)
    GPU.attend(given, world.rows, attention, world.cos_sin_cache, world.scale, rounded)
    GPU.attend(given, world.rows.float(), attention, world.cos_sin_cache, world.scale, exact)
    torch.testing.assert_close(rounded, exact, **FLOAT32)
    for request in range(2):
        rows, positions = world.members(plan, request)
        wanted = shared.reference.vtu_attention(query[rows], key[rows], value[rows], positions, shared.THETA)
        assert (rounded[request] - wanted[-1]).abs().max() < 0.25


def test_decodes_repeat_to_the_bit_whatever_stands_beside_them(seed: int) -> None:
    world = World(2, 2, 64, 5, [PATCHES + 12, PATCHES + 30], [[4], [2]], [[11], [23]])
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    last = shared.last_rows(world, plan)
    step = shared.decode_step(world, plan, last)
    answers = []
    for order in ([0, 1], [1, 0]):
        step.block_table, step.seq_lens = world.table[order], torch.tensor(world.lengths).int()[order]
        attention = GPU.plan_decodes(step, torch.zeros(2, dtype=torch.bool))
        out = torch.empty(2, 2, 64)
        GPU.attend(query[last][order], world.rows, attention, world.cos_sin_cache, world.scale, out)
        answers.append(out[order])
    assert torch.equal(*answers)


def test_requests_without_keys_answer_zero(seed: int) -> None:
    rows = new_key_lists(2, 8, True, torch.device("cpu")).rows
    rows.text_count.zero_()
    rows.segment_count.zero_()
    kv_rows, cos_sin_cache = torch.randn(4, 2, 128), torch.zeros(8, 64)
    for processors in (1, 132):
        out = torch.full((2, 2, 64), torch.nan)
        with mock.patch.object(decode_kernel, "_processors", lambda device, n=processors: n):
            decode_kernel.decode(
                torch.randn(2, 2, 64), torch.tensor([1, -1]).int(), kv_rows, rows, cos_sin_cache, 1.0, out
            )
        assert out[0].isnan().all() and not out[1].any()


def test_query_lists_leave_out_padding_and_dropped_rows() -> None:
    row_of = torch.tensor([0, 2, -1, 2, 1, 0, 0])
    lists = query_lists(
        row_of, torch.arange(10, 17), torch.tensor([-1, -1, 0]), torch.tensor([0, 2, 5, 5]).int()
    )
    assert lists.start.tolist() == [0, 2, 4, 4]
    assert lists.row[:4].tolist() == [0, 2, 2, 1]
    assert lists.rope_pos[:4].tolist() == [0, 11, 13, 0]
    stretches = [
        lists.by_row[a:b].tolist()
        for a, b in zip(lists.row_start.tolist(), lists.row_start[1:].tolist(), strict=False)
    ]
    assert stretches == [[0], [3], [1, 2]]


def test_splits_depend_on_shapes_alone() -> None:
    assert split_count(programs=16 * 32, width=4096, processors=132) == 1
    assert split_count(programs=100, width=4096, processors=132) == 4
    assert split_count(programs=8, width=4096, processors=132) == 32
    assert split_count(programs=1, width=20, processors=132) == 2


def dense_reference(
    query: Tensor, key: Tensor, value: Tensor, query_start: list[int], key_start: list[int], scale: float
) -> Tensor:
    """What FlashAttention documents of packed sequences: causal, aligned to the last key; 0 without keys."""
    out = torch.zeros_like(query, dtype=torch.float32)
    group = query.shape[1] // key.shape[1]
    stretches = zip(query_start, query_start[1:], key_start, key_start[1:], strict=False)
    for first, end, first_key, end_key in stretches:
        q = query[first:end].float()
        k, v = (x[first_key:end_key].float().repeat_interleave(group, dim=1) for x in (key, value))
        queries, keys = len(q), len(k)
        seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)
        out[first:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0), v)
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 64), (6, 2, 80), (3, 1, 32), (2, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_attention(heads: int, kv_heads: int, size: int, dtype: torch.dtype, seed: int) -> None:
    # One longer than a tile, one query of many keys, more queries than keys, none of either.
    queries, keys = [70, 1, 3, 0, 2, 5], [90, 40, 2, 0, 0, 5]
    queries_at, keys_at = ([0, *torch.tensor(x).cumsum(0).tolist()] for x in (queries, keys))
    # As a layer has them, heads of a wider row.
    query = torch.randn(sum(queries), heads + 1, size).to(dtype)[:, :heads]
    key, value = (torch.randn(sum(keys), kv_heads + 2, size).to(dtype)[:, 1:-1] for _ in range(2))
    out = torch.full_like(query, torch.nan)
    query_start, key_start = (torch.tensor(x, dtype=torch.int32) for x in (queries_at, keys_at))
    causal_attention(query, key, value, query_start, key_start, max(queries), max(keys), 0.2, out)
    wanted = dense_reference(query, key, value, queries_at, keys_at, 0.2)
    close = FLOAT32 if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out.float(), wanted, **close)


@pytest.mark.parametrize("most", [1, PATCHES + 12, 2 * PATCHES])
def test_prefill_in_groups(world: World, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SCRATCH_KEYS", most)
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    shared.check_attention(world, plan, GPU)
    shared.check_later_steps(world, GPU)


def test_groups_share_a_kernel(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Which requests a group has is no reason to compile again."""
    monkeypatch.setattr(prefill, "SCRATCH_KEYS", 1)
    world = shared.several_requests((4, 2, 64, 5))
    with noted_launches() as launches:
        shared.check_attention(
            world, row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images), GPU
        )
    assert len([variant for variant in launches.seen if variant.startswith("_dense ")]) == 1


def test_scratch_is_bounded(seed: int) -> None:
    """No group has more keys than the bound, unless it is one request; all are in one that have keys.

    None has no keys: FlashAttention would clear the answers of all others with it.
    """
    for _ in range(50):
        bounds = (torch.randint(0, 70, (int(torch.randint(1, 12, ())),)) - 20).clamp(min=0).tolist()
        groups = prefill._cut(bounds, 40)
        inside = [n for first, end in groups for n in range(first, end)]
        assert inside == sorted(set(inside)) and {n for n, bound in enumerate(bounds) if bound} <= set(inside)
        for first, end in groups:
            assert sum(bounds[first:end]) <= 40 or sum(bound > 0 for bound in bounds[first:end]) == 1
            assert bounds[first] and bounds[end - 1]
    # 7B: 16384 rows a step, 4096 positions a request.
    assert prefill.scratch_bytes(16384, 4096, 32, 32, 128, 2) == 4 * 16384 * 4096 * 2


def text_world() -> World:
    return World(4, 2, 64, 5, [20, 9, 33, 70], [[], [], [], []], [[], [], [], []])


def text_step(world: World, rows: list[int]) -> tuple[TierBatch, Tensor, Tensor]:
    """The step that brings the last rows of each request; the numbers of those rows, and their KV rows."""
    plan = row_plan.plan_text_rows(world.query_start_loc_cpu[-1])
    ends = world.query_start_loc_cpu[1:]
    virtual = torch.cat([torch.arange(end - own, end) for end, own in zip(ends, rows, strict=True)])
    block, offset = world.slots(plan)
    where = (block * world.step + offset)[virtual]
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    step = row_plan.plan_text_rows(len(virtual))
    return shared.later_step(step, world.positions[virtual], starts, where, world.lengths), virtual, where


def test_prompts_that_begin_attend_to_their_own_rows(seed: int) -> None:
    """Beside decodes, which read their pages; nothing of the prompts is read from theirs."""
    world = text_world()
    plan = row_plan.plan_text_rows(world.query_start_loc_cpu[-1])
    query, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, GPU)
    batch, virtual, where = text_step(world, [20, 1, 33, 1])
    attention = GPU.plan(batch, world.key_index(GPU))
    prompts = torch.tensor([rows > 1 for rows in [20, 1, 33, 1]]).repeat_interleave(
        torch.tensor([20, 1, 33, 1])
    )
    world.rows[where[prompts]] = torch.nan
    cos_sin = world.cos_sin_cache[world.positions[virtual]]
    asked, own_key = (interface.rotate(x[virtual], cos_sin) for x in (query, key))
    out = torch.full_like(asked, torch.nan)
    rest = (world.rows, attention, world.cos_sin_cache, world.scale, out)
    assert GPU.attend_own_rows(asked, own_key, value[virtual], *rest)
    for request in range(4):
        own, positions = world.members(plan, request)
        wanted = shared.reference.vtu_attention(query[own], key[own], value[own], positions, shared.THETA)
        first, end = batch.query_start_loc_cpu[request : request + 2]
        torch.testing.assert_close(out[first:end], wanted[first - end :], **FLOAT32)


def test_prompts_with_a_past_or_images_read_pages(seed: int) -> None:
    """A past may hold images that the host does not know of."""
    world = text_world()

    def own_rows(rows: list[int], has_images: bool = False) -> bool:
        batch, _, _ = text_step(world, rows)
        batch.has_images = has_images
        plan = GPU.plan(batch, world.key_index(GPU))
        assert plan.prefill is not None
        return plan.prefill.own_rows

    assert not own_rows([20, 1, 32, 1]) and not own_rows([2, 9, 33, 70])
    assert own_rows([20, 1, 33, 1])
    assert not own_rows([20, 1, 33, 1], has_images=True)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> tuple[gpu.GpuAttention, list[dict[str, Any]]]:
    """Attention by vLLM's FlashAttention, answered in plain torch where that needs a GPU, and its calls."""
    signature = inspect.signature(resolve("vllm.vllm_flash_attn.flash_attn_varlen_func"))
    calls: list[dict[str, Any]] = []

    def documented(**given: Any) -> None:
        signature.bind(**given)
        calls.append(given)
        q, k, v, out = (given[name] for name in ["q", "k", "v", "out"])
        starts = given["cu_seqlens_q"], given["cu_seqlens_k"]
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in starts)
        assert q.dtype == k.dtype == v.dtype == out.dtype
        assert all(x.stride(-1) == 1 for x in (q, k, v, out))
        assert given["causal"] and given["num_splits"] == 1
        # Without a key it would clear all of out, stretches of other calls too.
        assert k.shape[0]
        queries, keys = (x.tolist() for x in starts)
        assert given["max_seqlen_q"] >= max(b - a for a, b in zip(queries, queries[1:], strict=False))
        assert given["max_seqlen_k"] >= max(b - a for a, b in zip(keys, keys[1:], strict=False))
        stretch = slice(queries[0], queries[-1])
        out[stretch] = dense_reference(q, k, v, queries, keys, given["softmax_scale"])[stretch]

    module = SimpleNamespace(flash_attn_varlen_func=documented)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    return gpu.GpuAttention(functools.partial(flash_attention, 3)), calls


def test_prefill_by_flash_attention_is_called_as_it_documents(
    world: World,
    flash: tuple[gpu.GpuAttention, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ops, calls = flash
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    shared.check_attention(world, plan, ops)
    monkeypatch.setattr(prefill, "SCRATCH_KEYS", 2 * PATCHES)
    shared.check_attention(world, plan, ops)
    assert len(calls) > 2 and all(call["fa_version"] == 3 for call in calls)


@pytest.mark.parametrize("rows", [[15, 1, 30, 1], [1, 8, 1, 60], [1, 1, 30, 2]])
def test_decodes_stand_anywhere_between_groups(
    rows: list[int],
    flash: tuple[gpu.GpuAttention, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    ops, calls = flash
    monkeypatch.setattr(prefill, "SCRATCH_KEYS", 1)
    world = text_world()
    plan = row_plan.plan_text_rows(world.query_start_loc_cpu[-1])
    query, key, value = shared.random_rows(world, plan.rows.shape[0])
    world.store(plan, key, value, ops)
    batch, virtual, _ = text_step(world, rows)
    asked = interface.rotate(query[virtual], world.cos_sin_cache[world.positions[virtual]])
    out = torch.full_like(asked, torch.nan)
    attention = ops.plan(batch, world.key_index(ops))
    ops.attend(asked, world.rows, attention, world.cos_sin_cache, world.scale, out)
    for request in range(len(rows)):
        own, positions = world.members(plan, request)
        wanted = shared.reference.vtu_attention(query[own], key[own], value[own], positions, shared.THETA)
        first, end = batch.query_start_loc_cpu[request : request + 2]
        torch.testing.assert_close(out[first:end], wanted[first - end :], **FLOAT32)
    assert len(calls) == sum(own > 1 for own in rows)


def test_groups_share_one_scratch(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What the profiling run was told of is all that a step of several groups allocates."""
    monkeypatch.setattr(prefill, "SCRATCH_KEYS", PATCHES + 20)
    world = shared.several_requests((4, 2, 64, 5))
    plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
    query, key, value = shared.random_rows(world, plan.rows.shape[0])
    where = world.store(plan, key, value, GPU)
    attention = GPU.plan(world.batch(plan, where, []), world.key_index(GPU))
    assert attention.prefill is not None and len(attention.prefill.groups) > 2
    with AllocatedBytes() as allocated:
        given = (world.rows, attention, world.cos_sin_cache, world.scale, torch.empty_like(query))
        GPU.attend(query, *given)
    answers = query.numel() * query.element_size()
    rows, positions = world.query_start_loc_cpu[-1], max(world.lengths)
    assert allocated.total - answers <= GPU.scratch_bytes(rows, positions, 4, 2, 64, 4)


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.new_empty", "aten.empty")):
            self.total += result.numel() * result.element_size()
        return result


def test_bfloat16_pages(seed: int) -> None:
    for heads in [(4, 2, 64), (2, 2, 64)]:
        world = World(*heads, 8, [PATCHES + 12], [[4]], [[11]])
        plan = row_plan.plan_live_rows(world.query_start_loc_cpu[-1], world.images)
        query, key, value = (x.bfloat16() for x in shared.random_rows(world, plan.rows.shape[0]))
        world.rows = world.rows.bfloat16()
        where = world.store(plan, key, value, GPU)
        attention = GPU.plan(world.batch(plan, where, []), world.key_index(GPU))
        given = shared.rotated_queries(world, plan, query).bfloat16()
        out = torch.empty_like(given)
        GPU.attend(given, world.rows, attention, world.cos_sin_cache, world.scale, out)
        rows, positions = world.members(plan, 0)
        q, k, v = (x[rows].float() for x in (query, key, value))
        wanted = shared.reference.vtu_attention(q, k, v, positions, shared.THETA)
        assert (out.float() - wanted).abs().max() < 0.06
