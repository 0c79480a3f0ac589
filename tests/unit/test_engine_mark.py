"""Tests that start engines are marked, and no other test can start one."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from vllm import envs
from vllm.v1.engine.core import EngineCore

from tests.support import engines
from tests.support import vllm_server as servers
from tests.support.engine_mark import SENTENCE, VARIABLE, starts_engines


def item_of(**names: Any) -> Any:
    """A test of a module that has some names."""
    module = ModuleType("test_given")
    vars(module).update(names)
    parent = SimpleNamespace(obj=module, path=SimpleNamespace(stem="test_given"))
    return SimpleNamespace(getparent=lambda _: parent)


def test_without_the_mark_no_engine_is_made() -> None:
    # Variables are read once for all as soon as a process has an engine.
    envs.disable_envs_cache()
    with pytest.raises(ValueError, match=SENTENCE):
        EngineCore(mock.MagicMock(), mock.MagicMock(), log_stats=False)


@pytest.mark.engine
def test_with_the_mark_nothing_is_in_the_way() -> None:
    assert VARIABLE not in os.environ


def test_modules_that_use_the_helpers_have_the_mark_without_saying_so() -> None:
    assert starts_engines(item_of(serve=engines.serve))
    assert starts_engines(item_of(Server=servers.Server))
    assert not starts_engines(item_of(serve=print, Server=str, checkpoint=engines.checkpoint))
