"""The merging tower of a few images as CUDA graphs, one for each number of images and bucket of rows.

The host launches some three hundred kernels a batch, which takes it longer than a few images take the device;
a replay is one call. A graph's shapes are fixed before any picture is known. So its layers have rows as a
bucket says (:func:`vllm_hybrid.models.tower_capacity.row_buckets`), and every layer may merge: images that do
not merge in one have an infinite threshold there.

vLLM's encoder runner captures these graphs and counts their memory, as it does for its own models, where
``cudagraph_mm_encoder`` of the compilation config is set. It passes no inputs on, since it would cut large
batches into pieces of a graph's size: the encoder looks here for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from vllm.utils.torch_utils import current_stream

from vllm_hybrid.environment.waits import announced_wait
from vllm_hybrid.method.device_tokens import DeviceTokens
from vllm_hybrid.models.clip import threshold_table

# Where vLLM's option says nothing. From about here on the device takes longer than the host does.
DEFAULT_IMAGES = 4

Encoded = tuple[DeviceTokens, torch.Tensor]


class Tower(Protocol):
    """The tower's layers, on whatever number of images."""

    def __call__(self, pixels: torch.Tensor, thresholds: torch.Tensor, rows: Sequence[int]) -> Encoded:
        """Encode pixels [images, 3, height, width]; see :func:`vllm_hybrid.models.clip_on_device.run_layers`.

        Args:
            pixels: [images, 3, height, width].
            thresholds: float32 [layers, images].
            rows: behind each layer.

        """


class Replayable(Protocol):
    """Something recorded that can be carried out again, as :class:`torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Carry it out on what its inputs hold now, into the same results."""


# Records a call into a pool of memory: what replays it, and the call's results.
Record = Callable[[Callable[[], Encoded], Any], tuple[Replayable, Encoded]]


def record_graph(call: Callable[[], Encoded], pool: Any) -> tuple[Replayable, Encoded]:
    """Capture a call as a CUDA graph, on the stream that vLLM captures on."""
    # Kernels are compiled and libraries take their memory in a run of its own, which is not captured.
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=current_stream()):
        result = call()
    return graph, result


@dataclass(frozen=True)
class TowerInputs:
    """What the graphs of a number of images read.

    Attributes:
        pixels: [images, 3, height, width].
        thresholds: float32 [layers, images].

    """

    pixels: torch.Tensor
    thresholds: torch.Tensor

    def fill(self, pixels: torch.Tensor, thresholds: Sequence[Sequence[float]]) -> None:
        """Write a batch over the one before; the host does not wait."""
        self.pixels.copy_(pixels)
        self.thresholds.copy_(threshold_table(thresholds, pixels.device))


@dataclass(frozen=True)
class _Captured:
    rows: Sequence[int]
    inputs: TowerInputs
    graph: Replayable
    encoded: Encoded

    def has_room(self, rows: Sequence[int]) -> bool:
        """Whether no layer has fewer rows than these."""
        return all(own >= wanted for own, wanted in zip(self.rows, rows, strict=True))


class TowerGraphs:
    """Graphs of batches of 1 to ``images`` images; also what vLLM's encoder runner takes for their manager.

    Args:
        tower: what is captured.
        make_inputs: inputs for a number of images, on the tower's device.
        buckets: for a number of images the rows behind each layer that graphs have, the most first.
        images: the largest batch that is captured.
        record: how a call is recorded.

    """

    def __init__(
        self,
        tower: Tower,
        make_inputs: Callable[[int], TowerInputs],
        buckets: Callable[[int], Sequence[Sequence[int]]],
        images: int,
        record: Record = record_graph,
    ) -> None:
        self.images = images
        self._tower = tower
        self._make_inputs = make_inputs
        self._buckets = buckets
        self._record = record
        self._captured: dict[int, list[_Captured]] = {}

    def capture(self, graph_pool: Any) -> None:
        """Capture all graphs into one pool of memory, the largest first, which the others then share."""
        with announced_wait(
            f"capturing CUDA graphs of the vision tower, of batches of 1 to {self.images} pictures"
        ):
            for images in range(self.images, 0, -1):
                self._captured[images] = self._capture_batches_of(images, graph_pool)

    def _capture_batches_of(self, images: int, graph_pool: Any) -> list[_Captured]:
        """A graph for each bucket of rows."""
        inputs = self._make_inputs(images)
        return [
            _Captured(rows, inputs, *self._record(self._call(inputs, rows), graph_pool))
            for rows in self._buckets(images)
        ]

    def clear(self) -> None:
        """Drop all graphs; batches run without until they are captured again."""
        self._captured.clear()

    def is_captured(self) -> bool:
        """Whether there are graphs."""
        return bool(self._captured)

    def supports_modality(self, modality: str) -> bool:
        """Whether vLLM's runner is to hand inputs over."""
        return False

    def encode(
        self, pixels: torch.Tensor, thresholds: Sequence[Sequence[float]], rows: Sequence[int] | None
    ) -> Encoded | None:
        """Replay the graph of a batch with the fewest rows that are enough.

        Args:
            pixels: [images, 3, height, width].
            thresholds: [layers][images], infinity where nothing merges.
            rows: that the layers are granted; None for the most that can be needed.

        Returns:
            What the tower returns, every layer having merged; the next call writes over it. None where
            there is no graph for so many images.

        """
        captured = self._captured.get(len(pixels))
        if captured is None:
            return None
        enough = [] if rows is None else [one for one in captured if one.has_room(rows)]
        chosen = enough[-1] if enough else captured[0]
        chosen.inputs.fill(pixels, thresholds)
        chosen.graph.replay()
        return chosen.encoded

    def _call(self, inputs: TowerInputs, rows: Sequence[int]) -> Callable[[], Encoded]:
        return partial(self._tower, inputs.pixels, inputs.thresholds, rows)
