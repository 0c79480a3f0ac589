"""Which kernels launches would have compiled, by the keys under which Triton itself keeps compiled ones.

Triton compiles a kernel anew for other constants and types, for a tensor that begins elsewhere than at a
multiple of 16 bytes, and for an integer that is 1 or a multiple of 16. The interpreter compiles nothing, so
the keys are asked of the part of Triton that makes them for a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

PACKAGE = "vllm_hybrid."


@dataclass
class Launches:
    """Kernels of this package that were launched.

    Attributes:
        seen: name and key of each variant, in the order of their first launches.

    """

    seen: dict[str, None] = field(default_factory=dict)

    def since(self, number: int) -> list[str]:
        """The variants behind the first ``number``."""
        return list(self.seen)[number:]


@contextmanager
def noted_launches() -> Iterator[Launches]:
    """Note the launches of interpreted kernels inside."""
    launches = Launches()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith(PACKAGE):
            launches.seen[variant(self, *args, **kwargs)] = None
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield launches


def variant(kernel: Any, *args: Any, **kwargs: Any) -> str:
    """The kernel's name, and by argument what makes Triton compile it anew."""
    bound, specialization, options = _binder(kernel)(*args, **kwargs)
    said = [f"{name}={_said(*key)}" for name, key in zip(bound, specialization, strict=True)]
    return f"{kernel.fn.__name__} {' '.join(said)} {options}"


def _said(kind: str, key: Any) -> str:
    return f"{key}" if kind == "constexpr" else f"{kind}{':' + str(key) if key else ''}"


@functools.cache
def _binder(kernel: Any) -> Callable[..., tuple[dict[str, Any], list[Any], dict[str, Any]]]:
    asked = ("do_not_specialize", "do_not_specialize_on_alignment")
    function = JITFunction(kernel.fn, **{name: kernel.kwargs[name] for name in asked})
    backend = backends["nvidia"].compiler(GPUTarget("cuda", 90, 32))
    binder: Any = create_function_from_signature(function.signature, function.params, backend)
    return binder
