"""Merge thresholds from pictures, for a wanted average number of live tokens (DyMU, arXiv 2504.17040,
section 3.1, "Finding redundancy thresholds").

Every layer is to merge the same number of tokens per image on average. A batch of pictures shares one
budget per layer, so that a plain picture gives up more of it than a busy one; the threshold is what lets
just the batch's most similar pairs pass. Thresholds are averaged over batches.

The average of thresholds is not the threshold of the average: the tokens that remain drift from the wanted
number, the more so the smaller the batches. A shift common to all thresholds, found by measuring the
calibration pictures themselves, takes the drift out and leaves the layers' proportions alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn

from .journal import Journal
from .merging import PackedTokens
from .tower import encode, executed_layers, run_tower

Progress = Callable[[str, int, int], None]

# How many merges fall to each layer, relative to the others: alike, or ever more towards the last.
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda layer: 1.0,
    "reverse-linear": lambda layer: layer + 1.0,
}

# How far the average may stay from the wanted number, as a share of it, and how often it is measured.
TOLERANCE = 0.02
MOST_PASSES = 12
# The first shift tried, as a cosine; a miss doubles it.
FIRST_STEP = 0.01


def calibrate(
    vision_model: nn.Module,
    image_processor: Any,
    image_paths: Sequence[str | Path],
    tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    feature_layer: int = -2,
    schedule: str = "constant",
    journal: Journal | None = None,
) -> list[float]:
    """Find thresholds that leave ``tokens`` live tokens per picture on average.

    Args:
        vision_model: a transformers ``CLIPVisionModel``; works on its device.
        image_processor: turns PIL images into ``pixel_values``; LLaVA-1.5's own.
        image_paths: the pictures, of any size and mode. A few hundred that resemble the later ones.
        tokens: wanted average, from what the layers can reach to one less than there are patches.
        batch_size: pictures that share a budget, and that run at once.
        seed: shuffles the pictures into batches.
        progress: called as progress(stage, pictures done, pictures) after each batch.
        feature_layer: LLaVA's ``vision_feature_layer``.
        schedule: one of SCHEDULES.
        journal: where every batch's results go as they are found, and come from where they are known.

    Returns:
        One threshold per executed layer. The same arguments give the same thresholds. A warning says so
        where the pictures' average stays more than 3% off.

    Raises:
        ValueError: no picture, an unreadable one, or a number that cannot be reached.

    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; give at least 1")
    if not image_paths:
        raise ValueError("there are no calibration pictures; give at least one")
    tower: Any = getattr(vision_model, "vision_model", vision_model)
    layers = executed_layers(len(tower.encoder.layers), feature_layer)
    wanted = live_schedule(tower.embeddings.num_patches, tokens, layers, schedule)
    shuffled = sorted(image_paths, key=str)
    random.Random(seed).shuffle(shuffled)
    batches = _Batches(vision_model, image_processor, _parted(shuffled, batch_size), progress)
    kept = Journal(None, None) if journal is None else journal

    def of_batch(pixel_values: torch.Tensor) -> list[float]:
        return batch_thresholds(vision_model, pixel_values, wanted, feature_layer)

    found = batches.results(f"thresholds for {tokens} tokens", of_batch, kept)
    thresholds = [statistics.fmean(layer) for layer in zip(*found, strict=True)]

    def average(shift: float) -> float:
        shifted = [t + shift for t in thresholds]

        def counts(pixel_values: torch.Tensor) -> list[int]:
            return encode(vision_model, pixel_values, shifted, feature_layer).lengths.tolist()

        stage = f"measuring {tokens} tokens, shift {shift!r}"
        return statistics.fmean(itertools.chain(*batches.results(stage, counts, kept)))

    shift, reached = find_shift(average, tokens)
    if abs(reached - tokens) > 0.03 * tokens:
        warnings.warn(
            f"the calibration pictures keep {reached:.1f} tokens on average instead of {tokens}; "
            "give more, or more varied, pictures",
            stacklevel=2,
        )
    return [t + shift for t in thresholds]


def live_counts(
    vision_model: nn.Module,
    image_processor: Any,
    image_paths: Sequence[str | Path],
    thresholds: Sequence[float | None] | None,
    batch_size: int = 16,
    progress: Progress | None = None,
    feature_layer: int = -2,
) -> list[int]:
    """Live tokens that thresholds leave of each picture, in the pictures' order.

    Args:
        vision_model: see :func:`calibrate`; so are image_processor, image_paths, progress, feature_layer.
        image_processor: see there.
        image_paths: see there.
        thresholds: one per executed layer, None where nothing merges.
        batch_size: pictures that run at once; does not change the result.
        progress: see there.
        feature_layer: see there.

    Raises:
        ValueError: an unreadable picture, or not one threshold per executed layer.

    """

    def counts(pixel_values: torch.Tensor) -> list[int]:
        return encode(vision_model, pixel_values, thresholds, feature_layer).lengths.tolist()

    batches = _Batches(vision_model, image_processor, _parted(image_paths, batch_size), progress)
    return list(itertools.chain(*batches.results("measuring", counts, Journal(None, None))))


def live_schedule(patches: int, tokens: int, layers: int, schedule: str = "constant") -> list[float]:
    """Average live tokens wanted after each layer.

    With "constant" all layers merge alike; with "reverse-linear" layer i merges i + 1 times as many as
    layer 0.

    Of n live tokens and the class token, at most n // 2 >= (n - 1) / 2 merge in one layer. Where its
    share would exceed that in the last layers, these do what they can and the others more.

    Args:
        patches: tokens before the first layer, P.
        tokens: tokens after the last.
        layers: executed layers.
        schedule: one of SCHEDULES.

    Returns:
        ``layers`` numbers, the last one ``tokens``.

    Raises:
        ValueError: tokens cannot be reached, or is no reduction; or there is no such schedule.

    """
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule {schedule!r}; use one of {', '.join(SCHEDULES)}")

    def run(share: float) -> list[float]:
        live, counts = float(patches), []
        for layer in range(layers):
            live -= min(share * SCHEDULES[schedule](layer), (live - 1) / 2)
            counts.append(live)
        return counts

    fewest = math.ceil(run(patches)[-1]) if layers else patches
    if not fewest <= tokens < patches:
        raise ValueError(
            f"{tokens} live tokens cannot be had from {patches} patches in {layers} merging layers; "
            f"give a number from {fewest} to {patches - 1}"
        )
    low, high = 0.0, float(patches)
    for _ in range(60):
        share = (low + high) / 2
        low, high = (share, high) if run(share)[-1] > tokens else (low, share)
    return run(high)


def batch_thresholds(
    vision_model: nn.Module, pixel_values: torch.Tensor, schedule: Sequence[float], feature_layer: int = -2
) -> list[float]:
    """The thresholds of one batch: in each layer just as many pairs lie above as are to merge.

    Tokens merge by these thresholds before the next layer is looked at.

    Args:
        vision_model: a transformers ``CLIPVisionModel``.
        pixel_values: [images, 3, height, width].
        schedule: average live tokens wanted after each executed layer.
        feature_layer: LLaVA's ``vision_feature_layer``.

    Returns:
        One threshold per executed layer.

    """
    images = pixel_values.shape[0]
    thresholds: list[float] = []

    def most_similar(layer: int, tokens: PackedTokens, best: torch.Tensor) -> torch.Tensor:
        # Measured against the schedule's total, what one layer misses by rounding the next one catches up.
        merges = round(tokens.layout.total - images - images * schedule[layer])
        thresholds.append(score_threshold(best[best > -math.inf], merges))
        return best > thresholds[-1]

    run_tower(vision_model, pixel_values, most_similar, feature_layer)
    return thresholds


def score_threshold(scores: torch.Tensor, above: int) -> float:
    """A threshold that ``above`` of the scores [n] lie strictly above, all of them where n is less.

    It is in the middle between the last score above and the first one not. Equal scores there count
    alike, so fewer may lie above.
    """
    ranked = scores.double().sort(descending=True).values.tolist()
    if above >= len(ranked):
        return min(ranked, default=1.0) - 1e-3
    if above <= 0:
        return max(ranked, default=1.0)
    return (ranked[above - 1] + ranked[above]) / 2


def find_shift(average: Callable[[float], float], tokens: float) -> tuple[float, float]:
    """The shift of all thresholds that brings the average of live tokens to ``tokens``.

    Args:
        average: average live tokens at a shift; grows with it, in steps, as higher thresholds merge less.
        tokens: wanted average.

    Returns:
        The shift and the average there, within TOLERANCE or the best of MOST_PASSES.

    """
    tried = {0.0: average(0.0)}
    step = FIRST_STEP

    def best() -> float:
        return min(tried, key=lambda s: (abs(tried[s] - tokens), abs(s)))

    while abs(tried[best()] - tokens) > TOLERANCE * tokens and len(tried) < MOST_PASSES:
        low = max((s for s in tried if tried[s] < tokens), default=None)
        high = min((s for s in tried if tried[s] >= tokens), default=None)
        if low is None:
            assert high is not None
            shift, step = high - step, 2 * step
        elif high is None:
            shift, step = low + step, 2 * step
        else:
            # Interpolated, but never so close to a border that a flat end stops the search.
            share = (tokens - tried[low]) / (tried[high] - tried[low])
            shift = low + min(max(share, 0.1), 0.9) * (high - low)
        tried[shift] = average(shift)
    return best(), tried[best()]


def load_rgb(path: str | Path) -> Image.Image:
    """Read a picture as the server does: upright, RGB, transparent parts white.

    Raises:
        ValueError: the file is no readable picture.

    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); remove it or convert it") from error


@dataclass
class _Batches:
    """Pictures in batches, and what is computed from each."""

    vision_model: nn.Module
    image_processor: Any
    paths: list[Sequence[str | Path]]
    progress: Progress | None

    def results(
        self, stage: str, compute: Callable[[torch.Tensor], list[Any]], journal: Journal
    ) -> list[list[Any]]:
        """One result a batch; a batch whose result the journal knows is not loaded."""
        results, done, pictures = [], 0, sum(map(len, self.paths))
        for number, paths in enumerate(self.paths):
            of_batch = functools.partial(self._result, compute, paths)
            results.append(journal.result(f"{stage}, batch {number}", of_batch))
            done += len(paths)
            if self.progress is not None:
                self.progress(stage, done, pictures)
        return results

    def _result(self, compute: Callable[[torch.Tensor], list[Any]], paths: Sequence[str | Path]) -> list[Any]:
        return compute(_pixel_values(self.vision_model, self.image_processor, paths))


def _parted(paths: Sequence[str | Path], batch_size: int) -> list[Sequence[str | Path]]:
    """The pictures in batches whose sizes differ by at most 1."""
    number = math.ceil(len(paths) / batch_size)
    borders = [len(paths) * i // number for i in range(number + 1)]
    return [paths[start:stop] for start, stop in itertools.pairwise(borders)]


def _pixel_values(vision_model: nn.Module, image_processor: Any, paths: Sequence[str | Path]) -> torch.Tensor:
    """Pixel values [images, 3, height, width] on the model's device."""
    images = [load_rgb(path) for path in paths]
    device = next(vision_model.parameters()).device
    return image_processor(images=images, return_tensors="pt")["pixel_values"].to(device)
