"""vLLM's CLIP tower with DToMe on shapes that the host chooses: it waits for the device once a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.clip import CLIPVisionModel

from vllm_hybrid.attention.interface import DeviceTower
from vllm_hybrid.levels import Thresholds
from vllm_hybrid.method.device_tokens import DeviceTokens, Lengths, live_tokens
from vllm_hybrid.method.token_merging import LiveTokens
from vllm_hybrid.models.clip import add_mlp, by_layer, embed_patches, project_heads, project_out
from vllm_hybrid.models.tensor_parallel import sum_over_ranks
from vllm_hybrid.models.tower_capacity import TowerCapacity

# vLLM shows what its own loggers and those below them say.
logger = init_logger(f"vllm.{__name__}")


class DeviceEncoder:
    """Encodes batches of images of which at least one merges in some layer."""

    def __init__(self, ops: DeviceTower) -> None:
        self.capacity = TowerCapacity()
        self._ops = ops

    def encode(
        self,
        tower: CLIPVisionModel,
        pixel_values: torch.Tensor,
        thresholds: Sequence[Thresholds | None],
    ) -> LiveTokens:
        """Run the tower's executed layers; see :func:`vllm_hybrid.models.clip.encode_merged`.

        A batch for which the rows granted to a layer do not suffice is run again with a row for every token.
        """
        hidden = embed_patches(tower, pixel_values)
        images, length, _ = hidden.shape
        layers = len(tower.vision_model.encoder.layers)
        rows = by_layer(thresholds, layers, hidden.device)
        granted = self.capacity.rows(thresholds, length, layers)
        tokens, owner = run_layers(tower, hidden, rows, granted or [images * length] * layers, self._ops)
        lengths = Lengths.read(tokens)
        if granted is not None:
            self.capacity.count(lengths.overflowed)
        if lengths.overflowed:
            logger.debug("The tower's %d images need more rows than %s: once more.", images, granted)
            tokens, owner = run_layers(tower, hidden, rows, [images * length] * layers, self._ops)
            lengths = Lengths.read(tokens)
        self.capacity.learn(thresholds, _after_layers(lengths, [row is not None for row in rows], length))
        return live_tokens(tokens, owner, lengths.images[-1])

    def warm_up(self, tower: CLIPVisionModel, pixel_values: torch.Tensor) -> None:
        """Have every kernel compiled that a batch needs, by one image in which nothing merges."""
        hidden = embed_patches(tower, pixel_values[:1])
        layers, rows = len(tower.vision_model.encoder.layers), hidden.shape[1]
        never = torch.full((1,), math.inf, device=hidden.device)
        run_layers(tower, hidden, [never] * layers, [rows] * layers, self._ops)


def run_layers(
    tower: CLIPVisionModel,
    hidden: torch.Tensor,
    thresholds: Sequence[torch.Tensor | None],
    capacity: Sequence[int],
    ops: DeviceTower,
) -> tuple[DeviceTokens, torch.Tensor]:
    """The layers of the tower; what is launched follows from shapes and ``capacity`` alone.

    Args:
        tower: the tower, built up to the feature layer.
        hidden: [images, 1 + P, C], what the first layer is given.
        thresholds: for each layer float32 [images], None where no image merges.
        capacity: rows behind each layer that merges.
        ops: who attends and merges.

    Returns:
        The tokens behind the last layer, and int64 [images, P], which of them holds each patch.

    """
    tokens = DeviceTokens.start(hidden, sum(threshold is not None for threshold in thresholds))
    layers = tower.vision_model.encoder.layers
    for layer, threshold, rows in zip(layers, thresholds, capacity, strict=True):
        query, key, value = project_heads(layer, tokens.hidden)
        added = project_out(layer, ops.attend(query, key, value, tokens, layer.self_attn.scale))
        if threshold is None:
            tokens.hidden = tokens.hidden + added
        else:
            metric = ops.metric(key)
            if layer.self_attn.tp_size > 1:
                metric = sum_over_ranks(metric)
            tokens = ops.merge(tokens, added, metric, threshold, rows)
        tokens.hidden = add_mlp(layer, tokens.hidden)
    return tokens, ops.owners(tokens, hidden.shape[1] - 1)


def _after_layers(lengths: Lengths, merging: Sequence[bool], length: int) -> list[list[int]]:
    """Tokens of every image after each layer, those that merge nothing included."""
    merged = iter(lengths.images)
    now = [length] * len(lengths.images[-1])
    after = []
    for merges in merging:
        now = next(merged) if merges else now
        after.append(now)
    return after
