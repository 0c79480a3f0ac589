"""vLLM's CLIP tower with DToMe between attention and MLP of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionModel

from vllm_hybrid.attention.select import AnyAttentionOps
from vllm_hybrid.levels import Thresholds
from vllm_hybrid.method.token_merging import LiveTokens, PackedTokens, merge
from vllm_hybrid.models.row_padding import map_row_chunks
from vllm_hybrid.models.tensor_parallel import sum_over_ranks


def encode_merged(
    tower: CLIPVisionModel,
    pixel_values: torch.Tensor,
    thresholds: Sequence[Thresholds | None],
    ops: AnyAttentionOps,
) -> LiveTokens:
    """Run the tower's executed layers, merging tokens in each (DyMU, arXiv 2504.17040, section 3.1).

    Args:
        tower: the tower, built up to the feature layer.
        pixel_values: [images, 3, height, width].
        thresholds: of each image, one per executed layer, where None merges nothing; None: nothing of the
            image merges at all.
        ops: who attends.

    Returns:
        The live tokens at the feature layer.

    """
    hidden = embed_patches(tower, pixel_values)
    tokens = PackedTokens.start(hidden)
    layers = tower.vision_model.encoder.layers
    by_layer = rows_that_merge(threshold_values(thresholds, len(layers)), hidden.device)
    for layer, threshold in zip(layers, by_layer, strict=True):
        attended, metric = _attend(layer, tokens, ops, threshold is not None)
        tokens.hidden = tokens.hidden + attended
        if threshold is not None:
            tokens = merge(tokens, metric, threshold)
        tokens.hidden = add_mlp(layer, tokens.hidden)
    return LiveTokens.of(tokens)


def embed_patches(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the first layer is given: [images, 1 + P, C], of [images, 3, height, width]."""
    model = tower.vision_model
    return model.pre_layrnorm(model.embeddings(pixel_values.to(model.dtype)))


def threshold_values(thresholds: Sequence[Thresholds | None], layers: int) -> list[list[float]]:
    """[layers][images]: thresholds of the images' levels, infinity where nothing merges."""
    images = [[None] * layers if own is None else own for own in thresholds]
    by_image = [[math.inf if value is None else value for value in own] for own in images]
    return [list(row) for row in zip(*by_image, strict=True)]


def rows_that_merge(values: Sequence[Sequence[float]], device: torch.device) -> list[torch.Tensor | None]:
    """For each layer float32 [images] of numbers [layers][images]; None where no image merges."""
    merging = [any(value != math.inf for value in row) for row in values]
    rows = threshold_table(values, device)
    return [row if merges else None for row, merges in zip(rows, merging, strict=True)]


def threshold_table(values: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """float32 [layers, images] of numbers of the host; the host does not wait for the copy."""
    on_host = torch.tensor(values, dtype=torch.float32, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def add_mlp(layer: CLIPEncoderLayer, rows: torch.Tensor) -> torch.Tensor:
    """The second half of a layer, of rows [T, C] whose first is done."""
    return map_row_chunks(lambda chunk: chunk + layer.mlp(layer.layer_norm2(chunk)), rows)


def project_heads(layer: CLIPEncoderLayer, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of rows [T, C]: [T, heads of this rank, head_size] each, views."""
    attention = layer.self_attn
    qkv = map_row_chunks(lambda chunk: attention.qkv_proj(layer.layer_norm1(chunk))[0], rows)
    heads = attention.num_heads_per_partition, attention.head_dim
    return tuple(x.unflatten(-1, heads) for x in qkv.chunk(3, dim=-1))


def project_out(layer: CLIPEncoderLayer, attended: torch.Tensor) -> torch.Tensor:
    """[T, C] that attention adds to rows, of answers [T, heads of this rank, head_size]."""
    return map_row_chunks(lambda chunk: layer.self_attn.out_proj(chunk)[0], attended.flatten(-2))


def _attend(
    layer: CLIPEncoderLayer, tokens: PackedTokens, ops: AnyAttentionOps, wants_metric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proportional attention inside every image, and the merge metric: keys averaged over all heads."""
    attention = layer.self_attn
    query, key, value = project_heads(layer, tokens.hidden)
    out = project_out(layer, ops.proportional_attention(query, key, value, tokens, attention.scale))
    if not wants_metric:
        return out, out
    metric = key.float().sum(dim=-2)
    if attention.tp_size > 1:
        metric = sum_over_ranks(metric)
    return out, metric / (key.shape[1] * attention.tp_size)
