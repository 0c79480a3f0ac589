"""A request's keys and a step's queries as lists of one length, which threads can cut anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_hybrid.attention.interface import KeyIndex


@dataclass
class RowLists:
    """The stored rows of a batch, text and image rows apart: what a decode reads, each row once.

    A *segment* is an image row with up to :data:`SEGMENT` of the positions it stands at; a row of more has
    several. Positions lie in the order of their segments (compressed sparse rows). Text rows are stored
    rotated, so they have neither positions nor angles. What stands behind a count is undefined.

    Attributes:
        text_row: int32 [requests, width], KV row of each text key.
        text_count: int32 [requests].
        segment_row: int32 [requests, width], KV row of each segment.
        segment_start: int32 [requests, width + 1], where a segment's positions begin; the entry behind the
            last segment is where they end.
        segment_count: int32 [requests].
        position: int32 [requests, width], virtual positions of the image rows.

    """

    text_row: torch.Tensor
    text_count: torch.Tensor
    segment_row: torch.Tensor
    segment_start: torch.Tensor
    segment_count: torch.Tensor
    position: torch.Tensor


SEGMENT = 8
"""Most positions of a segment. Rows of a tile wait for the one with the most positions, which asks for few;
each segment reads its row's key and value, which asks for many."""


@dataclass
class KeyLists(KeyIndex):
    """Virtual keys of a batch in buffers of fixed size: by stored row, and by virtual position, ascending.

    Position 0 rotates nothing, so rotating every key to its position is right for text too.

    Attributes:
        rows: the keys by stored row.
        kv_row_index: int32 [requests, width], KV row (block * kv_rows_per_block + offset) a key is read from;
            width is 0 in a step of decodes alone, which needs no list by position.
        rope_pos: int32 [requests, width], position a stored key is rotated to; 0 for text, stored rotated.
        count: int32 [requests], virtual keys; what stands behind them is undefined. Negative where a page
            held another request's data: such a request has no keys.

    """

    rows: RowLists
    kv_row_index: torch.Tensor
    rope_pos: torch.Tensor
    count: torch.Tensor


def new_key_lists(requests: int, width: int, by_position: bool, device: torch.device) -> KeyLists:
    """Room for the lists of ``requests`` requests of up to ``width`` virtual positions."""

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    rows = RowLists(
        text_row=room(requests, width),
        text_count=room(requests),
        segment_row=room(requests, width),
        segment_start=room(requests, width + 1),
        segment_count=room(requests),
        position=room(requests, width),
    )
    listed = width if by_position else 0
    return KeyLists(rows, room(requests, listed), room(requests, listed), room(requests))


@dataclass
class QueryLists:
    """Virtual queries of a step, request after request, ascending by position, dropped ones left out.

    A request's queries stand at the positions of its last keys, so query i of q sees all but the last
    q - 1 - i keys. Entries behind ``start[-1]`` are undefined.

    Attributes:
        row: int32 [N], live row of each virtual query.
        rope_pos: int32 [N], position to rotate it to; 0 for text rows, which are given rotated.
        start: int32 [requests + 1], a request's stretch.
        by_row: int32 [N], virtual queries in stable order of live row.
        row_start: int32 [R + 1], a live row's stretch of ``by_row``.

    """

    row: torch.Tensor
    rope_pos: torch.Tensor
    start: torch.Tensor
    by_row: torch.Tensor
    row_start: torch.Tensor


def query_lists(
    row_of: torch.Tensor, positions: torch.Tensor, image: torch.Tensor, query_start_loc: torch.Tensor
) -> QueryLists:
    """The virtual queries of a step; the host does not wait for the device.

    Args:
        row_of: int64 [N], live row that stands for each virtual row, -1 where it was dropped.
        positions: int64 [N], virtual position of each virtual row.
        image: int64 [R], image of the step a live row belongs to, -1 for text.
        query_start_loc: int32 [requests + 1], a request's stretch of virtual rows.

    """
    virtual, rows = row_of.shape[0], image.shape[0]
    inside = torch.arange(virtual, device=row_of.device) < query_start_loc[-1]
    stands = (row_of >= 0) & inside
    before = stands.cumsum(0)
    # Dropped rows are sent to one place behind the list.
    place = torch.where(stands, before - 1, virtual)
    rope_pos = torch.where(image[row_of.clamp(min=0)] >= 0, positions, 0)

    def listed(values: torch.Tensor, behind: int) -> torch.Tensor:
        room = torch.full((virtual + 1,), behind, dtype=torch.int32, device=values.device)
        return room.scatter_(0, place, values.int())[:virtual]

    # What stands behind the list sorts behind every live row.
    row = listed(row_of, rows)
    by_row = row.sort(stable=True)
    return QueryLists(
        row=row,
        rope_pos=listed(rope_pos, 0),
        start=torch.cat([before.new_zeros(1), before])[query_start_loc.long()].int(),
        by_row=by_row.indices.int(),
        row_start=torch.searchsorted(
            by_row.values, torch.arange(rows + 1, dtype=torch.int32, device=row.device)
        ).int(),
    )
