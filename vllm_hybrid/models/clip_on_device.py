"""vLLM's CLIP tower with DToMe on shapes that the host chooses: it waits for the device once a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.clip import CLIPVisionModel

from vllm_hybrid.attention.interface import DeviceTower
from vllm_hybrid.levels import Thresholds
from vllm_hybrid.method.device_tokens import DeviceTokens, Lengths, live_tokens
from vllm_hybrid.method.token_merging import LiveTokens
from vllm_hybrid.models.clip import (
    add_mlp,
    embed_patches,
    project_heads,
    project_out,
    rows_that_merge,
    threshold_values,
)
from vllm_hybrid.models.tensor_parallel import sum_over_ranks
from vllm_hybrid.models.tower_capacity import TowerCapacity, row_buckets
from vllm_hybrid.models.tower_graphs import TowerGraphs, TowerInputs

# vLLM shows what its own loggers and those below them say.
logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class _Batch:
    """An encoded batch.

    Attributes:
        tokens: behind the last layer.
        owner: int64 [images, P], which of them holds each patch.
        lengths: what was read of them.
        merging: the layers in which merges were looked for.

    """

    tokens: DeviceTokens
    owner: torch.Tensor
    lengths: Lengths
    merging: Sequence[bool]


class DeviceEncoder:
    """Encodes batches of images of which at least one merges in some layer.

    Args:
        ops: who attends and merges.
        patches: of an image.

    """

    def __init__(self, ops: DeviceTower, patches: int) -> None:
        self.capacity = TowerCapacity()
        self.graphs: TowerGraphs | None = None
        self._ops = ops
        self._length = 1 + patches

    def make_graphs(self, tower: CLIPVisionModel, image_shape: tuple[int, ...], images: int) -> TowerGraphs:
        """Graphs of batches of up to ``images`` images of a shape, used once they are captured."""
        model = tower.vision_model
        layers = len(model.encoder.layers)
        device = model.encoder.layers[0].layer_norm1.weight.device
        make_inputs = partial(_graph_inputs, image_shape, layers, model.dtype, device)
        buckets = partial(row_buckets, length=self._length, layers=layers)
        self.graphs = TowerGraphs(partial(self._run_table, tower), make_inputs, buckets, images)
        return self.graphs

    def encode(
        self,
        tower: CLIPVisionModel,
        pixel_values: torch.Tensor,
        thresholds: Sequence[Thresholds | None],
    ) -> LiveTokens:
        """Run the tower's executed layers; see :func:`vllm_hybrid.models.clip.encode_merged`.

        A batch for which the rows granted to a layer do not suffice is run again with a row for every token.
        """
        granted = self.capacity.rows(thresholds, self._length, len(tower.vision_model.encoder.layers))
        batch = self._run(tower, pixel_values, thresholds, granted)
        if granted is not None:
            self.capacity.count(batch.lengths.overflowed)
        if batch.lengths.overflowed:
            logger.debug(
                "The tower's %d images need more rows than %s: once more.", len(pixel_values), granted
            )
            batch = self._run(tower, pixel_values, thresholds, None)
        self.capacity.learn(thresholds, _after_layers(batch.lengths, batch.merging, self._length))
        return live_tokens(batch.tokens, batch.owner, batch.lengths.images[-1])

    def warm_up(self, tower: CLIPVisionModel, pixel_values: torch.Tensor) -> None:
        """Have every kernel compiled that a batch needs, by one image in which nothing merges."""
        layers = len(tower.vision_model.encoder.layers)
        never = torch.full((layers, 1), math.inf, device=pixel_values.device)
        self._run_table(tower, pixel_values[:1], never, [self._length] * layers)

    def _run(
        self,
        tower: CLIPVisionModel,
        pixel_values: torch.Tensor,
        thresholds: Sequence[Thresholds | None],
        granted: Sequence[int] | None,
    ) -> _Batch:
        """The batch with as many rows as its layers are granted; None: a row for every token."""
        layers = len(tower.vision_model.encoder.layers)
        values = threshold_values(thresholds, layers)
        replayed = None if self.graphs is None else self.graphs.encode(pixel_values, values, granted)
        if replayed is not None:
            tokens, owner = replayed
            # The next replay writes over the graph's own.
            return _Batch(tokens, owner.clone(), Lengths.read(tokens), [True] * layers)
        hidden = embed_patches(tower, pixel_values)
        by_layer = rows_that_merge(values, hidden.device)
        rows = granted or [len(pixel_values) * self._length] * layers
        tokens, owner = run_layers(tower, hidden, by_layer, rows, self._ops)
        return _Batch(tokens, owner, Lengths.read(tokens), [row is not None for row in by_layer])

    def _run_table(
        self, tower: CLIPVisionModel, pixels: torch.Tensor, thresholds: torch.Tensor, rows: Sequence[int]
    ) -> tuple[DeviceTokens, torch.Tensor]:
        """The tower with merges looked for in every layer; thresholds float32 [layers, images]."""
        return run_layers(tower, embed_patches(tower, pixels), list(thresholds), rows, self._ops)


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


def _graph_inputs(
    image_shape: tuple[int, ...], layers: int, dtype: torch.dtype, device: torch.device, images: int
) -> TowerInputs:
    """Blank images in which nothing merges."""
    return TowerInputs(
        torch.zeros(images, *image_shape, dtype=dtype, device=device),
        torch.full((layers, images), math.inf, device=device),
    )
