"""The batch plan: which rows of a step are live, where each is stored, every virtual key position.

A step brings *virtual rows*, one per scheduled position, numbered as the unreduced model numbers them.
A tier computes only *live rows*: all text rows and, of an image, its live (lower tier) or kept (upper
tier) tokens. ``row_of`` leads from a virtual row to the live row that stands for it, which is all that
compaction, attention at virtual positions and the way back to virtual rows need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_hybrid.method.fastv import live_to_kept
from vllm_hybrid.method.ranking import header_end_rows


def true_places(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where a mask is true, without the wait for the device that ``nonzero`` takes.

    Args:
        mask: bool [n].
        count: how many are true.

    Returns:
        int64 [count], ascending.

    """
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, count + 1, device=mask.device))


def to_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 numbers of the host on a device; the host does not wait for the copy."""
    on_host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


@dataclass
class StepImages:
    """The images of one step.

    Attributes:
        first_row: int64 [images], virtual row of each image's patch 0; its patches follow in order.
        owner: int64 [images, patches], the live token (0 .. n-1) that holds each patch.
        first_rows: ``first_row`` on the host.
        counts: live tokens of each image, on the host: what every shape of the step follows from.
        ratios: share of each image's live tokens to drop, R.
        header_ends: virtual row at which the first assistant header behind each image ends, on the host, see
            :func:`vllm_hybrid.method.ranking.header_end_rows`; None where no header was looked for.

    """

    first_row: torch.Tensor
    owner: torch.Tensor
    first_rows: list[int]
    counts: list[int]
    ratios: list[float]
    header_ends: list[int] | None = None

    @classmethod
    def of(
        cls,
        first_rows: list[int],
        owner: torch.Tensor,
        level: torch.Tensor,
        level_ratios: Sequence[float],
        token_ids: torch.Tensor,
        header: Sequence[int] = (),
    ) -> StepImages:
        """Images at known rows; reads what only the device knows of them in the step's one round trip.

        Args:
            first_rows: virtual row of each image's patch 0.
            owner: int64 [images, patches], the live token that holds each patch.
            level: int64 [images], number of the level of each image.
            level_ratios: share of an image's live tokens to drop at each level.
            token_ids: int [N], of the virtual rows.
            header: token ids of the assistant header to look for; empty for none.

        """
        first_row = to_device(first_rows, owner.device)
        unread = [owner.amax(dim=1) + 1, level]
        if header:
            image_ends = first_row + owner.shape[1]
            unread.append(header_end_rows(token_ids, image_ends, to_device(header, owner.device)))
        counts, levels, *header_ends = torch.stack(unread).tolist()
        ratios = [level_ratios[number] for number in levels]
        return cls(first_row, owner, first_rows, counts, ratios, *header_ends)

    @property
    def patch_rows(self) -> torch.Tensor:
        """int64 [images, patches]: the virtual row of every patch."""
        patches = torch.arange(self.owner.shape[1], device=self.owner.device)
        return self.first_row[:, None] + patches

    @property
    def kept_counts(self) -> list[int]:
        """Live tokens that FastV keeps of each image, on the host."""
        return [live_to_kept(live, ratio) for live, ratio in zip(self.counts, self.ratios, strict=True)]

    @property
    def live_counts(self) -> torch.Tensor:
        """int64 [images]: live tokens of each image."""
        return self.owner.amax(dim=1) + 1


@dataclass
class RowPlan:
    """Which rows a tier computes in a step.

    Attributes:
        rows: int64 [R], virtual row each live row is taken from.
        row_of: int64 [N], live row that stands for each virtual row, -1 where it was dropped.
        stored_at: int64 [R], virtual row whose slot keeps the live row's keys and values.
        image: int64 [R], image of the step a row belongs to, -1 for text.

    """

    rows: torch.Tensor
    row_of: torch.Tensor
    stored_at: torch.Tensor
    image: torch.Tensor

    def first(self, rows: int) -> RowPlan:
        """The first rows of a plan without images, as views."""
        return RowPlan(self.rows[:rows], self.row_of[:rows], self.stored_at[:rows], self.image[:rows])


def plan_text_rows(num_rows: int, device: torch.device | str = "cpu") -> RowPlan:
    """The plan of a step without images: every virtual row is live, and stored where it stands."""
    rows = torch.arange(num_rows, device=device)
    return RowPlan(rows=rows, row_of=rows, stored_at=rows, image=torch.full_like(rows, -1))


def plan_live_rows(num_rows: int, images: StepImages) -> RowPlan:
    """The lower tier's rows: all text and the live tokens of every image.

    Args:
        num_rows: virtual rows of the step, N.
        images: the images of the step, each wholly inside it.

    Returns:
        The plan; row_of has no -1, since merging loses no patch.

    """
    device = images.owner.device
    patches = images.owner.shape[1]
    patch_rows = images.patch_rows
    image_of = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
    numbers = torch.arange(images.owner.shape[0], device=device)[:, None].expand_as(patch_rows)
    image_of[patch_rows] = numbers
    live = torch.ones(num_rows, dtype=torch.bool, device=device)
    live[patch_rows] = torch.arange(patches, device=device) < images.live_counts[:, None]
    compact = live.cumsum(0) - 1
    row_of = compact.clone()
    row_of[patch_rows] = compact[images.first_row][:, None] + images.owner
    dropped = len(images.counts) * patches - sum(images.counts)
    rows = true_places(live, num_rows - dropped)
    return RowPlan(rows=rows, row_of=row_of, stored_at=rows, image=image_of[rows])


def plan_kept_rows(lower: RowPlan, images: StepImages, keep: torch.Tensor, kept_images: int) -> RowPlan:
    """The upper tier's rows: the lower tier's without the image tokens FastV dropped.

    Args:
        lower: the lower tier's plan of the same step.
        images: the images of the step.
        keep: bool [R of lower], true for every text row and every kept live token.
        kept_images: image tokens kept, over all images.

    Returns:
        The plan; kept tokens of an image move up to its first slots, in their old order.

    """
    compact = keep.cumsum(0) - 1
    row_of = torch.where(keep[lower.row_of], compact[lower.row_of], -1)
    kept = true_places(keep, lower.rows.shape[0] - sum(images.counts) + kept_images)
    image = lower.image[kept]
    # Number of a kept token inside its image: kept rows before it less kept rows before its image.
    first_live = lower.row_of.new_zeros(images.first_row.shape[0])
    first_live += torch.searchsorted(lower.rows, images.first_row)
    before_image = compact[first_live] - keep[first_live].long() + 1
    is_image = image >= 0
    at = image.clamp(min=0)
    index = torch.arange(kept.shape[0], device=kept.device) - before_image[at]
    stored_at = torch.where(is_image, images.first_row[at] + index, lower.rows[kept])
    return RowPlan(rows=lower.rows[kept], row_of=row_of, stored_at=stored_at, image=image)
