"""A CLIP tower with DToMe in plain torch, over the weights of a transformers model (DyMU, section 3.1).

Calibration and the tools use it; the server has the same tower on vLLM's layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vllm_hybrid.method.token_merging import LiveTokens, PackedTokens, join, match, proportional_attention

# Called as rule(layer, tokens, best): see run_tower.
MergeRule = Callable[[int, PackedTokens, torch.Tensor], torch.Tensor | None]


def executed_layers(layers: int, feature_layer: int) -> int:
    """CLIP layers that run for features of hidden state ``feature_layer``; -2 leaves the last one out.

    Raises:
        ValueError: there is no such hidden state.

    """
    executed = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= executed <= layers:
        raise ValueError(
            f"vision_feature_layer is {feature_layer}, but the vision tower has {layers} layers; "
            f"give one from {-layers - 1} to {layers}"
        )
    return executed


def encode(
    vision_model: nn.Module,
    pixel_values: torch.Tensor,
    thresholds: Sequence[float | None] | None,
    feature_layer: int = -2,
) -> LiveTokens:
    """Encode images as the server does.

    Args:
        vision_model: see :func:`run_tower`.
        pixel_values: see :func:`run_tower`.
        thresholds: one per executed layer, None where nothing merges; None: nothing merges at all.
        feature_layer: hidden state to return, LLaVA's ``vision_feature_layer``.

    Returns:
        The live tokens.

    Raises:
        ValueError: there is no such hidden state, or not one threshold per executed layer.

    """
    tower: Any = getattr(vision_model, "vision_model", vision_model)
    executed = executed_layers(len(tower.encoder.layers), feature_layer)
    if thresholds is not None and len(thresholds) != executed:
        raise ValueError(
            f"{len(thresholds)} thresholds were given, but the vision tower executes {executed} layers; "
            "give one per layer"
        )

    def above(layer: int, tokens: PackedTokens, best: torch.Tensor) -> torch.Tensor | None:
        threshold = None if thresholds is None else thresholds[layer]
        return None if threshold is None or threshold == math.inf else best > threshold

    return run_tower(vision_model, pixel_values, above, feature_layer)


@torch.no_grad()
def run_tower(
    vision_model: nn.Module, pixel_values: torch.Tensor, rule: MergeRule, feature_layer: int = -2
) -> LiveTokens:
    """Run a CLIP tower up to a hidden state, merging tokens between attention and MLP of every layer.

    Args:
        vision_model: a transformers ``CLIPVisionModel``, of a release with or without the inner
            ``vision_model``. Its final norm is not applied.
        pixel_values: [images, 3, height, width], on the model's device.
        rule: says which tokens merge, and may look on. Called once per executed layer, from layer 0, with
            the layer, its tokens and each A token's best score (float32 [images, A], -inf for class token
            and padding); returns bool [images, A], False at -inf, or None where the layer does not merge.
        feature_layer: hidden state to return, LLaVA's ``vision_feature_layer``.

    Returns:
        The live tokens.

    Raises:
        ValueError: the tower has no such hidden state.

    """
    tower: Any = getattr(vision_model, "vision_model", vision_model)
    layers = tower.encoder.layers
    pixel_values = pixel_values.to(tower.embeddings.patch_embedding.weight.dtype)
    tokens = PackedTokens.start(tower.pre_layrnorm(tower.embeddings(pixel_values)))
    for number, layer in enumerate(layers[: executed_layers(len(layers), feature_layer)]):
        attended, metric = _attend(layer.self_attn, layer.layer_norm1(tokens.hidden), tokens)
        tokens.hidden = tokens.hidden + attended
        best, into = match(tokens, metric)
        merges = rule(number, tokens, best)
        if merges is not None:
            tokens = join(tokens, merges, into)
        tokens.hidden = tokens.hidden + layer.mlp(layer.layer_norm2(tokens.hidden))
    return LiveTokens.of(tokens)


def _attend(attention: Any, hidden: torch.Tensor, tokens: PackedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Proportional attention inside every image, and the merge metric: keys averaged over heads."""
    heads = attention.num_heads
    key = attention.k_proj(hidden)
    query, keys, value = (
        x.unflatten(-1, (heads, -1)) for x in (attention.q_proj(hidden), key, attention.v_proj(hidden))
    )
    attended = proportional_attention(query, keys, value, tokens, attention.scale)
    return attention.out_proj(attended.flatten(-2)), keys.float().mean(dim=-2)
