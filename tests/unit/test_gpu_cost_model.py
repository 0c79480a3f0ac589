"""The cost model of one H100: what it counts, what it serves, and the page of its predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.gpu.kernels import tower_attention
from benchmarks.gpu.prediction import cost_model, predictions
from benchmarks.gpu.prediction.cost_model import (
    STOCK,
    STOCK_TRITON,
    Engine,
    Gpu,
    Reduction,
    Shape,
    Work,
    encode_time,
    replay_time,
    step_time,
    tower_graph_room,
    tower_room,
)
from tests.support.paths import ROOT

FULL = Shape()

SMALL = Shape(
    vision_layers=3,
    vision_width=48,
    vision_inside=96,
    vision_heads=4,
    patches=16,
    patch_size=14,
    layers=4,
    width=64,
    inside=96,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=120,
)


def test_operation_counts_are_torch_s_own() -> None:
    text, image_token = 9, 100
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=SMALL.vision_width,
            intermediate_size=SMALL.vision_inside,
            num_hidden_layers=SMALL.vision_layers,
            num_attention_heads=SMALL.vision_heads,
            image_size=56,
            patch_size=SMALL.patch_size,
        ),
        text_config=LlamaConfig(
            hidden_size=SMALL.width,
            intermediate_size=SMALL.inside,
            num_hidden_layers=SMALL.layers,
            num_attention_heads=SMALL.heads,
            num_key_value_heads=SMALL.kv_heads,
            head_dim=SMALL.head_size,
            vocab_size=SMALL.vocabulary,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=SMALL.patches,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1] * 4 + [image_token] * SMALL.patches + [2] * (text - 4)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56), logits_to_keep=1)
    tower = {name: f for name, f in counter.get_flop_counts().items() if name.endswith("vision_tower")}
    (tower_total,) = (sum(found.values()) for found in tower.values())
    off = Reduction()
    # transformers runs all layers of the tower and takes the one before the last's features.
    assert tower_total == cost_model.tower_linear_flops(SMALL, off) + cost_model.tower_attention_flops(
        SMALL, off
    )
    length = text + SMALL.patches
    decoder = SMALL.layers * (
        cost_model.linear_flops(SMALL, length) + cost_model.attention_flops(SMALL, length * length)
    )
    rest = cost_model.projector_flops(SMALL, SMALL.patches) + cost_model.head_flops(SMALL, 1)
    assert counter.get_total_flops() - tower_total == decoder + rest


def test_causal_attention_counts_the_pairs_that_see_each_other() -> None:
    for queries, keys in ((1, 7), (5, 5), (3, 8)):
        pairs = sum(k <= keys - queries + q for q in range(queries) for k in range(keys))
        assert cost_model.causal_pairs(queries, keys) == pairs


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("live", [1, 90, 195, 394, 575, None])
@pytest.mark.parametrize("image_start", [0, 5, 16, 131])
def test_kv_blocks_are_those_the_managers_hold(live: int | None, ratio: float, image_start: int) -> None:
    from vllm.v1.core.block_pool import BlockPool

    from vllm_hybrid.kv.tiers import SPEC_OF_TIER, Tier, TierManager, tier_block_sizes
    from vllm_hybrid.method.fastv import live_to_kept

    reduction = Reduction(live, ratio)
    if not reduction.active:
        return
    positions = image_start + FULL.patches + 57
    lower = 2 if ratio else FULL.layers
    sizes = tier_block_sizes(16, lower, FULL.layers - lower)
    count = FULL.patches if live is None else live
    tokens = {Tier.LOWER: count, Tier.UPPER: live_to_kept(count, ratio)}
    pool = BlockPool(num_gpu_blocks=200, enable_caching=False, hash_block_size=16)
    free = pool.get_num_free_blocks()
    predicted = cost_model.tier_blocks(FULL, reduction, positions, image_start)
    page_bytes = set()
    total = 0
    for (tier, size), guess in zip(sizes.items(), predicted, strict=True):
        spec: Any = SPEC_OF_TIER[tier](
            block_size=size, num_kv_heads=32, head_size=128, head_size_v=128, dtype=torch.bfloat16
        )
        manager = TierManager(
            spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=size
        )
        manager.allocate_new_blocks("request", positions, positions)
        copy = manager.copy_of("request", image_start)
        manager.settle(copy, count, image_start, tokens[tier], FULL.patches)
        manager.give_back("request", image_start)
        held = sum(not block.is_null for block in manager.req_to_blocks["request"])
        assert guess.blocks == held
        total += held * guess.layers * spec.page_size_bytes
        page_bytes.add(guess.layers * spec.page_size_bytes)
    assert free - pool.get_num_free_blocks() == sum(guess.blocks for guess in predicted)
    assert len(page_bytes) == 1
    assert cost_model.request_kv_bytes(FULL, reduction, positions, image_start) == total


def test_stock_holds_every_block() -> None:
    assert cost_model.request_kv_bytes(FULL, Reduction(), 638) == 40 * 16 * 32 * 2 * 32 * 128 * 2


def test_an_image_costs_less_the_fewer_tokens_are_left() -> None:
    gpu = Gpu()
    for tokens in (1, 32, 256):
        rates = [
            predictions.serve(FULL, Engine(Reduction(live, ratio)), tokens, gpu, requests=32).requests_per_s
            for live, ratio in ((394, 0.0), (195, 0.0), (90, 0.0), (90, 0.5), (90, 0.75))
        ]
        assert rates == sorted(rates) and len(set(rates)) == len(rates)


def test_a_replay_spares_launches_and_computes_more_rows() -> None:
    engine, gpu = Engine(Reduction(90, 0.5)), Gpu()
    assert replay_time(FULL, engine, 1, gpu) < encode_time(FULL, engine, 1, gpu)
    free = replace(gpu, launch=0.0)
    assert replay_time(FULL, engine, 1, free) > encode_time(FULL, engine, 1, free)
    room = tower_graph_room(FULL, Reduction(90))
    assert tower_room(FULL, Reduction(90)) < room < tower_graph_room(FULL, Reduction(20))


def test_flash_attention_speeds_up_stock_and_is_refused_to_the_hybrid() -> None:
    gpu = Gpu()
    prompts = Work(8, 636)
    assert step_time(FULL, STOCK, prompts, gpu) < step_time(FULL, STOCK_TRITON, prompts, gpu)
    assert encode_time(FULL, STOCK, 8, gpu) < encode_time(FULL, STOCK_TRITON, 8, gpu)
    faster = replace(gpu, attention_share=0.6, tower_attention_share=0.6)
    assert step_time(FULL, STOCK, prompts, faster) == step_time(FULL, STOCK, prompts, gpu)
    with pytest.raises(ValueError, match="leave flash out"):
        Engine(Reduction(90, 0.5), flash=True)


def test_requests_are_served_in_whole_prompts() -> None:
    # Three prompts of 636 positions fit in a step of 2000, so seven requests take three steps.
    gpu = Gpu()
    took = [step_time(FULL, STOCK, Work(prompts, 636), gpu) for prompts in (3, 3, 1)]
    found = predictions.serve(FULL, STOCK, 1, gpu, requests=7, step_tokens=2000)
    assert found.requests_per_s == pytest.approx(7 / sum(took))
    assert found.first_token_s == pytest.approx(took[0] + took[1])
    assert found.per_token_s is None


def test_in_a_closed_loop_a_request_is_sent_when_one_ends() -> None:
    gpu = Gpu()
    prefill, decode = (
        step_time(FULL, STOCK, Work(1, 636), gpu),
        step_time(FULL, STOCK, Work(0, 636, [637]), gpu),
    )
    found = predictions.serve(FULL, STOCK, 2, gpu, requests=5, concurrency=1)
    assert found.requests_per_s == pytest.approx(1 / (prefill + decode))
    assert found.first_token_s == pytest.approx(prefill)
    assert found.per_token_s == pytest.approx(decode)
    assert found.most_running == 1
    alike = [
        predictions.serve(FULL, STOCK, 2, gpu, requests=5, concurrency=flight) for flight in (None, 5, 9)
    ]
    assert alike[0] == alike[1] == alike[2]


def test_requests_that_the_pool_has_no_room_for_wait() -> None:
    gpu = Gpu()
    whole = cost_model.request_kv_bytes(FULL, Reduction(), 636 + 4)
    for room in (1, 3):
        found = predictions.serve(FULL, STOCK, 4, gpu, requests=6, pool_bytes=room * whole + whole // 2)
        assert found.most_running == room
    # The hybrid needs room for a whole prompt first, and for its live tokens from then on.
    found = predictions.serve(FULL, predictions.TARGET, 32, gpu, requests=9, pool_bytes=2 * whole)
    assert 2 < found.most_running < 9
    with pytest.raises(ValueError, match="no request fits"):
        predictions.serve(FULL, STOCK, 4, gpu, requests=1, pool_bytes=whole - 1)


def test_assumptions_can_be_changed_by_name() -> None:
    assert predictions.changed(["launch=1e-6", "merge_launches=7"]) == Gpu(launch=1e-6, merge_launches=7)
    with pytest.raises(ValueError, match="'lunch' is no assumption; use one of flops, "):
        predictions.changed(["lunch=1"])
    with pytest.raises(ValueError, match="'many' is no int for merge_launches"):
        predictions.changed(["merge_launches=many"])


def test_the_page_of_predictions_is_the_model_s() -> None:
    text = (ROOT / "docs" / "predictions.md").read_text()
    assert text.startswith(f"# {predictions.HEADING}")
    for heading, table in predictions.report(FULL, Gpu()).items():
        assert f"\n## {heading}\n" in text
        assert table in text, heading


def test_log_size_in_head_channels_is_exact_in_three_pieces() -> None:
    torch.manual_seed(0)
    heads, tokens, size = 2, 40, 64
    query, key, value = torch.randn(3, 1, heads, tokens, size).bfloat16().float()
    bias = torch.randint(1, 577, (tokens,)).float().log()
    scale = size**-0.5
    wanted = scaled_dot_product_attention(query, key, value, bias.expand(tokens, tokens), scale=scale)

    def folded(pieces: int) -> float:
        left, channels = bias / scale, []
        for _ in range(pieces):
            channels.append(left.bfloat16().float())
            left = left - channels[-1]
        more = torch.stack(channels, -1).expand(1, heads, tokens, pieces)
        wide_query = torch.cat([query, torch.ones_like(more)], -1)
        found = scaled_dot_product_attention(wide_query, torch.cat([key, more], -1), value, scale=scale)
        return float((found - wanted).abs().max())

    assert folded(1) > 1e-3
    assert folded(3) < 1e-5
    errors = [tower_attention.bias_error(torch.bfloat16, pieces, FULL) for pieces in (1, 2, 3)]
    assert 1e-2 < errors[0] < 2**-6 and 1e-5 < errors[1] < 2**-14 and errors[2] < 2**-21


def test_padding_and_channels_cost_the_tower_more_than_attention_does() -> None:
    padded, packed, widened = tower_attention.costs(FULL)
    assert packed.flops == tower_attention.IMAGES * cost_model.tower_attention_flops(FULL, Reduction(90))
    assert padded.flops > packed.flops and padded.bytes > packed.bytes
    assert widened.flops == 1.5 * packed.flops and packed.bytes < widened.bytes < padded.bytes


def test_the_page_about_kernels_has_the_choices_for_the_tower() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert tower_attention.cost_table(FULL) in text
    assert tower_attention.error_table(FULL) in text


def test_tables_of_a_page_are_replaced_where_they_stand() -> None:
    page = "# a\n\n## One\n\nwords\n\n| x |\n|---|\n| 1 |\n\nmore\n\n| kept |\n\n## Two\n\n| y |\n"
    found = predictions.refreshed(page, {"One": "| 2 |", "Two": "| 3 |"})
    assert found == "# a\n\n## One\n\nwords\n\n| 2 |\n\nmore\n\n| kept |\n\n## Two\n\n| 3 |\n"
    for wrong in ("# a\n", "## One\n\nno table\n\n## Two\n\n| y |\n"):
        with pytest.raises(ValueError, match="no table under '## One'"):
            predictions.refreshed(wrong, {"One": "| 2 |"})


def test_predictions_stand_on_their_page_alone() -> None:
    for page in (ROOT / "benchmarks" / "gpu" / "README.md", ROOT / "README.md", ROOT / "docs" / "kernels.md"):
        assert predictions.HEADING not in page.read_text()
        assert "docs/predictions.md" in page.read_text() or "(predictions.md)" in page.read_text()
