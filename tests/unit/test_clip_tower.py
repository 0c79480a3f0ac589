"""The plain torch tower against the independent reference and against transformers' own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration

from tests.support.reference import Reference
from tests.support.tiny_checkpoints import decided_images, make_images, pick_thresholds, write_checkpoint
from vllm_hybrid.method.clip_tower import LiveTokens, encode, executed_layers, run_tower
from vllm_hybrid.method.token_merging import PackedTokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llava"), seed=3)


@pytest.fixture(scope="module")
def vision_model(checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint).model.vision_tower.eval()


def test_merged_images_are_those_of_the_reference(checkpoint: Path, vision_model: Any) -> None:
    """A batch of images with different counts, each against the reference alone."""
    thresholds = pick_thresholds(checkpoint, list(make_images().values()), (0.4, 0.3, 0.5))
    reference = Reference(checkpoint, {"thresholds": thresholds})
    images = decided_images(reference, 4)
    pixels = torch.stack([reference.pixel_values(image) for image in images])
    live = encode(vision_model, pixels, thresholds)
    assert len(set(live.counts)) > 1 and max(live.counts) < 576
    _check(live, reference, pixels)


def _check(live: LiveTokens, reference: Reference, pixels: torch.Tensor) -> None:
    """Every image's live tokens, their order and their patches are those of the reference for it alone."""
    for i, features in enumerate(live.features.split(live.counts)):
        expected, _ = reference._tower(pixels[i], reference.settings[reference.default_level].thresholds)
        torch.testing.assert_close(features, expected.hidden[1:], atol=1e-4, rtol=1e-4)
        owners = live.owner[i].tolist()
        members = [[p for p, o in enumerate(owners) if o == n] for n in range(len(features))]
        assert members == [sorted(patches) for patches in expected.members[1:]]


def test_images_that_merge_nothing_in_a_layer_keep_their_order_beside_others_that_merge(
    checkpoint: Path, vision_model: Any, seed: int
) -> None:
    """In the first two layers about half of the images merge; in the last all do, by the order they have."""
    for images in (list(make_images(seed + offset).values()) for offset in range(20)):
        thresholds = _thresholds_that_part(checkpoint, images)
        reference = Reference(checkpoint, {"thresholds": thresholds})
        decided = [image for image in images if reference.merge_margin(image) > 4e-6]
        if len(decided) > 2:
            pixels = torch.stack([reference.pixel_values(image) for image in decided])
            merging = _merging_images(vision_model, pixels, thresholds)
            if 0 < merging[0] < len(pixels) == merging[2]:
                _check(encode(vision_model, pixels, thresholds), reference, pixels)
                return
    raise AssertionError("no images part clear of rounding")


def _thresholds_that_part(checkpoint: Path, images: list[Image.Image]) -> list[float]:
    """In the first two layers half of the images have a score above the threshold, in the last all have."""
    thresholds: list[float] = []
    for layer in range(3):
        reference = Reference(checkpoint, {"thresholds": [*thresholds, *[None] * (3 - layer)]})
        tops = sorted(float(reference.match_scores(image)[layer].max()) for image in images)
        half = len(tops) // 2
        thresholds.append((tops[half - 1] + tops[half]) / 2 if layer < 2 else tops[0] - 0.02)
    return thresholds


def _merging_images(vision_model: Any, pixels: torch.Tensor, thresholds: list[float]) -> list[int]:
    """How many of the images merge in each layer."""
    counts: list[int] = []

    def count(layer: int, tokens: PackedTokens, best: torch.Tensor) -> torch.Tensor:
        merges = best > thresholds[layer]
        counts.append(int(merges.any(dim=1).sum()))
        return merges

    run_tower(vision_model, pixels, count)
    return counts


def test_attention_leaves_out_the_kernel_that_plans_for_every_shape(
    vision_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's, which torch prefers on the newest GPUs; a process that allows it elsewhere keeps it there."""
    attend, allowed = F.scaled_dot_product_attention, []

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    torch.backends.cuda.enable_cudnn_sdp(True)
    encode(vision_model, torch.randn(2, 3, 336, 336), [0.5, None, 0.5])
    assert allowed == [False] * 3
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("layer", [-2, -1, 2, 0])
@pytest.mark.parametrize("thresholds", ["none", "nulls"])
def test_without_merging_it_is_the_stock_tower(vision_model: Any, layer: int, thresholds: str) -> None:
    pixels = torch.randn(2, 3, 336, 336)
    count = executed_layers(4, layer)
    live = encode(vision_model, pixels, None if thresholds == "none" else [None] * count, layer)
    with torch.no_grad():
        stock = vision_model(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(live.features, stock[:, 1:].flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert live.counts == [576, 576]
    assert live.owner.tolist() == [list(range(576))] * 2


def test_a_model_inside_a_model(vision_model: Any) -> None:
    """Older transformers keep the tower in an attribute of the model."""
    outer = nn.Module()
    outer.vision_model = vision_model
    pixels = torch.randn(1, 3, 336, 336)
    assert torch.equal(encode(outer, pixels, None).features, encode(vision_model, pixels, None).features)


def test_a_rule_sees_every_layer(checkpoint: Path, vision_model: Any) -> None:
    """The scores a rule is shown are those the reference compares with thresholds."""
    reference = Reference(checkpoint, {})
    image = make_images(1)["shapes"]
    seen: list[torch.Tensor] = []

    def look(layer: int, tokens: PackedTokens, best: torch.Tensor) -> None:
        assert layer == len(seen) and tokens.layout.total == 577
        seen.append(best[0])

    run_tower(vision_model, reference.pixel_values(image)[None], look)
    expected = reference.match_scores(image)
    assert len(seen) == len(expected) == 3
    for scores, own in zip(seen, expected, strict=True):
        assert scores[0] == -torch.inf
        torch.testing.assert_close(scores[1:], own, atol=1e-5, rtol=0)


def test_wrong_arguments(vision_model: Any) -> None:
    pixels = torch.randn(1, 3, 336, 336)
    with pytest.raises(ValueError, match="2 thresholds were given, but the vision tower executes 3 layers"):
        encode(vision_model, pixels, [0.5, 0.5])
    for layer in (-6, 5):
        with pytest.raises(ValueError, match=f"vision_feature_layer is {layer}, .* 4 layers; give one"):
            encode(vision_model, pixels, None, layer)
