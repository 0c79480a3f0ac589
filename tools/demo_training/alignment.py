"""The projector's own lesson: what it makes of a patch is like the words for what the patch shows.

A question's words find their things by attention, which compares; where words and patches have directions in
common, one comparison serves all words, and they need not be learned one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tools.demo_training.batches import Batch
from tools.demo_training.dense_labels import BACKGROUND
from tools.demo_training.prompts import Prompts
from vllm_hybrid.demo.scenes import COLOURS, KINDS, kind_name

# Patches of one batch that are compared.
_PATCHES = 256
# Of cosines, to be logits.
_SHARPNESS = 10.0


class Words:
    """The tokens that tell kinds and colours from each other: the last of each name."""

    def __init__(self, prompts: Prompts) -> None:
        self.kinds = torch.tensor([prompts.last_token(f"the {kind_name(kind)}") for kind in KINDS])
        self.colours = torch.tensor([prompts.last_token(f"the {colour}") for colour in COLOURS])


def shown_patches(batch: Batch) -> Tensor:
    """Numbers of some patches that show a thing, int64 [at most 256, 2], of picture and of patch."""
    things = (batch["kind"].flatten(1) != BACKGROUND).nonzero()
    return things[:: -(-len(things) // _PATCHES)]


def alignment(projected: Tensor, shown: Tensor, batch: Batch, words: Words, embeddings: Tensor) -> Tensor:
    """How hard it is to name the shown patches by the likest words, kind and colour; a loss.

    Args:
        projected: the projector's output for the patches [patches, width].
        shown: of :func:`shown_patches`.
        batch: with kind and colour of all patches.
        words: the names' tokens.
        embeddings: of all tokens [vocabulary, width].

    """
    pictures, patches = shown.unbind(1)
    losses = []
    for name, tokens in (("kind", words.kinds), ("colour", words.colours)):
        labels = batch[name].flatten(1)[pictures, patches] - 1
        cosines = functional.normalize(projected, dim=-1) @ functional.normalize(embeddings[tokens], dim=-1).T
        losses.append(functional.cross_entropy(_SHARPNESS * cosines, labels))
    return torch.stack(losses).sum()
