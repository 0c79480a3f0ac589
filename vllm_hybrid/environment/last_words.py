"""What a process says last when it ends before it serves: one sentence.

vLLM raises what a plugin's hooks raise, through pydantic and an event loop, so that a sentence would stand at
the end of fifty lines, wrapped in the arguments of a constructor. Here the sentence is logged before it is
raised, and an exception that ends the process is answered with the sentence alone. Programs other than
vLLM's own keep their traceback: it says where they called vLLM.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from vllm_hybrid.environment.faults import ADVICE, environment_fault
from vllm_hybrid.errors import one_line

# Below vLLM's, whose handler shows it.
logger = logging.getLogger(f"vllm.{__name__}")

P = ParamSpec("P")
R = TypeVar("R")
_refusals: list[str] = []


def announced(check: Callable[P, R]) -> Callable[P, R]:
    """A check whose ValueError is logged, and is the last that a process says which ends of it."""

    @functools.wraps(check)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return check(*args, **kwargs)
        except ValueError as error:
            _announce(one_line(error))
            raise

    return checked


def _announce(sentence: str) -> None:
    """Log a refusal, once a process, and have it said at the process's end."""
    say_last_words()
    if sentence not in _refusals:
        _refusals.append(sentence)
        logger.error("vllm-hybrid: %s", sentence)


def last_words(error: BaseException) -> str | None:
    """The sentence for an exception that ends a process: a refusal of ours, or what the environment lacks.

    Returns:
        The sentence; None for any other exception.

    """
    said = one_line(error)
    for sentence in _refusals:
        if sentence in said:
            return sentence
    fault = environment_fault(error)
    return None if fault is None else f"{fault}; {ADVICE}"


def say_last_words() -> None:
    """Have this process end with its last words, where there are any, in place of a traceback."""
    before = sys.excepthook
    if getattr(before, "says_last_words", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sentence = last_words(error)
        if sentence is None or not _is_vllms_program():
            before(kind, error, traceback)
        if sentence is not None:
            print(f"vllm-hybrid: error: {sentence}", file=sys.stderr)

    hook.says_last_words = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _is_vllms_program() -> bool:
    """Whether the process is the command ``vllm`` or a module of vLLM's run as a program."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = "" if spec is None else spec.name
    return Path(sys.argv[0]).name == "vllm" or module.partition(".")[0] == "vllm"
