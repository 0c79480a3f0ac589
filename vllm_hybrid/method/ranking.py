"""Where images are ranked: the position whose attention says which image tokens the upper layers keep.

FastV ranks by the prompt's last position (arXiv 2403.06764, section 4.1). In a conversation that is another
one in each turn, so the first *assistant header* behind an image may rank it instead: the token ids with
which an assistant's turn begins.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def ranking_positions(
    token_ids: Sequence[int], image_ends: Sequence[int], header: Sequence[int], prompt_end: int
) -> list[int]:
    """The position that ranks each image of a prompt.

    Args:
        token_ids: of the prompt, one for each position; what stands behind ``prompt_end`` does not count.
        image_ends: one past the last position of each image.
        header: token ids of an assistant header; empty where the prompt's end ranks.
        prompt_end: one past the prompt's last position.

    Returns:
        For each image the last position of the first header that lies wholly in
        ``image_end .. prompt_end - 1``, else ``prompt_end - 1``.

    """
    starts = _header_starts(token_ids, header, min(image_ends, default=prompt_end), prompt_end)
    firsts = [bisect_left(starts, end) for end in image_ends]
    return [starts[i] + len(header) - 1 if i < len(starts) else prompt_end - 1 for i in firsts]


def _header_starts(token_ids: Sequence[int], header: Sequence[int], begin: int, end: int) -> list[int]:
    """Positions where a header begins that lies wholly in ``begin .. end - 1``, ascending."""
    if not header:
        return []
    first, wanted = header[0], list(header)
    candidates = (i for i in range(begin, end - len(wanted) + 1) if token_ids[i] == first)
    return [i for i in candidates if list(token_ids[i : i + len(wanted)]) == wanted]


def header_end_rows(token_ids: torch.Tensor, image_ends: torch.Tensor, header: torch.Tensor) -> torch.Tensor:
    """The row at which the first header behind each image ends; the host does not wait for the device.

    Args:
        token_ids: int [N], of the rows of a step.
        image_ends: int64 [images], one past the last row of each image.
        header: int64 [tokens], token ids of an assistant header, at least one.

    Returns:
        int64 [images]; N where no header begins at or behind the image's end. Where one request's rows end
        does not count: a row behind that is another request's.

    """
    rows, length = token_ids.shape[0], header.shape[0]
    if rows < length:
        return torch.full_like(image_ends, rows)
    begins = (token_ids.unfold(0, length, 1) == header).all(dim=1)
    headers = begins.cumsum(0)
    before = F.pad(headers, (1, 0))[image_ends.clamp(max=begins.shape[0])]
    first = torch.searchsorted(headers, before + 1)
    return torch.where(first < begins.shape[0], first + length - 1, rows)
