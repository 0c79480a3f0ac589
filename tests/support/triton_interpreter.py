"""Triton's interpreter, spared work that it does over and over.

At each launch the interpreter exchanges what `triton.language` holds for its own, and does so once more at
each call of a device function (`tl.max` is one, and so is every helper of a kernel). The second time changes
nothing, and was a third of the time that interpreted kernels took.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterError


def patch_once_a_launch() -> None:
    """Leave out what is done already, in this process, where Triton was imported with `TRITON_INTERPRET`."""
    plain = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not all(map(_is_patched, _languages(self.fn))):
            return plain(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    InterpretedFunction.__call__ = call


def _languages(function: Any) -> list[Any]:
    """The modules whose content the interpreter exchanges for a function, as it finds them."""
    modules = filter(inspect.ismodule, function.__globals__.values())
    return [module for module in modules if module in (tl, tl.core)]


def _is_patched(language: Any) -> bool:
    return not tl.core.is_builtin(language.load)
