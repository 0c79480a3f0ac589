"""The decoder on a picture and several blocks of text that do not see each other."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from tools.demo_training.network import GRID
from tools.demo_training.prompts import NO_LOSS, PADDING, text_start
from vllm_hybrid.demo.model import SHAPE

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


class Read(NamedTuple):
    """What :class:`PackedDecoder` gives."""

    logits: Tensor
    targets: Tensor
    halfway: Tensor


class PackedDecoder(nn.Module):
    """Projector and decoder."""

    def __init__(self, model: Any, head: list[int]) -> None:
        """Share the model's parameters; ``head`` are the prompt's ids before the picture, <s> the first."""
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.decoder = model.model.language_model
        self.decoder.config._attn_implementation = _ATTENTION
        self.lm_head = model.lm_head
        self._head = torch.tensor(head)

    def forward(self, features: Tensor, batch: dict[str, Tensor]) -> Read:
        """Logits wherever the batch has targets.

        Args:
            features: the tower's of the patches, float32 [batch, patches, width].
            batch: of :meth:`tools.demo_training.prompts.Prompts.pack`, and two facts. "side", int64: squares
                of so many patches a side are averaged; a token then stands for all of them, at their mean
                position. "bare", bool: prompts begin without <s>, as those of vLLM's chats do.

        Returns:
            Logits [targets, vocabulary], the targets int64 [targets], and the residual stream half way up of
            the tokens that the batch calls described [described, width].

        """
        positions, side = torch.arange(SHAPE.patches, dtype=torch.float32), int(batch["side"])
        if side > 1:
            features = _averaged(features, side)
            positions = _averaged(positions[None, :, None], side)[0, :, 0]
        head = self._head[1:] if bool(batch["bare"]) else self._head
        hidden, places = self._embed(head, features, positions, batch)
        mask = _mask(batch["blocks"], len(head), len(positions))
        rotations = self.decoder.rotary_emb(hidden, places)
        halfway = hidden
        for number, layer in enumerate(self.decoder.layers, 1):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotations)
            if number == len(self.decoder.layers) // 2:
                halfway = hidden[:, -batch["ids"].shape[1] :][batch["described"]]
        asked = batch["targets"] != NO_LOSS
        read = self.decoder.norm(hidden[:, -asked.shape[1] :][asked])
        return Read(self.lm_head(read), batch["targets"][asked], halfway)

    def _embed(
        self, head: Tensor, features: Tensor, positions: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        count, start = len(features), len(head)
        embed = self.decoder.embed_tokens
        parts = [
            embed(head).expand(count, -1, -1),
            self.projector(features),
            embed(batch["ids"]),
        ]
        before = torch.cat([torch.arange(start, dtype=torch.float32), start + positions])
        after = text_start(head.tolist()) + batch["positions"].float()
        return torch.cat(parts, 1), torch.cat([before.expand(count, -1), after], 1)


def _averaged(patches: Tensor, side: int) -> Tensor:
    """Averages of squares of patches, [batch, patches, width] to [batch, patches / side^2, width]."""
    grid = patches.transpose(1, 2).unflatten(-1, (GRID, GRID))
    return functional.avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def _mask(blocks: Tensor, head: int, picture: int) -> Tensor:
    """What is added to the scores of the rows after the picture [batch, 1, text, head + picture + text].

    A token that stands for several patches counts so many times, as it would if they were all there.
    """
    count, text = blocks.shape
    causal = torch.ones(text, text, dtype=torch.bool).tril()
    seen = (blocks[:, :, None] == blocks[:, None]) & causal & (blocks[:, None] != PADDING)
    before = torch.zeros(count, text, head + picture)
    before[:, :, head:] = math.log(SHAPE.patches / picture)
    among = torch.zeros(count, text, text).masked_fill(~seen, -math.inf)
    return torch.cat([before, among], 2)[:, None]
