"""vLLM's CLIP tower with DToMe between attention and MLP of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionModel

from vllm_hybrid.attention import cpu
from vllm_hybrid.method.token_merging import PackedTokens, live_rows, merge, proportional_attention
from vllm_hybrid.models.row_padding import by_blocks
from vllm_hybrid.models.tensor_parallel import sum_over_ranks


@dataclass
class MergedImages:
    """Live tokens of a batch of images after the tower.

    Attributes:
        features: [live, channels], all images' live tokens, class tokens left out.
        image: int64 [live], the image of each.
        rank: int64 [live], its number inside the image, 0 .. n - 1.
        owner: int64 [images, patches], the live token that holds each patch.

    """

    features: torch.Tensor
    image: torch.Tensor
    rank: torch.Tensor
    owner: torch.Tensor


def encode_merged(
    tower: CLIPVisionModel, pixel_values: torch.Tensor, thresholds: Sequence[float | None], patches: int
) -> MergedImages:
    """Run the tower's executed layers, merging tokens in each (design section 1, DToMe).

    Args:
        tower: the tower, built up to the feature layer.
        pixel_values: [images, 3, height, width].
        thresholds: one per executed layer; None merges nothing there. Empty: nothing merges at all.
        patches: patches per image.

    Returns:
        The live tokens at the feature layer.

    """
    model = tower.vision_model
    hidden = model.pre_layrnorm(model.embeddings(pixel_values.to(model.dtype)))
    tokens = PackedTokens.start(hidden)
    layers = model.encoder.layers
    for layer, threshold in zip(layers, thresholds or [None] * len(layers), strict=True):
        attended, metric = _attend(layer, tokens, threshold is not None)
        tokens.hidden = tokens.hidden + attended
        if threshold is not None:
            tokens = merge(tokens, metric, threshold)
        tokens.hidden = by_blocks(partial(_add_mlp, layer), tokens.hidden)
    return _without_class_tokens(tokens, patches)


def _add_mlp(layer: CLIPEncoderLayer, rows: torch.Tensor) -> torch.Tensor:
    return rows + layer.mlp(layer.layer_norm2(rows))


def _attend(
    layer: CLIPEncoderLayer, tokens: PackedTokens, wants_metric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proportional attention inside every image, and the merge metric: keys averaged over all heads."""
    attention = layer.self_attn
    heads, head_dim = attention.num_heads_per_partition, attention.head_dim
    qkv = by_blocks(lambda rows: attention.qkv_proj(layer.layer_norm1(rows))[0], tokens.hidden)
    parts = [x.unflatten(-1, (heads, head_dim)) for x in qkv.chunk(3, dim=-1)]
    mixed = _mix(parts, tokens, attention.scale).flatten(-2)
    out = by_blocks(lambda rows: attention.out_proj(rows)[0], mixed)
    if not wants_metric:
        return out, out
    metric = parts[1].float().sum(dim=-2)
    if attention.tp_size > 1:
        metric = sum_over_ranks(metric)
    return out, metric / (heads * attention.tp_size)


def _mix(parts: list[torch.Tensor], tokens: PackedTokens, scale: float) -> torch.Tensor:
    """Attention over packed queries, keys and values [T, heads, head_dim]; sizes weigh the keys."""
    query, key, value = parts
    if query.is_cpu:
        log_size = tokens.size.log()
        mixed = cpu.proportional_attention(query, key, value, tokens.lengths, log_size, scale)
        if mixed is not None:
            return mixed
    return proportional_attention(query, key, value, tokens, scale)


def _without_class_tokens(tokens: PackedTokens, patches: int) -> MergedImages:
    assert tokens.owner.shape[1] == patches
    row, image, rank = live_rows(tokens)
    return MergedImages(tokens.hidden[row], image, rank, tokens.owner)
