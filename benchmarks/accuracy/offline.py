"""What no server offers: merging without virtual unmerging, and random dropping. Transformers, float32."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy.questions import CUT, Asked
from vllm_hybrid.method.clip_tower import encode
from vllm_hybrid.method.fastv import live_to_kept
from vllm_hybrid.method.token_merging import LiveTokens

Thresholds = Sequence[float | None]


@dataclass(frozen=True)
class Shown:
    """The tokens of an image that the decoder is shown.

    Attributes:
        features: [n, C], of the tower.
        places: int64 [n], ascending: the position of each behind the image's first.
        span: positions the image takes up.
        kept: int64 [m], ascending: which of them the layers from ``fastv_layer`` on see; None for all.

    """

    features: Tensor
    places: Tensor
    span: int
    kept: Tensor | None = None


# From the tower, pixel values [1, 3, H, W] and the picture's number to what the decoder is shown.
ImageTokens = Callable[[Any, Tensor, int], Shown]


class OfflineModel:
    """A checkpoint that answers from whatever image tokens it is shown."""

    def __init__(self, checkpoint: Path, fastv_layer: int) -> None:
        """Load it.

        Args:
            checkpoint: in the hub's LLaVA-1.5 format, all its layers of full attention.
            fastv_layer: the first decoder layer that sees only the kept tokens.

        """
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self._processor: Any = AutoProcessor.from_pretrained(checkpoint)
        model: Any = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._decoder, self._head = model.model.language_model, model.lm_head
        self._fastv_layer = fastv_layer

    @torch.no_grad()
    def show(self, image_tokens: ImageTokens, image: Image.Image, number: int) -> Shown:
        """What the decoder is shown of a picture."""
        pixel_values = self._processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return image_tokens(self.tower, pixel_values, number)

    @torch.no_grad()
    def answers(self, shown: Shown, asked: list[Asked]) -> list[str]:
        """Greedy answers to questions on one picture; those that were cut off end in CUT."""
        cache, start = self._prefill(shown, list(asked[0].before))
        cache.batch_repeat_interleave(len(asked))
        made = self._generate(cache, start, asked)
        return [self._text(ids[: q.longest]) for ids, q in zip(made, asked, strict=True)]

    def _prefill(self, shown: Shown, before: list[int]) -> tuple[Any, int]:
        """What all questions begin with: the cache of it, and the position behind it."""
        from transformers import DynamicCache

        cache, first = DynamicCache(), len(before)
        hidden = torch.cat([self._embed(before), self._projector(shown.features)])
        positions = torch.cat([torch.arange(first), first + shown.places])
        rows = None if shown.kept is None else torch.cat([torch.arange(first), first + shown.kept])
        self._run(hidden[None], positions[None], cache, None, rows)
        return cache, first + shown.span

    def _generate(self, cache: Any, start: int, asked: list[Asked]) -> list[list[int]]:
        """As many tokens for each question as the longest answer may have, or all their ends' needs."""
        lengths = torch.tensor([len(q.after) for q in asked])
        width = int(lengths.max())
        # Filled up on the right: causal attention never sees what is behind a question, but answers must not.
        ids = torch.tensor([[*q.after, *[0] * (width - len(q.after))] for q in asked])
        seen = torch.ones(width, width, dtype=torch.bool).tril().expand(len(asked), -1, -1)
        positions = (start + torch.arange(width)).expand(len(asked), -1)
        hidden = self._run(self._embed(ids), positions, cache, seen)
        last = hidden[torch.arange(len(asked)), lengths - 1]
        seen = (torch.arange(width) < lengths[:, None])[:, None]
        made: list[list[int]] = [[] for _ in asked]
        for step in range(max(q.longest for q in asked)):
            tokens = self._head(last).argmax(-1)
            for own, token in zip(made, tokens.tolist(), strict=True):
                own.append(token)
            if all(self._end in own for own in made):
                break
            seen = torch.cat([seen, torch.ones(len(asked), 1, 1, dtype=torch.bool)], -1)
            positions = (start + lengths + step)[:, None]
            last = self._run(self._embed(tokens[:, None]), positions, cache, seen)[:, -1]
        return made

    def _run(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Any,
        seen: Tensor | None,
        kept_rows: Tensor | None = None,
    ) -> Tensor:
        """All decoder layers and the last norm.

        Args:
            hidden: [batch, rows, C].
            positions: [batch, rows].
            cache: every layer's keys and values, added to.
            seen: bool [batch, rows, text], which of the cache's last rows, these included, a row sees; all
                rows before them it sees anyway. None: causal.
            kept_rows: rows that go on from ``fastv_layer``; None for all.

        """
        turns = self._decoder.rotary_emb(hidden, positions)
        for number, layer in enumerate(self._decoder.layers):
            if kept_rows is not None and number == self._fastv_layer:
                hidden, turns = hidden[:, kept_rows], tuple(turn[:, kept_rows] for turn in turns)
            mask = None
            if seen is not None:
                earlier = cache.get_seq_length(number) + hidden.shape[1] - seen.shape[2]
                mask = torch.nn.functional.pad(seen, (earlier, 0), value=True)[:, None]
            hidden = layer(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=turns)
        return self._decoder.norm(hidden)

    def _embed(self, ids: list[int] | Tensor) -> Tensor:
        return self._decoder.embed_tokens(torch.as_tensor(ids))

    @property
    def _end(self) -> int:
        return int(self._processor.tokenizer.eos_token_id)

    def _text(self, ids: list[int]) -> str:
        ended = self._end in ids
        own = ids[: ids.index(self._end)] if ended else ids
        text = self._processor.tokenizer.decode(own, skip_special_tokens=True).strip()
        return text if ended else text + CUT


# ---- what is shown --------------------------------------------------------------------------------


def everything(tower: Any, pixel_values: Tensor, number: int) -> Shown:
    """All patches."""
    features = encode(tower, pixel_values, None).features
    return Shown(features, torch.arange(len(features)), len(features))


def blank(tower: Any, pixel_values: Tensor, number: int) -> Shown:
    """All patches of another picture, of one colour: what can be guessed."""
    return everything(tower, torch.zeros_like(pixel_values), number)


def closed_up(thresholds: Thresholds, in_reading_order: bool) -> ImageTokens:
    """Merged tokens at consecutive positions, one each: merging without virtual unmerging.

    Args:
        thresholds: of merging.
        in_reading_order: put them in order of their first patch; else they stay in the tower's, as in DyMU's
            own code, where merging has shuffled them.

    """

    def tokens(tower: Any, pixel_values: Tensor, number: int) -> Shown:
        live = encode(tower, pixel_values, thresholds)
        count = len(live.features)
        order = reading_order(live) if in_reading_order else torch.arange(count)
        return Shown(live.features[order], torch.arange(count), count)

    return tokens


def reading_order(live: LiveTokens) -> Tensor:
    """The live tokens of a single image, int64 [n], by the first patch that each holds."""
    owner = live.owner[0]
    first = torch.full((live.counts[0],), len(owner))
    return first.scatter_reduce(0, owner, torch.arange(len(owner)), "amin").argsort()


def fewer_from_the_start(thresholds: Thresholds) -> ImageTokens:
    """At random as many unmerged patches as merging would leave tokens, at their own positions."""

    def tokens(tower: Any, pixel_values: Tensor, number: int) -> Shown:
        count = encode(tower, pixel_values, thresholds).counts[0]
        whole = everything(tower, pixel_values, number)
        chosen = at_random(whole.span, count, number)
        return Shown(whole.features[chosen], chosen, whole.span)

    return tokens


def fewer_after_the_choice(ratio: float) -> ImageTokens:
    """At random as many patches as FastV keeps, after the same layer, at their own positions."""

    def tokens(tower: Any, pixel_values: Tensor, number: int) -> Shown:
        whole = everything(tower, pixel_values, number)
        kept = at_random(whole.span, live_to_kept(whole.span, ratio), number)
        return Shown(whole.features, whole.places, whole.span, kept)

    return tokens


def at_random(patches: int, count: int, seed: int) -> Tensor:
    """So many of the patches, int64 [count], ascending.

    The first ones of one order for each seed: more patches of a picture are those of fewer and others.
    """
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def answer_all(
    model: OfflineModel, image_tokens: ImageTokens, images: list[Image.Image], asked: list[Asked]
) -> tuple[list[str], float, float]:
    """Answers to all questions, and the average number of tokens of a question before and after the choice.

    Args:
        model: who answers.
        image_tokens: what it is shown of a picture.
        images: the pictures.
        asked: the questions, those of one picture one after the other.

    """

    def of_picture(number: int) -> list[tuple[str, int, int]]:
        shown = model.show(image_tokens, images[number], number)
        live = len(shown.places)
        kept = live if shown.kept is None else len(shown.kept)
        own = [question for question in asked if question.picture == number]
        return [(answer, live, kept) for answer in model.answers(shown, own)]

    # The operations are too small to share one among the cores.
    threads = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(os.cpu_count(), **threads) as pool:
        found = [each for picture in pool.map(of_picture, range(len(images))) for each in picture]
    answers, live, kept = zip(*found, strict=True)
    return list(answers), sum(live) / len(found), sum(kept) / len(found)
