"""The tower's lessons: from every patch's features, what the patch shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_training.batches import Batch
from tools.demo_training.dense_labels import BACKGROUND, COLOUR_CLASSES, KIND_CLASSES
from vllm_hybrid.demo.model import SHAPE
from vllm_hybrid.demo.scenes import PLACES

# Background patches are many and easy.
_BACKGROUND_WEIGHT = 0.2
_CENTRE_WEIGHT = 8.0
_SHARES = {"kind": 1.0, "colour": 0.5, "cell": 0.2, "centre": 0.3, "look": 0.3, "present": 0.2}
# Averages of the patch's quarters in three colours, and the strength of its texture in each.
_LOOKS = 4 * 3 + 3


class DenseHeads(nn.Module):
    """Linear readers of the features; they are training's alone and not part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SHAPE.vision_width)
        self.sizes = {
            "kind": KIND_CLASSES,
            "colour": COLOUR_CLASSES,
            "cell": len(PLACES),
            "centre": 1,
            "look": _LOOKS,
        }
        self.patches = nn.Linear(SHAPE.vision_width, sum(self.sizes.values()))
        self.whole = nn.Linear(SHAPE.vision_width, KIND_CLASSES + COLOUR_CLASSES - 2)

    def forward(self, features: Tensor, batch: Batch, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss and how well patches of things are read.

        Args:
            features: [batch, 1 + patches, width].
            batch: of :func:`tools.demo_training.batches.dense_batch`.
            pixels: float32 [batch, 3, side, side], normalised.

        Returns:
            The loss, and the share of patches of things whose kind and colour are right.

        """
        features = self.norm(features)
        read = dict(
            zip(self.sizes, self.patches(features[:, 1:]).split(list(self.sizes.values()), -1), strict=True)
        )
        labels = {name: batch[name].flatten() for name in ("kind", "colour", "cell", "centre")}
        losses = {
            "kind": _classified(read["kind"], labels["kind"]),
            "colour": _classified(read["colour"], labels["colour"]),
            "cell": functional.cross_entropy(read["cell"].flatten(0, 1), labels["cell"]),
            "centre": functional.binary_cross_entropy_with_logits(
                read["centre"].flatten(), labels["centre"].float(), pos_weight=torch.tensor(_CENTRE_WEIGHT)
            ),
            "look": functional.mse_loss(read["look"], _look(pixels)),
            "present": functional.binary_cross_entropy_with_logits(
                self.whole(features[:, 0]), _present(batch)
            ),
        }
        loss = torch.stack([_SHARES[name] * each for name, each in losses.items()]).sum()
        things = labels["kind"] != BACKGROUND
        right = {
            name: float((read[name].flatten(0, 1).argmax(-1) == labels[name])[things].float().mean())
            for name in ("kind", "colour")
        }
        return loss, right


def _classified(logits: Tensor, labels: Tensor) -> Tensor:
    weights = torch.ones(logits.shape[-1])
    weights[BACKGROUND] = _BACKGROUND_WEIGHT
    return functional.cross_entropy(logits.flatten(0, 1), labels, weights)


def _look(pixels: Tensor) -> Tensor:
    """What the patches look like [batch, patches, 15]: without it, features of all backgrounds are alike."""
    quarters = functional.avg_pool2d(pixels, SHAPE.patch_size // 2)
    squares = functional.avg_pool2d(pixels**2, SHAPE.patch_size)
    texture = (squares - functional.avg_pool2d(pixels, SHAPE.patch_size) ** 2).clamp_min(1e-4).sqrt()
    folded = functional.pixel_unshuffle(quarters, 2)
    return torch.cat([folded, 2 * texture], 1).flatten(2).transpose(1, 2)


def _present(batch: Batch) -> Tensor:
    """Which kinds and colours the picture holds [batch, kinds + colours]."""
    found = [
        functional.one_hot(batch[name].flatten(1), classes).amax(1)[:, 1:]
        for name, classes in (("kind", KIND_CLASSES), ("colour", COLOUR_CLASSES))
    ]
    return torch.cat(found, 1).float()
