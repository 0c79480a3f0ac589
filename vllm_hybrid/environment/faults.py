"""Which failures come from what is installed, so that ``vllm-hybrid doctor`` has the remedy.

Imports nothing but Python's own: it is asked where libraries cannot be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from types import TracebackType

from vllm_hybrid.errors import abbreviated, one_line

ADVICE = "run 'vllm-hybrid doctor', which names what this environment lacks"
# Failing while one of them is imported is no fault of a program's or of its options.
_LIBRARIES = frozenset(
    ("torch", "torchaudio", "torchcodec", "torchvision", "transformers", "triton", "vllm", "vllm_flash_attn")
)
# How vLLM says that it finds neither a GPU's driver nor its own CPU build.
_NO_DEVICE = "Failed to infer device type"


def environment_fault(error: BaseException) -> str | None:
    """What this environment lacks, if that is why something failed, else None.

    Args:
        error: what was raised, with its causes and tracebacks.

    Returns:
        Half a sentence, such as "torchvision cannot be imported (RuntimeError: ...)".

    """
    # The innermost cause says what is wrong, those around it what failed in turn.
    for link in reversed(list(_chain(error))):
        if isinstance(link, PackageNotFoundError) and link.name in _LIBRARIES:
            return f"no distribution named {link.name!r} is installed"
        if _NO_DEVICE in str(link):
            return "vLLM finds no device to run on"
        library = _failed_import(link.__traceback__)
        if library is not None:
            return f"{library} cannot be imported ({type(link).__name__}: {abbreviated(one_line(link))})"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those it came from, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _failed_import(traceback: TracebackType | None) -> str | None:
    """The innermost of our libraries in whose module's own lines, not a function's, an error was raised."""
    found = None
    while traceback is not None:
        frame = traceback.tb_frame
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package in _LIBRARIES:
            found = package
        traceback = traceback.tb_next
    return found
