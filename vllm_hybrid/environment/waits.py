"""Lines around what a start may take long for, so that no server is silent without a reason."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Below vLLM's, whose handler shows it.
logger = logging.getLogger(f"vllm.{__name__}")


@contextmanager
def announced_wait(what: str) -> Iterator[None]:
    """Log what is being done before it is begun, and how long it took when it is done.

    Args:
        what: it, as "compiling the kernels".

    """
    logger.info("vllm-hybrid: %s", what)
    began = time.monotonic()
    yield
    logger.info("vllm-hybrid: done in %.1f s: %s", time.monotonic() - began, what)
