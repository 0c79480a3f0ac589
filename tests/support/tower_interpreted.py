"""The tower's Triton kernels against the reference's definition, through Triton's interpreter.

Run by test_kernels.py. Triton decides when it is imported whether kernels are compiled or interpreted, so
these tests need a process of their own and are not collected with the others.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import math  # noqa: E402
import random  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any, cast  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from tests.support import kernel_memory, reference  # noqa: E402
from tests.support.compiled_kernels import noted_launches  # noqa: E402
from tests.support.rank_threads import RankThreads  # noqa: E402
from tests.support.step_trace import trace_step  # noqa: E402
from tests.support.triton_interpreter import spare_repeated_work  # noqa: E402
from vllm_hybrid.attention.gpu import GpuAttention  # noqa: E402
from vllm_hybrid.attention.gpu_tower import GpuTower  # noqa: E402
from vllm_hybrid.attention.select import AnyAttentionOps  # noqa: E402
from vllm_hybrid.attention.triton_kernels.tower_attention import tower_attention  # noqa: E402
from vllm_hybrid.method.device_tokens import DeviceTokens, Lengths, live_tokens  # noqa: E402
from vllm_hybrid.method.token_merging import LiveTokens  # noqa: E402
from vllm_hybrid.models import clip  # noqa: E402
from vllm_hybrid.models.clip import encode_merged, rows_that_merge, threshold_values  # noqa: E402
from vllm_hybrid.models.clip_on_device import DeviceEncoder, run_layers  # noqa: E402
from vllm_hybrid.models.llava import LlavaHybridForConditionalGeneration  # noqa: E402
from vllm_hybrid.models.picture_shares import Ranks  # noqa: E402
from vllm_hybrid.models.tower_capacity import BUCKETS, FEWEST  # noqa: E402

spare_repeated_work()
TOWER = GpuTower()
INTERPRETER = threading.Lock()


@pytest.fixture(autouse=True)
def watched_memory() -> Iterator[None]:
    with kernel_memory.watched():
        yield


# ---- a tower in float32, with the parts that vLLM's has ---------------------------------------------


class _Linear(nn.Linear):
    """Returns its result and no bias, as vLLM's layers do."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class _Layer(nn.Module):
    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = _Linear(width, 3 * width)
        self.self_attn.out_proj = _Linear(width, width)
        facts = {
            "num_heads_per_partition": heads,
            "head_dim": head_dim,
            "tp_size": 1,
            "scale": head_dim**-0.5,
        }
        for name, fact in facts.items():
            setattr(self.self_attn, name, fact)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def make_tower(layers: int, heads: int, head_dim: int) -> Any:
    """Takes the first layer's rows [images, 1 + P, C] for pixels."""
    embeddings = nn.Identity()
    embeddings.class_embedding = nn.Parameter(torch.zeros(heads * head_dim))
    vision = SimpleNamespace(
        dtype=torch.float32,
        embeddings=embeddings,
        pre_layrnorm=lambda rows: rows,
        encoder=SimpleNamespace(layers=nn.ModuleList(_Layer(heads, head_dim) for _ in range(layers))),
    )
    return SimpleNamespace(vision_model=vision)


def slow_image(tower: Any, rows: torch.Tensor, thresholds: Sequence[float]) -> tuple[reference.Tokens, float]:
    """One image through the reference's operations; and how far its closest decision is from the other."""
    patches = rows.shape[0] - 1
    tokens = reference.Tokens(rows, torch.ones(1 + patches), [[], *([p] for p in range(patches))])
    margin = math.inf
    for layer, threshold in zip(tower.vision_model.encoder.layers, thresholds, strict=True):
        attention = layer.self_attn
        qkv = attention.qkv_proj(layer.layer_norm1(tokens.hidden))[0]
        q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in qkv.chunk(3, dim=-1))
        attended = reference.vision_attention(q, k, v, tokens.sizes).flatten(-2)
        tokens.hidden = tokens.hidden + attention.out_proj(attended)[0]
        if threshold < math.inf:
            margin = min(margin, reference.merge_margin(reference.match_scores(k), threshold))
        tokens = reference.dtome_layer(tokens, k, threshold)
        tokens.hidden = tokens.hidden + layer.mlp(layer.layer_norm2(tokens.hidden))
    return tokens, margin


def check(live: LiveTokens, wanted: Sequence[reference.Tokens]) -> None:
    """Every image's live tokens, their order and their patches are those of the reference for it alone."""
    assert live.counts == [len(tokens.members) - 1 for tokens in wanted]
    assert live.image.tolist() == [i for i, count in enumerate(live.counts) for _ in range(count)]
    assert live.index.tolist() == [n for count in live.counts for n in range(count)]
    parts = live.features.split(live.counts)
    for features, owner, tokens in zip(parts, live.owner.tolist(), wanted, strict=True):
        torch.testing.assert_close(features, tokens.hidden[1:], atol=2e-5, rtol=2e-5)
        members = [[p for p, o in enumerate(owner) if o == n] for n in range(len(features))]
        assert members == [sorted(patches) for patches in tokens.members[1:]]


# ---- pictures -------------------------------------------------------------------------------------

NONE = math.inf


def picture(patches: int, width: int, spread: float) -> torch.Tensor:
    """Rows around one direction: the smaller the spread, the more alike they are."""
    return torch.randn(width) + spread * torch.randn(1 + patches, width)


def decided(tower: Any, patches: int, width: int, spread: float, thresholds: Sequence[float]) -> Any:
    """A picture of whose decisions none is a matter of rounding, and its tokens by the reference."""
    for _ in range(200):
        rows = picture(patches, width, spread)
        tokens, margin = slow_image(tower, rows, thresholds)
        if margin > 3e-6:
            return rows, tokens
    raise AssertionError("no picture is clear of rounding")


def blank(patches: int, width: int) -> torch.Tensor:
    """A class token, and patches that are all the same."""
    return torch.cat([torch.randn(1, width), torch.randn(1, width).expand(patches, -1)])


Picture = tuple[float, tuple[float, ...]]

# Layers, heads, head size, patches; of each picture its spread and its thresholds.
SHAPES: dict[str, tuple[int, int, int, int, list[Picture]]] = {
    "one image": (3, 2, 64, 40, [(0.4, (0.9, 0.9, 0.85))]),
    "levels side by side": (
        3, 2, 16, 67,
        [
            (0.4, (0.9, 0.9, 0.8)), (1.0, (NONE,) * 3), (0.2, (0.97, NONE, 0.9)), (0.5, (-2.0, -2.0, -2.0)),
            (1.0, (1.5, 1.5, 1.5)), (0.4, (NONE, 0.9, 0.9)),
        ],
    ),
    "odd heads": (2, 3, 20, 33, [(0.3, (0.9, 0.8)), (0.6, (0.7, NONE)), (0.3, (NONE, 0.8))]),
    "a layer that merges nothing": (3, 1, 32, 64, [(0.4, (0.9, NONE, 0.8)), (0.4, (0.8, NONE, NONE))]),
    "few patches": (2, 1, 16, 2, [(0.1, (-2.0, 0.9)), (1.0, (-2.0, 1.5)), (1.0, (NONE, 0.3))]),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def scene(request: pytest.FixtureRequest, seed: int) -> Any:
    """A tower, rows of pictures, their thresholds and their tokens by the reference."""
    layers, heads, head_dim, patches, images = SHAPES[request.param]
    tower = make_tower(layers, heads, head_dim)
    with torch.inference_mode():
        drawn = [decided(tower, patches, heads * head_dim, spread, own) for spread, own in images]
    return tower, torch.stack([rows for rows, _ in drawn]), [own for _, own in images], [t for _, t in drawn]


def encoder_of(rows: torch.Tensor) -> DeviceEncoder:
    """An encoder of pictures with as many rows as these [images, 1 + P, C]."""
    return DeviceEncoder(TOWER, rows.shape[1] - 1)


def encode(tower: Any, rows: torch.Tensor, thresholds: Any, capacity: Sequence[int]) -> Any:
    """The tokens, their owners and lengths, of fixed capacities."""
    layers = rows_that_merge(threshold_values(thresholds, len(capacity)), rows.device)
    tokens, owner = run_layers(tower, rows, layers, capacity, TOWER)
    return tokens, owner, Lengths.read(tokens)


@torch.inference_mode()
def test_merged_images_are_those_of_the_reference(scene: Any) -> None:
    tower, rows, thresholds, wanted = scene
    check(encoder_of(rows).encode(tower, rows, thresholds), wanted)


@torch.inference_mode()
def test_rows_just_enough_change_nothing(scene: Any) -> None:
    """Rows behind the tokens are padding, few or many, and the features agree to the bit."""
    tower, rows, thresholds, wanted = scene
    layers = len(thresholds[0])
    room = rows.shape[0] * rows.shape[1]
    tokens, owner, lengths = encode(tower, rows, thresholds, [room] * layers)
    merging = [any(own[layer] < NONE for own in thresholds) for layer in range(layers)]
    needed: list[int] = []
    after = iter(lengths.images)
    for merges in merging:
        needed.append(sum(next(after)) if merges else (needed or [room])[-1])
    tight, tight_owner, tight_lengths = encode(tower, rows, thresholds, needed)
    assert not tight_lengths.overflowed and tight_lengths == lengths and tight.rows == needed[-1]
    assert torch.equal(tight_owner, owner)
    total = needed[-1]
    torch.testing.assert_close(tight.hidden, tokens.hidden[:total], atol=1e-5, rtol=1e-5)
    assert torch.equal(tight.size, tokens.size[:total]) and (tokens.size[total:] == 1).all()
    check(live_tokens(tight, owner, lengths.images[-1]), wanted)


@torch.inference_mode()
def test_too_few_rows_are_noticed_in_every_layer(scene: Any) -> None:
    tower, rows, thresholds, wanted = scene
    layers = len(thresholds[0])
    room = rows.shape[0] * rows.shape[1]
    _, _, lengths = encode(tower, rows, thresholds, [room] * layers)
    merging = [layer for layer in range(layers) if any(own[layer] < NONE for own in thresholds)]
    for layer, needed in zip(merging, lengths.images, strict=True):
        capacity = [room] * layers
        missing = random.choice([1, random.randint(1, sum(needed) - 1)])
        capacity[layer:] = [sum(needed) - missing] * (layers - layer)
        _, _, found = encode(tower, rows, thresholds, capacity)
        assert found.overflowed


@torch.inference_mode()
def test_a_batch_that_needs_more_rows_than_its_forerunners_is_run_again(seed: int) -> None:
    tower, thresholds = make_tower(2, 2, 16), (0.9, 0.9)
    encoder = DeviceEncoder(TOWER, 48)
    flat, flat_tokens = decided(tower, 48, 32, 0.05, thresholds)
    busy, busy_tokens = decided(tower, 48, 32, 2.0, thresholds)
    assert len(flat_tokens.members) * 2 < len(busy_tokens.members)
    for number in range(FEWEST):
        if number < 2:
            check(encoder.encode(tower, flat[None], [thresholds]), [flat_tokens])
        else:
            encoder.capacity.learn([thresholds], [[len(flat_tokens.members)]] * 2)
    for rows, tokens, reruns in [(flat, flat_tokens, 0), *[(busy, busy_tokens, 1)] * 3]:
        check(encoder.encode(tower, rows[None], [thresholds]), [tokens])
        assert encoder.capacity.reruns == reruns
    # A pause of one batch, then rows as the busy one needs.
    assert encoder.capacity.batches == 3


@torch.inference_mode()
def test_blank_pictures_merge_as_far_as_may_be(seed: int) -> None:
    """All scores of a blank picture are equal, so the earliest B takes every A."""
    tower, thresholds = make_tower(3, 2, 16), (0.999,) * 3
    rows = torch.stack([blank(131, 32), picture(131, 32, 1.0), blank(131, 32)])
    live = encoder_of(rows).encode(tower, rows, [thresholds, (NONE,) * 3, thresholds])
    # 132 tokens: 65 of 66 A merge; of the 67, the class token and 66 B, 33 A but the class token; and so on.
    assert live.counts == [17, 131, 17]
    assert live.owner[0].bincount().max() >= 65


@torch.inference_mode()
def test_warming_up_launches_every_kernel_and_learns_nothing(seed: int) -> None:
    tower, encoder = make_tower(1, 1, 16), DeviceEncoder(TOWER, 5)
    rows = torch.stack([picture(5, 16, 0.4) for _ in range(2)])
    asked = {}
    for name in ("first batch", "warm-up"):
        with trace_step() as trace:
            if name == "warm-up":
                encoder.warm_up(tower, rows)
            else:
                encoder_of(rows).encode(tower, rows, [(0.9,)] * 2)
        asked[name] = {one.split(" ")[0] for one in trace.operations if one.startswith("_")}
        assert (trace.waits == []) == (name == "warm-up")
    assert asked["warm-up"] == asked["first batch"] and len(asked["warm-up"]) == 6
    assert encoder.capacity.rows([(0.9,)], 6, 1) is None


@torch.inference_mode()
def test_no_batch_needs_a_kernel_that_warming_up_did_not_compile(seed: int) -> None:
    """However many images it has, and wherever the thresholds of a layer lie in those of all."""
    tower, encoder = make_tower(3, 2, 16), DeviceEncoder(TOWER, 40)
    rows = torch.stack([picture(40, 32, 0.4) for _ in range(5)])
    with noted_launches() as launches:
        encoder.warm_up(tower, rows)
        assert len(launches.seen) == 6
        for images in (1, 2, 3, 5):
            for thresholds in ((0.9, 0.9, 0.9), (NONE, 0.9, NONE)):
                encoder.encode(tower, rows[:images], [thresholds] * images)
    assert launches.since(6) == []


@torch.inference_mode()
def test_the_same_batch_gives_the_same_bits(seed: int) -> None:
    tower, thresholds = make_tower(3, 2, 64), (0.9, 0.9, 0.8)
    rows = torch.stack([picture(100, 128, 0.4) for _ in range(3)])
    first, second = (encode(tower, rows, [thresholds] * 3, [303, 303, 303]) for _ in range(2))
    assert torch.equal(first[0].hidden, second[0].hidden) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype, seed: int) -> None:
    lengths, heads, size = [70, 1, 33], 2, 64
    starts = torch.tensor([0, 70, 71, 104, 120], dtype=torch.int32)
    query, key, value = torch.randn(120, 3 * heads * size).to(dtype).unflatten(-1, (3, heads, size)).unbind(1)
    sizes = torch.randint(1, 500, (120,)).float()
    out = tower_attention(query, key, value, sizes, starts, size**-0.5)
    assert out.dtype == dtype and not out[104:].any()
    parts = [x[:104].float().split(lengths) for x in (query, key, value, sizes, out)]
    for q, k, v, weighs, got in zip(*parts, strict=True):
        torch.testing.assert_close(got, reference.vision_attention(q, k, v, weighs), atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_features_in_half_precision_are_means_in_float32(seed: int) -> None:
    # The interpreter cuts bfloat16 off where a GPU rounds.
    hidden, added = torch.randn(1, 41, 520).half(), torch.randn(41, 520).half()
    keys = torch.randn(16) + 0.3 * torch.randn(41, 1, 16)
    tokens = DeviceTokens.start(hidden, 1)
    merged = TOWER.merge(tokens, added, TOWER.metric(keys), torch.tensor([0.9]), 41)
    (lengths,) = Lengths.read(merged).images
    assert 1 < lengths[0] < 41
    together = (hidden[0] + added).float()
    start = reference.Tokens(together, torch.ones(41), [[n] for n in range(41)])
    wanted = reference.dtome_layer(start, keys, 0.9)
    torch.testing.assert_close(merged.hidden[: lengths[0]].float(), wanted.hidden, atol=1e-6, rtol=2**-10)
    alone = wanted.sizes == 1
    assert torch.equal(merged.hidden[: lengths[0]][alone].float(), wanted.hidden[alone])
    assert not merged.hidden[lengths[0] :].any()


# ---- graphs ---------------------------------------------------------------------------------------


# What torch.tensor does with numbers of the host.
FROM_HOST = "aten.lift_fresh"


class Tape:
    """Stands for a CUDA graph: carries the recorded call out again, into the results of the first time."""

    def __init__(self, run: Callable[[], Any], pool: Any) -> None:
        self.run = run
        self.pool = pool
        self.results = run()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        (tokens, owner), (again, owner_again) = self.results, self.run()
        owner.copy_(owner_again)
        for name in ("hidden", "size", "bounds", "index"):
            getattr(tokens, name).copy_(getattr(again, name))


def captured(tower: Any, image_shape: tuple[int, ...], images: int, tapes: list[Tape]) -> DeviceEncoder:
    """An encoder with graphs of up to some images."""

    def record(run: Callable[[], Any], pool: Any) -> Any:
        tapes.append(Tape(run, pool))
        return tapes[-1], tapes[-1].results

    encoder = DeviceEncoder(TOWER, image_shape[0] - 1)
    graphs = encoder.make_graphs(tower, image_shape, images)
    graphs._record = record
    assert not graphs.is_captured()
    graphs.capture("pool")
    assert graphs.is_captured() and [tape.pool for tape in tapes] == ["pool"] * images * len(BUCKETS)
    return encoder


@pytest.mark.parametrize("scene", ["levels side by side", "a layer that merges nothing"], indirect=True)
@torch.inference_mode()
def test_replays_are_those_of_the_reference_whatever_was_replayed_before(scene: Any) -> None:
    """The graphs hold blank images in which nothing merges; then come batches of several sizes."""
    tower, rows, thresholds, wanted = scene
    most = min(len(rows), 2)
    encoder = captured(tower, rows.shape[1:], most, [])
    held = []
    for images in (most, 1, most):
        chosen = random.sample(range(len(rows)), images)
        with trace_step() as trace:
            live = encoder.encode(tower, rows[chosen], [thresholds[n] for n in chosen])
        assert trace.waits == ["Tensor.tolist"]
        held.append((live, [wanted[n] for n in chosen]))
    for live, tokens in held:
        check(live, tokens)
    assert encoder.capacity.batches == 0


@pytest.mark.parametrize("scene", ["one image"], indirect=True)
@torch.inference_mode()
def test_larger_batches_and_dropped_graphs_run_without(scene: Any) -> None:
    tower, rows, thresholds, wanted = scene
    tapes: list[Tape] = []
    encoder = captured(tower, rows.shape[1:], 1, tapes)
    twice = torch.cat([rows, rows]), [*thresholds, *thresholds], [*wanted, *wanted]
    check(encoder.encode(tower, *twice[:2]), twice[2])
    assert encoder.graphs is not None
    encoder.graphs.clear()
    assert not encoder.graphs.is_captured()
    check(encoder.encode(tower, rows[:1], thresholds[:1]), wanted[:1])
    assert not any(tape.replays for tape in tapes)


@torch.inference_mode()
def test_what_is_captured_asks_nothing_of_the_host(seed: int) -> None:
    """Nothing waits, and no number comes from the host: a graph would give the same again."""
    tower = make_tower(2, 2, 16)
    with trace_step() as uncaptured:
        DeviceEncoder(TOWER, 60).encode(tower, picture(60, 32, 0.4)[None], [(0.9, 0.9)])
    assert [one for one in uncaptured.operations if one.startswith(FROM_HOST)]
    with trace_step() as trace:
        captured(tower, (61, 32), 2, [])
    assert trace.waits == [] and not [one for one in trace.operations if one.startswith(FROM_HOST)]


@torch.inference_mode()
def test_replays_have_the_fewest_rows_that_are_enough(seed: int) -> None:
    """The first batches have a row for every token; a picture that needs more than was guessed runs again."""
    tower, thresholds = make_tower(3, 2, 16), (0.9,) * 3
    flat, flat_tokens = decided(tower, 48, 32, 0.05, thresholds)
    busy, busy_tokens = decided(tower, 48, 32, 2.0, thresholds)
    tapes: list[Tape] = []
    encoder = captured(tower, flat.shape, 1, tapes)
    whole, *_, fewest = tapes
    assert [tape.results[0].rows for tape in tapes] == [49, 27, 19, 14]
    check(encoder.encode(tower, flat[None], [thresholds]), [flat_tokens])
    assert (whole.replays, fewest.replays) == (1, 0)
    for _ in range(FEWEST - 1):
        encoder.capacity.learn([thresholds], [[25], [13], [len(flat_tokens.members)]])
    check(encoder.encode(tower, flat[None], [thresholds]), [flat_tokens])
    assert (whole.replays, fewest.replays) == (1, 1)
    check(encoder.encode(tower, busy[None], [thresholds]), [busy_tokens])
    assert (whole.replays, fewest.replays, encoder.capacity.reruns) == (2, 2, 1)


# ---- several ranks with the whole tower -------------------------------------------------------------


class Rank:
    """What the served model has to encode pictures with, where every rank has the whole tower."""

    def __init__(self, tower: Any, encoder: DeviceEncoder, patches: int, ranks: Ranks) -> None:
        self.vision_tower, self.patches = tower, patches
        self._device_encoder, self._tower_ranks, self._ops = encoder, ranks, GpuAttention()

    def encode(self, rows: torch.Tensor, thresholds: Any) -> LiveTokens:
        """Its batch, with the other ranks."""
        return LlavaHybridForConditionalGeneration._encode(cast(Any, self), rows, thresholds)

    def _encode_here(self, rows: torch.Tensor, thresholds: Any) -> LiveTokens:
        # The interpreter runs one kernel at a time.
        with INTERPRETER:
            return LlavaHybridForConditionalGeneration._encode_here(cast(Any, self), rows, thresholds)


def encode_by_ranks(
    tower: Any, encoders: Sequence[DeviceEncoder], rows: torch.Tensor, thresholds: Sequence[Any]
) -> list[LiveTokens]:
    """What each rank has of a batch that all of them encode; they meet twice."""
    group = RankThreads(len(encoders))

    def work(ranks: Ranks) -> LiveTokens:
        rank = Rank(tower, encoders[ranks.own], rows.shape[1] - 1, ranks)
        return rank.encode(rows, thresholds)

    found = group.run(work)
    assert group.exchanges == [2] * len(encoders)
    return found


@torch.inference_mode()
def test_ranks_guess_rows_for_their_shares_each_for_itself(seed: int) -> None:
    """One guesses right, one has to run its share again, one merges nothing; then two have no picture."""
    thresholds, never, patches, width = (0.9, 0.9), (NONE, NONE), 48, 32
    tower = make_tower(2, 2, 16)
    encoders = [DeviceEncoder(TOWER, patches) for _ in range(3)]
    flat = [decided(tower, patches, width, 0.05, thresholds) for _ in range(2)]
    busy = [decided(tower, patches, width, 2.0, thresholds) for _ in range(2)]
    plain = [decided(tower, patches, width, 0.5, never)]
    few = max(len(tokens.members) for _, tokens in flat)
    for encoder in encoders[:2]:
        for _ in range(FEWEST):
            encoder.capacity.learn([thresholds], [[1 + patches], [few]])
    pictures = flat + busy + plain
    rows = torch.stack([own for own, _ in pictures])
    found = encode_by_ranks(tower, encoders, rows, [thresholds] * 4 + [never])
    assert [(e.capacity.batches, e.capacity.reruns) for e in encoders] == [(1, 0), (1, 1), (0, 0)]
    found += encode_by_ranks(tower, encoders, rows[:1], [thresholds])
    for wanted, of_ranks in ((pictures, found[:3]), (pictures[:1], found[3:])):
        check(of_ranks[0], [tokens for _, tokens in wanted])
        for other in of_ranks[1:]:
            assert other.counts == of_ranks[0].counts
            for name in ("features", "image", "index", "owner"):
                assert torch.equal(getattr(other, name), getattr(of_ranks[0], name))


@torch.inference_mode()
def test_a_batch_that_ranks_share_waits_once_more(seed: int) -> None:
    """For the live tokens of the others' pictures, also where it has none itself."""
    tower = make_tower(2, 2, 16)
    rows = torch.stack([picture(40, 32, 0.4) for _ in range(2)])
    waits = []
    for own, images in ((0, 2), (1, 1)):
        # Ranks that are all alike: a share of one picture, or of none.
        ranks = Ranks(2, own, lambda part: torch.stack([part, part]))
        with trace_step() as trace:
            live = Rank(tower, DeviceEncoder(TOWER, 40), 40, ranks).encode(
                rows[:images], [(0.9, 0.9)] * images
            )
        assert len(live.counts) == images
        waits.append(trace.waits)
    assert waits == [["Tensor.tolist"] * 2, ["Tensor.tolist"]]


# ---- launches and waits ---------------------------------------------------------------------------


def traced(
    encode: Callable[[Any, torch.Tensor, Any], LiveTokens], layers: int
) -> tuple[list[str], list[str]]:
    """Launches of a tower in which every layer merges, and its waits."""
    torch.manual_seed(5)
    tower = make_tower(layers, 2, 16)
    rows = torch.stack([picture(60, 32, 0.4) for _ in range(3)])
    with trace_step() as trace:
        encode(tower, rows, [(0.9,) * layers] * 3)
    return trace.launches, trace.waits


@torch.no_grad()
def test_a_merging_layer_launches_half_of_what_torch_does_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # On a device rows are not cut into chunks.
    monkeypatch.setattr(clip, "map_row_chunks", lambda function, rows: function(rows))
    ops = cast(AnyAttentionOps, GpuAttention())

    def by_torch(tower: Any, rows: torch.Tensor, thresholds: Any) -> LiveTokens:
        return encode_merged(tower, rows, thresholds, ops)

    found = {}
    for name, run in (("torch", by_torch), ("kernels", DeviceEncoder(TOWER, 60).encode)):
        few, more = traced(run, 2), traced(run, 3)
        found[name] = len(more[0]) - len(few[0])
        assert more[1] == ["Tensor.tolist"] * (3 if run is by_torch else 1)
    print(f"\nlaunches of a merging layer: {found}")
    assert 0 < 2 * found["kernels"] <= found["torch"]
