"""Triton's interpreter, spared work that it does over and over.

- At each launch the interpreter exchanges what `triton.language` holds for its own, and does so once more at
  each call of a device function (`tl.max` is one, and so is every helper of a kernel). The second time
  changes nothing.
- For each sum, difference and product of 32-bit integers it computes by twelve interpreted operations whether
  they overflow, and looks at the result only where kernels are debugged; compilers leave it out elsewhere.
- It makes the type of a block anew for each operation, with its name and shape, and a table of all of NumPy's
  types to look one up in; both are of few kinds.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterError,
    interpreter_builder,
)


def spare_repeated_work() -> None:
    """Leave it out in this process, where Triton was imported with `TRITON_INTERPRET`."""
    _exchange_language_once_a_launch()
    _drop_sums_that_nobody_reads()
    _keep_types_of_blocks()
    _keep_types_of_numpy()


def _exchange_language_once_a_launch() -> None:
    plain = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(map(_is_patched, _languages(self.fn))):
            return plain(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    InterpretedFunction.__call__ = call


@functools.cache
def _languages(function: Any) -> list[Any]:
    """The modules whose content the interpreter exchanges for a function, as it finds them."""
    modules = filter(inspect.ismodule, function.__globals__.values())
    return [module for module in modules if module in (tl, tl.core)]


def _is_patched(language: Any) -> bool:
    return not tl.core.is_builtin(language.load)


def _drop_sums_that_nobody_reads() -> None:
    options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    interpreter_builder.options = options


def _keep_types_of_blocks() -> None:
    kept: dict[tuple[Any, ...], Any] = {}

    def kept_type(element: Any, shape: Any) -> Any:
        # Pointers cannot be hashed, and their names do not say where they point.
        key = (type(element), str(element), getattr(element, "address_space", None), *shape)
        if key not in kept:
            kept[key] = tl.block_type(element, list(shape))
        return kept[key]

    tl.block_type.with_element_ty = lambda self, element: kept_type(element, self.shape)
    InterpreterBuilder.get_block_ty = lambda self, element, shape: kept_type(element, shape)


def _keep_types_of_numpy() -> None:
    look_up = interpreter._get_np_dtype
    kept: dict[str, Any] = {}

    def kept_type(kind: Any) -> Any:
        if kind.name not in kept:
            kept[kind.name] = look_up(kind)
        return kept[kind.name]

    interpreter._get_np_dtype = kept_type
