"""How many rows matrix products on a CPU are given.

oneDNN compiles a product for every number of rows it has not met, which takes longer than the product: with
AMX, 1757 rows by 1024 x 5632 in bf16 take 9 ms, and 16 ms more the first time. Live rows come in another
number with every picture, so they are padded to one of a few numbers, a bucket.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Decodes: a batch of them comes again and again.
_FEW = 64
_STEPS_PER_DOUBLING = 8
# Rows whose intermediate results stay small: a fresh tensor costs a page fault every 4 KiB.
_CHUNK, _PIECE = 1024, 128


def bucket_size(rows: int) -> int:
    """The least number of rows to compute for ``rows`` of them: less than an eighth more."""
    if rows <= _FEW:
        return rows
    step = (1 << (rows - 1).bit_length() - 1) // _STEPS_PER_DOUBLING
    return -(-rows // step) * step


def pad_to_bucket(picked: torch.Tensor) -> torch.Tensor:
    """An index of rows, int64 [n], with its first row again at the end up to a rounded number, on a CPU."""
    extra = bucket_size(picked.shape[0]) - picked.shape[0] if picked.is_cpu else 0
    return picked if extra == 0 else torch.cat([picked, picked[:1].expand(extra)])


def map_row_chunks(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """A function that treats every row alike; on a CPU in chunks of up to 1024 rows, a multiple of 128.

    Args:
        function: [n, C] to [n, D].
        rows: [T, C].

    Returns:
        [T, D].

    """
    if not rows.is_cpu:
        return function(rows)
    whole = rows.shape[0] // _CHUNK * _CHUNK
    done = [function(chunk) for chunk in rows[:whole].split(_CHUNK)] if whole else []
    if rows.shape[0] > whole or not done:
        rest = rows[whole:]
        done.append(function(F.pad(rest, (0, 0, 0, -rest.shape[0] % _PIECE)))[: rest.shape[0]])
    return torch.cat(done)
