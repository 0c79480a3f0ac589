"""The model in training: transformers' LLaVA, and its parts run on what training needs beyond serving.

The tower runs on pictures of any size, as a window of its grid of positions; the decoder on several questions
of one picture at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tools.demo_training.tower_start import GRID, start_tower
from vllm_hybrid.demo.model import Weights, config

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def new_model(seed: int) -> Any:
    """The untrained model in float32, its tower set by :mod:`tools.demo_training.tower_start`."""
    torch.manual_seed(seed)
    settings = {name: value for name, value in config(None).items() if name != "hybrid"}
    model = LlavaForConditionalGeneration(LlavaConfig(**settings)).float()
    start_tower(model.model.vision_tower)
    return model


def normalised(pixels: Tensor) -> Tensor:
    """Bytes [batch, side, side, 3] as the processor gives them on, float32 [batch, 3, side, side]."""
    return ((pixels / 255 - _MEAN) / _DEVIATION).permute(0, 3, 1, 2)


class TowerFeatures(nn.Module):
    """The tower up to the layer whose output the projector takes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower

    def forward(self, pixels: Tensor, row: int = 0, column: int = 0) -> Tensor:
        """Features [batch, 1 + patches, width], the class token's first.

        Args:
            pixels: float32 [batch, 3, side, side], normalised.
            row: of the picture's first patch in the grid of positions.
            column: likewise.

        """
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixels)
        high, wide = patches.shape[-2:]
        positions = embeddings.position_embedding.weight
        window = positions[1:].view(GRID, GRID, -1)[row : row + high, column : column + wide]
        own = (embeddings.class_embedding + positions[0]).expand(len(pixels), 1, -1)
        tokens = torch.cat([own, patches.flatten(2).transpose(1, 2) + window.flatten(0, 1)], 1)
        tokens = self.tower.pre_layrnorm(tokens)
        for layer in self.tower.encoder.layers[:-1]:
            tokens = layer(tokens, None)
        return tokens


def hub_weights(model: Any) -> Weights:
    """The model's weights by the names of llava-1.5-7b-hf, float32, detached copies."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for start, hub in (
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ):
            if name.startswith(start):
                renamed[hub + name.removeprefix(start)] = tensor.detach().clone()
    return renamed
