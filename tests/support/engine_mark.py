"""A pytest plugin for the marker `engine`: of tests that start a vLLM engine, or a process that imports one.

`make test-fast` leaves them out. Modules that use `tests.support.engines.serve` or
`tests.support.vllm_server.Server` have the marker without saying so; others say `pytestmark =
pytest.mark.engine`, or mark single tests. In a test without it no engine starts, in this process or in one
that it starts: vLLM reads a variable while it makes an engine, and finds a sentence there that is no number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

MARK = "engine"
# Read by `EngineCore`; it is no part of what names compiled graphs, and 0 wherever nobody sets it.
VARIABLE = "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"
SENTENCE = f"a test that starts an engine needs pytest.mark.{MARK}"
_STARTERS = {"serve": "tests.support.engines", "Server": "tests.support.vllm_server"}


def starts_engines(item: pytest.Item) -> bool:
    """Whether the module of a test has a name that starts an engine."""
    module = item.getparent(pytest.Module)
    assert module is not None
    return any(
        getattr(getattr(module.obj, name, None), "__module__", None) == home
        for name, home in _STARTERS.items()
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if starts_engines(item):
            item.add_marker(MARK)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker(MARK):
        return (yield)
    os.environ[VARIABLE] = SENTENCE
    try:
        return (yield)
    finally:
        os.environ.pop(VARIABLE)
