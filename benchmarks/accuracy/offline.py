"""What no server offers: merging without virtual unmerging, and other choices than FastV's own.

Transformers, float32. Virtual unmerging is computed as it is defined: a token stands at each of its patches'
positions, and attention's outputs there are averaged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy.questions import CUT, Asked
from vllm_hybrid.method.clip_tower import encode
from vllm_hybrid.method.fastv import live_to_kept, select_tokens
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
        owner: int64 [n], the number of the live token that each belongs to, of which it is a copy; None where
            each is one of its own.

    """

    features: Tensor
    places: Tensor
    span: int
    kept: Tensor | None = None
    owner: Tensor | None = None

    @property
    def owners(self) -> Tensor:
        """The number of the live token that each belongs to, int64 [n]."""
        return torch.arange(len(self.places)) if self.owner is None else self.owner

    def pruned(self, importance: Tensor, ratio: float) -> Shown:
        """With FastV's choice of its live tokens, float [live] being how important each is."""
        live = len(importance)
        chosen = select_tokens(importance, torch.tensor([live]), torch.tensor([live_to_kept(live, ratio)]))
        return replace(self, kept=chosen[self.owners].nonzero().flatten())


# From the tower, pixel values [1, 3, H, W] and the picture's number to what the decoder is shown.
ImageTokens = Callable[[Any, Tensor, int], Shown]


@dataclass(frozen=True)
class _Questions:
    """Questions side by side, filled up on the right.

    Attributes:
        ids: int64 [questions, width].
        lengths: int64 [questions], tokens of each.
        seen: bool [questions, width, width], which tokens a token sees. It never sees what is behind it, so
            what a question is filled up with matters to what follows it alone.

    """

    ids: Tensor
    lengths: Tensor
    seen: Tensor

    @classmethod
    def of(cls, asked: list[Asked]) -> _Questions:
        lengths = torch.tensor([len(question.after) for question in asked])
        width = int(lengths.max())
        ids = torch.tensor([[*q.after, *[0] * (width - len(q.after))] for q in asked])
        seen = torch.ones(width, width, dtype=torch.bool).tril().expand(len(asked), -1, -1)
        return cls(ids, lengths, seen)

    @property
    def width(self) -> int:
        """Tokens of the longest one."""
        return self.ids.shape[1]


def _attention(query: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """What a query of each batch entry and head gives the rows.

    Args:
        query: [batch, heads, head size], rotated as the keys are.
        keys: [batch, KV heads, rows, head size].
        seen: bool [batch, rows].

    Returns:
        [batch, heads, rows], each sum 1.

    """
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = (keys @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)


def mean_over_copies(rows: Tensor, owner: Tensor) -> Tensor:
    """Each row the mean of all those of its token.

    Args:
        rows: [batch, rows, C].
        owner: int64 [rows], of each the number of its token.

    """
    sums = rows.new_zeros(rows.shape[0], int(owner.max()) + 1, rows.shape[2]).index_add_(1, owner, rows)
    return (sums / owner.bincount().clamp(min=1)[:, None])[:, owner]


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

    @torch.no_grad()
    def importance(self, shown: Shown, asked: list[Asked]) -> Tensor:
        """What FastV ranks the live tokens of a picture by, float [questions, live].

        The attention that the last position of each question gives them in the layer before ``fastv_layer``,
        averaged over heads and summed over a token's copies (FastV, section 4.1).
        """
        before, questions, ranking = list(asked[0].before), _Questions.of(asked), self._fastv_layer - 1
        cache, start = self._prefill(replace(shown, kept=None), before, self._fastv_layer)
        cache.batch_repeat_interleave(len(asked))
        positions = (start + torch.arange(questions.width)).expand(len(asked), -1)
        hidden = self._layers(self._embed(questions.ids), positions, cache, questions.seen, range(ranking))
        self._layers(hidden, positions, cache, questions.seen, range(ranking, ranking + 1))
        each = torch.arange(len(asked)), questions.lengths - 1
        query = self._query(ranking, hidden, positions)[each[0], :, each[1]]
        earlier = cache.get_seq_length(ranking) - questions.width
        seen = torch.nn.functional.pad(questions.seen[each], (earlier, 0), value=True)
        attention = _attention(query, cache.layers[ranking].keys, seen).mean(1)
        copies = attention[:, len(before) : earlier]
        live = int(shown.owners.max()) + 1
        return copies.new_zeros(len(asked), live).index_add_(1, shown.owners, copies)

    def _query(self, number: int, hidden: Tensor, positions: Tensor) -> Tensor:
        """A layer's queries, rotated: [batch, heads, rows, head size]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        layer, turns = self._decoder.layers[number], self._decoder.rotary_emb(hidden, positions)
        projected = layer.self_attn.q_proj(layer.input_layernorm(hidden))
        query = projected.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        rotated: Tensor = apply_rotary_pos_emb(query, query, *turns)[0]
        return rotated

    def _prefill(self, shown: Shown, before: list[int], layers: int | None = None) -> tuple[Any, int]:
        """What all questions begin with: the cache of all or the first layers, and the position behind it."""
        from transformers import DynamicCache

        cache, first = DynamicCache(), len(before)
        hidden = torch.cat([self._embed(before), self._projector(shown.features)])
        positions = torch.cat([torch.arange(first), first + shown.places])
        rows = None if shown.kept is None else torch.cat([torch.arange(first), first + shown.kept])
        owner = None if shown.owner is None else torch.cat([torch.arange(first), first + shown.owner])
        numbers = range(len(self._decoder.layers) if layers is None else layers)
        self._layers(hidden[None], positions[None], cache, None, numbers, rows, owner)
        return cache, first + shown.span

    def _generate(self, cache: Any, start: int, asked: list[Asked]) -> list[list[int]]:
        """As many tokens for each question as the longest answer may have, or all their ends' needs."""
        questions = _Questions.of(asked)
        lengths, width = questions.lengths, questions.width
        positions = (start + torch.arange(width)).expand(len(asked), -1)
        hidden = self._run(self._embed(questions.ids), positions, cache, questions.seen)
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

    def _run(self, hidden: Tensor, positions: Tensor, cache: Any, seen: Tensor) -> Tensor:
        """All decoder layers and the last norm."""
        every = range(len(self._decoder.layers))
        return self._decoder.norm(self._layers(hidden, positions, cache, seen, every))

    def _layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: Any,
        seen: Tensor | None,
        numbers: range,
        kept_rows: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> Tensor:
        """Some decoder layers.

        Args:
            hidden: [batch, rows, C].
            positions: [batch, rows].
            cache: every layer's keys and values, added to.
            seen: bool [batch, rows, text], which of the cache's last rows, these included, a row sees; all
                rows before them it sees anyway. None: causal.
            numbers: of the layers.
            kept_rows: rows that go on from ``fastv_layer``; None for all.
            owner: int64 [rows], the same number for copies of one token; None where there are none.

        """
        turns = self._decoder.rotary_emb(hidden, positions)
        for number in numbers:
            if kept_rows is not None and number == self._fastv_layer:
                hidden, turns = hidden[:, kept_rows], tuple(turn[:, kept_rows] for turn in turns)
                owner = None if owner is None else owner[kept_rows]
            mask = None
            if seen is not None:
                earlier = cache.get_seq_length(number) + hidden.shape[1] - seen.shape[2]
                mask = torch.nn.functional.pad(seen, (earlier, 0), value=True)[:, None]
            hidden = self._layer(number, hidden, mask, cache, turns, owner)
        return hidden

    def _layer(
        self, number: int, hidden: Tensor, mask: Tensor | None, cache: Any, turns: Any, owner: Tensor | None
    ) -> Tensor:
        """A decoder layer; the outputs of attention are averaged over the copies of a token."""
        layer = self._decoder.layers[number]
        attended, _ = layer.self_attn(
            layer.input_layernorm(hidden),
            position_embeddings=turns,
            attention_mask=mask,
            past_key_values=cache,
        )
        hidden = hidden + (attended if owner is None else mean_over_copies(attended, owner))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

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


def unmerged(thresholds: Thresholds) -> ImageTokens:
    """Merged tokens, each at all positions of its patches, as the server has them."""

    def tokens(tower: Any, pixel_values: Tensor, number: int) -> Shown:
        live = encode(tower, pixel_values, thresholds)
        owner = live.owner[0]
        return Shown(live.features[owner], torch.arange(len(owner)), len(owner), owner=owner)

    return tokens


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

    found = [each for picture in _on_all_cores(of_picture, len(images)) for each in picture]
    answers, live, kept = zip(*found, strict=True)
    return list(answers), sum(live) / len(found), sum(kept) / len(found)


def answer_ranked(
    model: OfflineModel,
    image_tokens: ImageTokens,
    ratio: float,
    images: list[Image.Image],
    pairs: list[tuple[Asked, Asked]],
) -> tuple[list[str], float, float]:
    """Answers to questions, each with the image tokens that FastV keeps for another one.

    Args:
        model: who answers.
        image_tokens: what it is shown of a picture before the choice.
        ratio: R of FastV.
        images: the pictures.
        pairs: whose last position ranks, and what is asked, of the same picture; those of one picture one
            after the other.

    Returns:
        The answers, and the average live and kept tokens of one.

    """

    def of_picture(number: int) -> list[tuple[str, int, int]]:
        own = [pair for pair in pairs if pair[0].picture == number]
        rankers = list(dict.fromkeys(ranker for ranker, _ in own))
        if not rankers:
            return []
        shown = model.show(image_tokens, images[number], number)
        found: dict[tuple[Asked, Asked], tuple[str, int, int]] = {}
        for ranker, importance in zip(rankers, model.importance(shown, rankers), strict=True):
            asked = list(dict.fromkeys(question for other, question in own if other == ranker))
            pruned = shown.pruned(importance, ratio)
            live, kept = len(importance), live_to_kept(len(importance), ratio)
            for question, answer in zip(asked, model.answers(pruned, asked), strict=True):
                found[ranker, question] = answer, live, kept
        return [found[pair] for pair in own]

    found = [each for picture in _on_all_cores(of_picture, len(images)) for each in picture]
    answers, live, kept = zip(*found, strict=True)
    return list(answers), sum(live) / len(found), sum(kept) / len(found)


def _on_all_cores(of_picture: Callable[[int], list[Any]], pictures: int) -> list[list[Any]]:
    """What a function gives for each picture."""
    # The operations are too small to share one among the cores.
    threads = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(os.cpu_count(), **threads) as pool:
        return list(pool.map(of_picture, range(pictures)))
