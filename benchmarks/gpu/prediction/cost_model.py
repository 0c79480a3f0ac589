"""A written cost model of one H100 serving LLaVA-1.5-7B: operations, bytes and seconds of single steps.

Nothing here is measured. Operations and bytes are counted exactly where the configuration decides them (tests
hold the counts to torch's own and the KV blocks to the scheduler's); how much of the machine's peak a part
reaches, and what the host costs, are assumptions, all of them in :class:`Gpu`. What loads of requests then
take is in predictions.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from vllm_hybrid.attention.triton_kernels.lists import SEGMENT  # noqa: E402
from vllm_hybrid.method.fastv import live_to_kept  # noqa: E402
from vllm_hybrid.models.tower_capacity import SLACK, STEPS, row_buckets  # noqa: E402
from vllm_hybrid.tools.calibrate import live_schedule  # noqa: E402

BLOCK_SIZE = 16
TEXT_TOKENS = 60
# <image> is one prompt token, which becomes one position per patch; 5 text tokens stand before it.
TEXT_BEFORE = 5
FASTV_LAYER = 2


@dataclass(frozen=True)
class Gpu:
    """One GPU, and what is assumed of the software on it.

    Attributes:
        flops: peak dense bf16 operations per second (data sheet, H100 SXM).
        bandwidth: peak bytes per second of device memory (data sheet).
        gemm_share: assumed share of the peak that matrix products of a prefill reach.
        flash_share: assumed share of the peak that FlashAttention 3 reaches in a prefill.
        attention_share: assumed share that Triton prefill attention reaches, in stock on Triton.
        flash_tower_share: assumed share that FlashAttention 3 reaches in stock's tower (577 tokens, head
            size 64).
        tower_attention_share: assumed share that attention reaches in the tower of the hybrid (Triton's, with
            sizes) and of stock on Triton (torch's).
        bandwidth_share: assumed share of the bandwidth that weights and KV are read with.
        stock_layer_passes: assumed times that a decoder layer reads or writes its rows, in units of the
            width, between its products: norms, rotation, KV writes, activation; counted as if unfused.
        hybrid_layer_passes: the same of the hybrid. On top comes what is expanded, counted.
        tower_layer_passes: the same of a tower layer without merging.
        merge_passes: the same, further, of a layer that merges: the metric reads the keys; the addition and
            the means take one pass over the features.
        cache_bandwidth: assumed bytes per second that multiprocessors get from the L2 cache.
        launch: assumed seconds the host takes to launch one kernel outside of a CUDA graph.
        stock_layer_launches: assumed launches per decoder layer of a prefill step, stock.
        hybrid_layer_launches: the same of the hybrid: expansion and the mean add a few.
        tower_layer_launches: assumed launches per tower layer without merging.
        merge_launches: further launches of a layer that merges: metric, match and plan; the means take the
            place of an addition.
        round_trip: assumed seconds one wait of the host for the device costs; a batch of images that merge
            has one, and so has a step with images.
        step: assumed seconds per step for scheduling, sampling and messages that nothing overlaps.

    """

    flops: float = 989e12
    bandwidth: float = 3.35e12
    gemm_share: float = 0.65
    flash_share: float = 0.60
    attention_share: float = 0.30
    flash_tower_share: float = 0.45
    tower_attention_share: float = 0.30
    bandwidth_share: float = 0.80
    stock_layer_passes: int = 24
    hybrid_layer_passes: int = 24
    tower_layer_passes: int = 20
    merge_passes: int = 1
    cache_bandwidth: float = 5.5e12
    launch: float = 5e-6
    stock_layer_launches: int = 9
    hybrid_layer_launches: int = 12
    tower_layer_launches: int = 12
    merge_launches: int = 3
    round_trip: float = 30e-6
    step: float = 1e-3


@dataclass(frozen=True)
class Shape:
    """What of a LLaVA-1.5 configuration decides the cost; the defaults are the 7B model's, in bf16."""

    vision_layers: int = 23
    vision_width: int = 1024
    vision_inside: int = 4096
    vision_heads: int = 16
    patches: int = 576
    patch_size: int = 14
    layers: int = 32
    width: int = 4096
    inside: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_size: int = 128
    vocabulary: int = 32064
    number_bytes: int = 2

    @property
    def layer_weights(self) -> int:
        """Numbers in one decoder layer's matrices."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return self.width * (2 * queries + 2 * keys) + 3 * self.width * self.inside

    @property
    def token_kv_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_size * self.number_bytes


@dataclass(frozen=True)
class Reduction:
    """How far image tokens are reduced: live tokens after the tower (None: no merging), FastV's K and R."""

    live: int | None = None
    ratio: float = 0.0
    layer: int = FASTV_LAYER

    def live_of(self, shape: Shape) -> int:
        """Live tokens of an image."""
        return shape.patches if self.live is None else self.live

    def kept_of(self, shape: Shape) -> int:
        """Image tokens in the upper layers."""
        live = self.live_of(shape)
        return live_to_kept(live, self.ratio) if self.ratio else live

    @property
    def active(self) -> bool:
        """Whether anything is reduced."""
        return self.live is not None or self.ratio > 0

    def lower_layers(self, shape: Shape) -> int:
        """Decoder layers in the lower tier."""
        return self.layer if self.ratio else shape.layers


@dataclass(frozen=True)
class Engine:
    """A server: what it reduces, and whether it is stock with FlashAttention 3 in decoder and tower.

    Stock has FlashAttention where vLLM chooses itself, and not where Triton is asked for. The hybrid has it
    in prefills of the decoder; its decodes are Triton's, and its tower's attention is torch's.
    """

    reduction: Reduction = field(default_factory=Reduction)
    flash: bool = False

    def __post_init__(self) -> None:
        if self.flash and self.reduction.active:
            raise ValueError("an engine that reduces chooses its attention itself; leave flash out")


STOCK = Engine(flash=True)
STOCK_TRITON = Engine()


# Operations. A multiplication with its addition counts as two.


def tower_tokens(shape: Shape, reduction: Reduction) -> list[tuple[float, float]]:
    """Tokens of an image in each executed tower layer, class token included: in attention, in the MLP."""
    before = [float(shape.patches)] * shape.vision_layers
    after = before
    if reduction.live is not None and reduction.live < shape.patches:
        after = live_schedule(shape.patches, reduction.live, shape.vision_layers)
        before = [float(shape.patches), *after[:-1]]
    return [(b + 1, a + 1) for b, a in zip(before, after, strict=True)]


def tower_room(shape: Shape, reduction: Reduction) -> float:
    """Rows that the tower computes over the tokens there are, where every picture leaves as many.

    Layers are granted :data:`SLACK` times what was needed before, rounded up by half a step on average.
    """
    unmerged = shape.patches + 1
    tokens = [attended for attended, _ in tower_tokens(shape, reduction)]
    granted = [min(unmerged, SLACK * own + unmerged / (2 * STEPS)) for own in tokens]
    return sum(granted) / sum(tokens)


def tower_graph_room(shape: Shape, reduction: Reduction) -> float:
    """The same of a captured graph: its bucket is the least with room for what is granted."""
    tokens = [merged for _, merged in tower_tokens(shape, reduction)]
    unmerged = shape.patches + 1
    buckets = row_buckets(1, unmerged, shape.vision_layers)
    granted = [min(unmerged, SLACK * own) for own in tokens]
    enough = [rows for rows in buckets if all(row >= own for row, own in zip(rows, granted, strict=True))]
    return sum((enough or buckets[:1])[-1]) / sum(tokens)


def tower_linear_flops(shape: Shape, reduction: Reduction) -> float:
    """Operations of the patch embedding and the tower's matrices, per image."""
    width = shape.vision_width
    total = 2.0 * shape.patches * 3 * shape.patch_size**2 * width
    for attended, merged in tower_tokens(shape, reduction):
        total += 8 * attended * width**2 + 4 * merged * width * shape.vision_inside
    return total


def tower_attention_flops(shape: Shape, reduction: Reduction) -> float:
    """Operations of the tower's attention, per image."""
    return sum(4 * t * t * shape.vision_width for t, _ in tower_tokens(shape, reduction))


def matching_flops(shape: Shape, reduction: Reduction) -> float:
    """Operations of scoring every A token against every B token, per image."""
    if reduction.live is None:
        return 0.0
    size = shape.vision_width / shape.vision_heads
    return sum(2 * (t / 2) ** 2 * size for t, _ in tower_tokens(shape, reduction))


def projector_flops(shape: Shape, tokens: float) -> float:
    """Operations of LLaVA's two-layer projector."""
    return 2 * tokens * (shape.vision_width * shape.width + shape.width**2)


def linear_flops(shape: Shape, rows: float) -> float:
    """Operations of one decoder layer's matrices."""
    return 2 * rows * shape.layer_weights


def attention_flops(shape: Shape, pairs: float) -> float:
    """Operations of one decoder layer's attention over pairs of virtual query and key."""
    return 4 * pairs * shape.heads * shape.head_size


def head_flops(shape: Shape, rows: float) -> float:
    """Operations of the language model's head."""
    return 2 * rows * shape.width * shape.vocabulary


def causal_pairs(queries: float, keys: float) -> float:
    """Pairs that see each other when the queries are the last of the keys."""
    return queries * keys - queries * (queries - 1) / 2


# Bytes that blocks of threads ask of the caches, per layer and request. A block of a prefill reads every key
# it sees for one tile of queries; the hybrid reads a float32 row of cosines and sines beside each key it
# rotates. What the caches of the multiprocessors hold already is not taken off.

FLASH_QUERY_TILE = 128  # FlashAttention 3, head size 128
STOCK_QUERY_TILE = 16  # vLLM's Triton attention, one query head per key head
COS_SIN_BYTES = 4


def key_bytes(shape: Shape, keys: float, rotated: float) -> float:
    """Bytes of keys, their values and, for those that are rotated, cosines and sines: of one key head."""
    return shape.head_size * (2 * shape.number_bytes * keys + COS_SIN_BYTES * rotated)


def asked_by_prefill(shape: Shape, positions: float, tile: int) -> float:
    """Bytes of keys and values asked of the caches by a prompt's dense attention.

    Args:
        shape: the model.
        positions: virtual positions of the prompt.
        tile: queries that a block answers at once.

    """
    tiles = positions / tile
    seen = tile * tiles * (tiles + 1) / 2
    return shape.heads * key_bytes(shape, seen, 0)


EXPAND_HEADS = 8  # of a program of attention/triton_kernels/expand.py: they share cosines and sines


def expanded_bytes(shape: Shape, positions: float) -> float:
    """Bytes of a prompt's queries, keys and values at all their virtual positions."""
    return positions * shape.number_bytes * shape.head_size * (shape.heads + 2 * shape.kv_heads)


def asked_by_expansion(shape: Shape, positions: float, rotated: float) -> float:
    """Bytes asked of the caches, and written, by the expansion of a prompt's queries, keys and values.

    Args:
        shape: the model.
        positions: virtual positions of the prompt.
        rotated: of them those that are rotated: an image's.

    """
    programs = (shape.heads + shape.kv_heads) / EXPAND_HEADS
    return 2 * expanded_bytes(shape, positions) + programs * rotated * shape.head_size * COS_SIN_BYTES


# Of the decode kernel, triton_kernels/decode.py: query heads of a program, and positions between two
# coarse rows of its cosines and sines.
DECODE_HEADS = 4
FINE_POSITIONS = 32


def asked_by_decode(
    shape: Shape, requests: int, text: float, rows: float = 0.0, positions: float = 0.0
) -> float:
    """Bytes that decodes ask of the cache behind the multiprocessors' own.

    A text row's key and value are asked for once, an image row's once for every SEGMENT of its positions,
    taken as if each row's last segment were begun. Each program asks once for the rows of the table of
    cosines and sines that its positions are made of; they stay in the multiprocessor's own cache.

    Args:
        shape: the model.
        requests: that decode.
        text: stored text rows of all; in stock all rows.
        rows: stored image rows of all.
        positions: virtual positions of the image rows.

    """
    segments = rows + positions / SEGMENT
    table_rows = requests * FINE_POSITIONS + positions / FINE_POSITIONS if rows else 0.0
    lists = 4 * text + 8 * segments + 4 * positions
    programs = shape.heads / DECODE_HEADS
    rotating = programs * (table_rows * shape.head_size * COS_SIN_BYTES + lists) if rows else 0.0
    return (text + segments) * shape.token_kv_bytes + rotating


# KV memory: exactly the blocks that vLLM's managers hold once the step after the prefill has run.


@dataclass(frozen=True)
class TierBlocks:
    """Blocks of one KV tier: layers, tokens per block, blocks of a request with its holes given back."""

    layers: int
    block_size: int
    blocks: int


def tier_blocks(
    shape: Shape, reduction: Reduction, positions: int, image_start: int | None = TEXT_BEFORE
) -> list[TierBlocks]:
    """Blocks a request holds.

    Args:
        shape: the model.
        reduction: what is switched on; nothing: stock vLLM at blocks of BLOCK_SIZE.
        positions: virtual positions stored.
        image_start: virtual position of the request's image, None without one.

    Returns:
        One entry per tier.

    """
    from vllm_hybrid.kv.tiers import Tier, tier_block_sizes

    lower = reduction.lower_layers(shape)
    sizes = tier_block_sizes(BLOCK_SIZE, lower, shape.layers - lower)
    layers = {Tier.LOWER: lower, Tier.UPPER: shape.layers - lower}
    tokens = {Tier.LOWER: reduction.live_of(shape), Tier.UPPER: reduction.kept_of(shape)}
    found = []
    for tier, size in sizes.items():
        blocks = -(-positions // size)
        if image_start is not None and reduction.active:
            first, end = image_start + tokens[tier], image_start + shape.patches
            blocks -= max(0, end // size - -(-first // size))
        found.append(TierBlocks(layers[tier], size, blocks))
    return found


def request_kv_bytes(
    shape: Shape, reduction: Reduction, positions: int, image_start: int | None = TEXT_BEFORE
) -> int:
    """Bytes of the KV pool that a request holds; see :func:`tier_blocks`."""
    return sum(
        tier.layers * tier.block_size * tier.blocks * shape.token_kv_bytes
        for tier in tier_blocks(shape, reduction, positions, image_start)
    )


# Time.


@dataclass
class Work:
    """What one step computes: prompts prefilled and requests that decode, with their virtual lengths."""

    prefills: int = 0
    prompt: int = 0
    decodes: Sequence[int] = field(default_factory=list)


def kept_patches(shape: Shape, reduction: Reduction) -> float:
    """Patches that kept tokens hold, taken as if all live tokens held equally many."""
    return shape.patches * reduction.kept_of(shape) / reduction.live_of(shape)


def encode_time(shape: Shape, engine: Engine, images: int, gpu: Gpu) -> float:
    """Seconds to encode images in one batch."""
    if images == 0:
        return 0.0
    device = _tower_device_time(shape, engine, images, gpu, tower_room(shape, engine.reduction))
    merges = engine.reduction.live is not None
    launches = gpu.tower_layer_launches + (gpu.merge_launches if merges else 0)
    waits = gpu.round_trip if merges else 0.0
    return max(device, shape.vision_layers * launches * gpu.launch) + waits


def replay_time(shape: Shape, engine: Engine, images: int, gpu: Gpu) -> float:
    """Seconds to encode images that merge in one batch, by a captured graph."""
    room = tower_graph_room(shape, engine.reduction)
    return _tower_device_time(shape, engine, images, gpu, room) + gpu.launch + gpu.round_trip


def _tower_device_time(shape: Shape, engine: Engine, images: int, gpu: Gpu, room: float) -> float:
    """Seconds that the device takes for a batch, with so many times the rows it needs."""
    reduction = engine.reduction
    attention_share = gpu.flash_tower_share if engine.flash else gpu.tower_attention_share
    gemm = tower_linear_flops(shape, reduction) * room + matching_flops(shape, reduction)
    gemm += projector_flops(shape, reduction.live_of(shape))
    device = images * gemm / (gpu.flops * gpu.gemm_share)
    device += images * tower_attention_flops(shape, reduction) / (gpu.flops * attention_share)
    merges = reduction.live is not None
    passes = gpu.tower_layer_passes + (gpu.merge_passes if merges else 0)
    tokens = room * sum(attended for attended, _ in tower_tokens(shape, reduction))
    moved = images * tokens * passes * shape.vision_width * shape.number_bytes
    return device + moved / (gpu.bandwidth * gpu.bandwidth_share)


def query_tile(engine: Engine) -> int:
    """Queries that a block of prefill attention answers at once."""
    return FLASH_QUERY_TILE if engine.flash or engine.reduction.active else STOCK_QUERY_TILE


def decoder_time(shape: Shape, engine: Engine, work: Work, gpu: Gpu) -> float:
    """Seconds in the decoder's layers and head for one step."""
    reduction = engine.reduction
    flash = engine.flash or reduction.active
    attention_share = gpu.flash_share if flash else gpu.attention_share
    lower = reduction.lower_layers(shape)
    text = work.prompt - shape.patches
    live, kept = reduction.live_of(shape), reduction.kept_of(shape)
    tiers = [
        (lower, live, float(shape.patches)),
        (shape.layers - lower, kept, kept_patches(shape, reduction)),
    ]
    text_stored = sum(work.decodes) - len(work.decodes) * shape.patches
    total = 0.0
    for layers, image_rows, image_positions in tiers:
        rows = work.prefills * (text + image_rows) + len(work.decodes)
        weights = shape.layer_weights * shape.number_bytes
        linear = max(
            linear_flops(shape, rows) / (gpu.flops * gpu.gemm_share),
            weights / (gpu.bandwidth * gpu.bandwidth_share),
        )
        virtual = text + image_positions
        pairs = causal_pairs(virtual, virtual)
        asked = asked_by_prefill(shape, virtual, query_tile(engine))
        prefill = work.prefills * max(
            attention_flops(shape, pairs) / (gpu.flops * attention_share), asked / gpu.cache_bandwidth
        )
        # A decode reads every stored row once from memory, however many positions it stands at.
        stored = text_stored + len(work.decodes) * image_rows
        asking = len(work.decodes)
        asked_rows = (
            (text_stored, asking * image_rows, asking * image_positions) if reduction.active else (stored,)
        )
        read = max(
            stored * shape.token_kv_bytes / (gpu.bandwidth * gpu.bandwidth_share),
            asked_by_decode(shape, asking, *asked_rows) / gpu.cache_bandwidth,
        )
        passes = gpu.hybrid_layer_passes if reduction.active else gpu.stock_layer_passes
        moved = float(rows * passes * shape.width * shape.number_bytes)
        if reduction.active:
            # Queries, keys, values and answers at all positions are written and read.
            answers = virtual * shape.heads * shape.head_size * shape.number_bytes
            moved += 2 * work.prefills * (expanded_bytes(shape, virtual) + answers)
        total += layers * (linear + prefill + read + moved / (gpu.bandwidth * gpu.bandwidth_share))
    sampled = work.prefills + len(work.decodes)
    head = shape.width * shape.vocabulary * shape.number_bytes / (gpu.bandwidth * gpu.bandwidth_share)
    return total + max(head, head_flops(shape, sampled) / (gpu.flops * gpu.gemm_share))


def step_time(shape: Shape, engine: Engine, work: Work, gpu: Gpu) -> float:
    """Seconds of one step. A step of decodes alone is one CUDA graph and waits for no launch."""
    active = engine.reduction.active
    device = decoder_time(shape, engine, work, gpu)
    if work.prefills:
        per_layer = gpu.hybrid_layer_launches if active else gpu.stock_layer_launches
        device = max(device, shape.layers * per_layer * gpu.launch)
        device += gpu.round_trip if active else 0.0
    return encode_time(shape, engine, work.prefills, gpu) + device + gpu.step
