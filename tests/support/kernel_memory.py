"""Holds interpreted Triton kernels to the memory of their own arguments.

Triton's interpreter reads and writes wherever a pointer leads, as a GPU does; a stray one shows as a crash
now and then, or not at all. Inside :func:`watched` every access is looked up in the tensors of the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor and the one behind its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + ((last + 1) * tensor.element_size() if tensor.numel() else 0)


@contextmanager
def watched() -> Iterator[None]:
    """Raise AssertionError where a kernel reads or writes outside the tensors it was launched with."""
    extents: list[tuple[int, int]] = []
    launch, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        extents[:] = [_extent(x) for x in tensors]
        return launch(self, *args, **kwargs)

    def look_up(pointers: Any, mask: Any, what: str) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        inside = np.zeros(touched.shape, dtype=bool)
        for begin, end in extents:
            inside |= (touched >= begin) & (touched + size <= end)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} {what} lie outside the kernel's arguments"

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        look_up(pointers, mask, "reads")
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        look_up(pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", launched),
        mock.patch.object(InterpreterBuilder, "create_masked_load", watched_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", watched_store),
    ):
        yield
