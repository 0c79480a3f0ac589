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
import hashlib
import itertools
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_hybrid.method.clip_tower import encode, executed_layers, run_tower
from vllm_hybrid.method.token_merging import PackedTokens
from vllm_hybrid.tools.journal import Journal
from vllm_hybrid.tools.pictures import load_processable
from vllm_hybrid.tools.progress import Notice, Progress
from vllm_hybrid.tools.stable_batches import stable_batches

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
    folder: str | Path | None = None,
) -> list[float]:
    """Find thresholds that leave ``tokens`` live tokens per picture on average.

    Args:
        vision_model: a transformers ``CLIPVisionModel``; works on its device.
        image_processor: turns PIL images into ``pixel_values``; the checkpoint's own.
        image_paths: the pictures, of any size and mode. A few hundred that resemble the later ones.
        tokens: wanted average, from what the layers can reach to one less than there are patches.
        batch_size: pictures that share a budget, and that run at once.
        seed: deals the pictures out to batches. Picture by picture, so that one more or less leaves most
            batches, and what a journal knows of them, as they are.
        progress: called as progress(stage, pictures done, pictures) after each batch.
        feature_layer: LLaVA's ``vision_feature_layer``.
        schedule: one of SCHEDULES.
        journal: where every batch's results go as they are found, and come from where they are known:
            those of the same files (names, sizes, times of change), tokens and schedule. Anything else that
            they depend on is to be the journal's ``work``.
        folder: pictures are named by their place in it; left out, in the innermost that holds them all.

    Returns:
        One threshold per executed layer. The same arguments give the same thresholds, wherever the folder
        lies. A Notice says so where the pictures' average stays more than 3% off.

    Raises:
        ValueError: no picture, an unreadable one, or a number that cannot be reached.

    """
    wanted = check_wanted(vision_model, tokens, batch_size, feature_layer, schedule)
    if not image_paths:
        raise ValueError("there are no calibration pictures; give at least one")
    pictures = _named(image_paths, folder)
    numbers = stable_batches([picture.name for picture in pictures], batch_size, seed)
    dealt = [[pictures[number] for number in batch] for batch in numbers]
    batches = _Batches(vision_model, image_processor, dealt, progress)
    kept = Journal(None, None) if journal is None else journal

    def of_batch(pixel_values: torch.Tensor) -> list[float]:
        return batch_thresholds(vision_model, pixel_values, wanted, feature_layer)

    found = batches.results(f"thresholds for {tokens} tokens", of_batch, kept, [tokens, schedule])
    thresholds = [statistics.fmean(layer) for layer in zip(*found, strict=True)]

    def average(shift: float) -> float:
        shifted = [t + shift for t in thresholds]

        def counts(pixel_values: torch.Tensor) -> list[int]:
            return encode(vision_model, pixel_values, shifted, feature_layer).counts

        stage = f"measuring {tokens} tokens, shift {shift!r}"
        return statistics.fmean(itertools.chain(*batches.results(stage, counts, kept, shifted)))

    shift, reached = find_shift(average, tokens)
    if abs(reached - tokens) > 0.03 * tokens:
        warnings.warn(
            f"the calibration pictures keep {reached:.1f} tokens on average instead of {tokens}; "
            "give more, or more varied, pictures",
            Notice,
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
        return encode(vision_model, pixel_values, thresholds, feature_layer).counts

    pictures = [_Picture(path, str(path)) for path in image_paths]
    parts = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    batches = _Batches(vision_model, image_processor, parts, progress)
    return list(itertools.chain(*batches.results("measuring", counts, Journal(None, None), None)))


def check_wanted(
    vision_model: nn.Module, tokens: int, batch_size: int, feature_layer: int = -2, schedule: str = "constant"
) -> list[float]:
    """Whether :func:`calibrate` can reach a number, without looking at pictures.

    Args:
        vision_model: see :func:`calibrate`; so are the others.
        tokens: see there.
        batch_size: see there.
        feature_layer: see there.
        schedule: see there.

    Returns:
        Average live tokens wanted after each executed layer.

    Raises:
        ValueError: an argument is wrong, or the number cannot be reached.

    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; give at least 1")
    tower: Any = getattr(vision_model, "vision_model", vision_model)
    layers = executed_layers(len(tower.encoder.layers), feature_layer)
    return live_schedule(tower.embeddings.num_patches, tokens, layers, schedule)


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
    descending = scores.double().sort(descending=True).values.tolist()
    if above >= len(descending):
        return min(descending, default=1.0) - 1e-3
    if above <= 0:
        return max(descending, default=1.0)
    return (descending[above - 1] + descending[above]) / 2


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


class _Picture(NamedTuple):
    """A picture file, and the name by which it is known wherever it lies."""

    path: str | Path
    name: str


@dataclass
class _Batches:
    """Pictures in batches, and what is computed from each."""

    vision_model: nn.Module
    image_processor: Any
    batches: Sequence[Sequence[_Picture]]
    progress: Progress | None

    def results(
        self, stage: str, compute: Callable[[torch.Tensor], list[Any]], journal: Journal, work: Any
    ) -> list[list[Any]]:
        """One result a batch; a batch whose result the journal knows is not loaded.

        Args:
            stage: what is reported to progress.
            compute: the result from pixel values.
            journal: keeps the results.
            work: what the results depend on beside the pixels, as plain JSON.

        """
        results, done, pictures = [], 0, sum(map(len, self.batches))
        for batch in self.batches:
            of_batch = functools.partial(self._result, compute, batch)
            if journal.keeps:
                results.append(journal.result(_batch_name(work, batch), of_batch))
            else:
                results.append(of_batch())
            done += len(batch)
            if self.progress is not None:
                self.progress(stage, done, pictures)
        return results

    def _result(self, compute: Callable[[torch.Tensor], list[Any]], batch: Sequence[_Picture]) -> list[Any]:
        return compute(_pixel_values(self.vision_model, self.image_processor, [p.path for p in batch]))


def _named(paths: Sequence[str | Path], folder: str | Path | None) -> list[_Picture]:
    """Files by their places inside a folder, or else inside the innermost one that holds them all."""
    if folder is None:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [_Picture(path, Path(os.path.relpath(path, folder)).as_posix()) for path in paths]


def _batch_name(work: Any, batch: Sequence[_Picture]) -> str:
    """A journal's name for what was computed from a batch; another one where a file has changed."""
    identity = json.dumps([work, [_stamp(picture) for picture in batch]])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def _stamp(picture: _Picture) -> list[Any]:
    try:
        status = os.stat(picture.path)
    except OSError as error:
        raise ValueError(
            f"{picture.path} cannot be read as a picture ({error.strerror}); start again without it"
        ) from error
    return [picture.name, status.st_size, status.st_mtime_ns]


def _pixel_values(vision_model: nn.Module, image_processor: Any, paths: Sequence[str | Path]) -> torch.Tensor:
    """Pixel values [images, 3, height, width] on the model's device."""
    images = [load_processable(path, image_processor) for path in paths]
    device = next(vision_model.parameters()).device
    return image_processor(images=images, return_tensors="pt")["pixel_values"].to(device)
