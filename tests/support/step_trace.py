"""What a step asks of a device: the operations it issues, and every place where the host would wait.

A CPU answers at once, so nothing slow shows here; what counts is which operations a CUDA device could not
take without the host waiting for it (reading a value, finding how many elements are true), and whether two
decode steps issue the very same operations, which is what lets one captured graph stand for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# Their results have a size, or are a value, that only the device knows.
_WAITING_OPERATIONS = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_consecutive",
    "aten.unique_dim",
    "aten.equal",
    "aten.is_nonzero",
    "aten.bincount",
}
_READING_METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}

# Operations that only allocate or look at a tensor in another way: a device has nothing to run.
_FREE = {
    "aten." + name
    for name in (
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
        "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute",
        "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    )
}  # fmt: skip


@dataclass
class StepTrace:
    """What was seen.

    Attributes:
        operations: every operation in order, with the shapes and types of its tensors and its other
            arguments; kernels with their grids and constants.
        waits: names of what would have made the host wait.

    """

    operations: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    @property
    def launches(self) -> list[str]:
        """Of the operations, those that a device has to run."""
        return [one for one in self.operations if ".".join(one.split(" ")[0].split(".")[:2]) not in _FREE]


@contextmanager
def trace_step(on_host: Iterable[torch.Tensor] = ()) -> Iterator[StepTrace]:
    """Watch what runs inside.

    Args:
        on_host: tensors that lie on the host even where there is a device; reading them is free.

    """
    trace = StepTrace()
    free = HostTensors(on_host)
    with ExitStack() as stack:
        stack.enter_context(_interpreted_kernels(trace))
        stack.enter_context(_Reads(trace, free))
        stack.enter_context(_Operations(trace, free))
        yield trace


class HostTensors:
    """Tensors that lie on the host even where there is a device, and what is computed from them alone."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        # Held, so that no other tensor takes an address over.
        self._storages = {x.untyped_storage().data_ptr(): x for x in tensors}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    def add(self, results: Any) -> None:
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                self._storages[x.untyped_storage().data_ptr()] = x


class _Operations(TorchDispatchMode):
    def __init__(self, trace: StepTrace, free: HostTensors) -> None:
        super().__init__()
        self.trace, self.free = trace, free

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).rsplit(".", 1)[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if tensors and all(x in self.free for x in tensors):
            results = func(*args, **kwargs)
            self.free.add(results)
            return results
        self.trace.operations.append(f"{func} {_shapes((args, kwargs))}")
        if name in _WAITING_OPERATIONS or self._sizes_unknown(name, args, kwargs):
            self.trace.waits.append(name)
        if name.startswith("vllm."):
            # vLLM's opaque operations are Python inside; called by key, they do not come back here first.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        return func(*args, **kwargs)

    def _sizes_unknown(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in _INDEXING:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            return any(x not in self.free for x in masks)
        return name == "aten.repeat_interleave" and kwargs.get("output_size") is None


class _Reads(TorchFunctionMode):
    def __init__(self, trace: StepTrace, free: HostTensors) -> None:
        super().__init__()
        self.trace, self.free = trace, free

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING_METHODS and isinstance(args[0], torch.Tensor):
            if args[0] in self.free:
                with _disable_current_modes():
                    return func(*args, **(kwargs or {}))
            self.trace.waits.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _interpreted_kernels(trace: StepTrace) -> Iterator[None]:
    """Note Triton's kernels; what the interpreter does to run them is not the step's doing."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        constants = {name: x for name, x in kwargs.items() if not isinstance(x, torch.Tensor)}
        trace.operations.append(f"{self.__name__} {grid} {_shapes(args)} {constants}")
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield


def _shapes(arguments: Any) -> str:
    return " ".join(_written(x) for x in tree_leaves(arguments))


def _written(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{x.dtype}{tuple(x.shape)}"
    plain = isinstance(x, (bool, int, float, str, torch.dtype, torch.device, type(None)))
    # Where another object lies says nothing about the operation.
    return repr(x) if plain else type(x).__name__
