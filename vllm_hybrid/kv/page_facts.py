"""Page facts: what a KV slot says about itself, so that a request can be rebuilt from its own pages.

Beside every slot of a tier stand a few int32 words: for a text row ``start`` is 0; for a live row of an
image ``start`` is one more than the virtual position of the image's first patch, ``count`` the number of
live rows the image has in this tier, and the mask the patches this row holds. The live rows of an image
that starts at position s fill the slots s .. s + count - 1; the slots up to s + patches are a hole whose
blocks may belong to somebody else, so a reader jumps over them.
"""

from __future__ import annotations

import torch

from vllm_hybrid.method.row_plan import RowPlan, StepImages

START = 0
COUNT = 1
MASK = 2
_BITS = 32


def fact_words(patches: int) -> int:
    """Number of int32 words the facts of one slot take for images of ``patches`` patches."""
    return MASK + -(-patches // _BITS)


def new_page_facts(blocks: int, block_size: int, patches: int, device: torch.device) -> torch.Tensor:
    """Facts of a tier's pages, all text.

    Returns int32 [blocks + 1, block_size, fact_words(patches)]: the block behind the last one takes what
    padding rows write, which no page may keep.
    """
    return torch.zeros(blocks + 1, block_size, fact_words(patches), dtype=torch.int32, device=device)


def row_facts(
    num_rows: int,
    row_of: torch.Tensor,
    patch_rows: torch.Tensor,
    image_starts: torch.Tensor,
    image_of_row: torch.Tensor,
) -> torch.Tensor:
    """The facts to store with the rows of one step.

    Args:
        num_rows: rows of this tier in this step, R.
        row_of: int64 [N], the row which stands for each virtual row of the step, -1 where there is none.
        patch_rows: int64 [images, patches], virtual row of every patch of every image in the step.
        image_starts: int64 [images], virtual position of each image's first patch.
        image_of_row: int64 [R], which image of the step a row belongs to, -1 for text.

    Returns:
        int32 [R, fact_words(patches)].

    """
    images, patches = patch_rows.shape
    facts = torch.zeros(num_rows, fact_words(patches), dtype=torch.int32, device=row_of.device)
    if images == 0:
        return facts
    is_image = image_of_row >= 0
    image = image_of_row.clamp(min=0)
    count = torch.zeros(images, dtype=torch.int64, device=row_of.device)
    count.index_add_(0, image, is_image.long())
    facts[:, START] = torch.where(is_image, image_starts[image] + 1, 0).int()
    facts[:, COUNT] = torch.where(is_image, count[image], 0).int()

    holder = row_of[patch_rows]
    patch = torch.arange(patches, device=row_of.device).expand_as(holder)
    held = holder >= 0
    # Every patch has one holder, so the bits of a word are distinct and their sum is their union.
    bit = torch.bitwise_left_shift(torch.ones_like(patch), patch % _BITS)
    bit = torch.where(bit >= 1 << (_BITS - 1), bit - (1 << _BITS), bit).int()
    words = facts.shape[1]
    place = holder.clamp(min=0) * words + MASK + patch // _BITS
    facts.view(-1).index_add_(0, place.flatten(), torch.where(held, bit, 0).flatten())
    return facts


def held_patches(facts: torch.Tensor, patches: int) -> list[int]:
    """The patches in the mask of one slot's facts (int32 [words]), in ascending order."""
    words = [int(w) & 0xFFFFFFFF for w in facts[MASK:].tolist()]
    return [p for p in range(patches) if words[p // _BITS] >> (p % _BITS) & 1]


def plan_facts(plan: RowPlan, images: StepImages, positions: torch.Tensor) -> torch.Tensor:
    """Page facts to store with a tier's rows.

    Args:
        plan: the tier's rows.
        images: the images of the step.
        positions: int64 [N], virtual position of each virtual row.

    Returns:
        int32 [R, words].

    """
    return row_facts(
        plan.rows.shape[0], plan.row_of, images.patch_rows, positions[images.first_row], plan.image
    )
