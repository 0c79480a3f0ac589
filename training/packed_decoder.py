"""The decoder on a picture and several blocks of text that do not see each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from vllm_hybrid.demo_model import PATCHES

from .network import GRID
from .prompts import NO_LOSS, PADDING, text_start

_ATTENTION = "picture_and_blocks"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attention [batch, length, heads, size]; the mask is of the rows after the picture alone.

    The rows before them are causal, which halves their work.
    """
    picture = query.shape[2] - attention_mask.shape[2]
    attend = functional.scaled_dot_product_attention
    before = attend(query[:, :, :picture], key[:, :, :picture], value[:, :, :picture], is_causal=True)
    after = attend(query[:, :, picture:], key, value, attn_mask=attention_mask)
    return torch.cat([before, after], 2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


class PackedDecoder(nn.Module):
    """Projector and decoder."""

    def __init__(self, model: Any, head: list[int]) -> None:
        """Share the model's parameters; ``head`` are the prompt's ids before the picture."""
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.decoder = model.model.language_model
        self.decoder.config._attn_implementation = _ATTENTION
        self.lm_head = model.lm_head
        self._head = torch.tensor(head)

    def forward(self, features: Tensor, batch: dict[str, Tensor], pool: bool) -> tuple[Tensor, Tensor]:
        """Logits wherever the batch has targets.

        Args:
            features: the tower's of the patches, float32 [batch, patches, width].
            batch: of :meth:`training.prompts.Prompts.pack`.
            pool: average 2 x 2 patches; a token then stands for four, at their mean position.

        Returns:
            Logits [targets, vocabulary] and the targets int64 [targets].

        """
        positions = torch.arange(PATCHES, dtype=torch.float32)
        if pool:
            features, positions = _pooled(features), _pooled(positions[None, :, None])[0, :, 0]
        hidden, places = self._embed(features, positions, batch)
        mask = _mask(batch["blocks"], len(self._head), len(positions))
        rotations = self.decoder.rotary_emb(hidden, places)
        for layer in self.decoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotations)
        asked = batch["targets"] != NO_LOSS
        read = self.decoder.norm(hidden[:, -asked.shape[1] :][asked])
        return self.lm_head(read), batch["targets"][asked]

    def _embed(self, features: Tensor, positions: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        count, start = len(features), len(self._head)
        embed = self.decoder.embed_tokens
        parts = [
            embed(self._head).expand(count, -1, -1),
            self.projector(features),
            embed(batch["ids"]),
        ]
        before = torch.cat([torch.arange(start, dtype=torch.float32), start + positions])
        after = text_start(self._head.tolist()) + batch["positions"].float()
        return torch.cat(parts, 1), torch.cat([before.expand(count, -1), after], 1)


def _pooled(patches: Tensor) -> Tensor:
    """Averages of 2 x 2 patches, [batch, patches, width] to [batch, patches / 4, width]."""
    grid = patches.transpose(1, 2).unflatten(-1, (GRID, GRID))
    return functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)


def _mask(blocks: Tensor, head: int, picture: int) -> Tensor:
    """What is added to the scores of the rows after the picture [batch, 1, text, head + picture + text].

    A token that stands for four patches counts four times, as it would if they were all there.
    """
    count, text = blocks.shape
    causal = torch.ones(text, text, dtype=torch.bool).tril()
    seen = (blocks[:, :, None] == blocks[:, None]) & causal & (blocks[:, None] != PADDING)
    before = torch.zeros(count, text, head + picture)
    before[:, :, head:] = math.log(PATCHES / picture)
    among = torch.zeros(count, text, text).masked_fill(~seen, -math.inf)
    return torch.cat([before, among], 2)[:, None]
