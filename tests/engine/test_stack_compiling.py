"""Lower and upper stack are compiled apart, and find their own graphs again in vLLM's compile cache."""

from __future__ import annotations

import pytest

from tests.support.fresh_process import answers_of

pytestmark = pytest.mark.engine
# vLLM's default depends on torch. Where nothing is compiled ahead of time, graphs are found by their tag.
WAYS: dict[str, dict[str, str]] = {"default": {}, "not ahead": {"VLLM_USE_AOT_COMPILE": "0"}}
STARTS = ("cold", "warm")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """What tests/support/compiled_stacks.py prints of each way to compile and each start over its cache."""
    environments = []
    # Compiled kernels go by their text, so both ways may have them from one place.
    inductor = str(tmp_path_factory.mktemp("inductor"))
    for way in WAYS.values():
        own = {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")), "TORCHINDUCTOR_CACHE_DIR": inductor}
        environments += [own | way] * len(STARTS)
    found = iter(answers_of("tests.support.compiled_stacks", "ERRORS ", environments))
    return {way: {start: next(found) for start in STARTS} for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_stacks_share_no_compiled_graph(errors: dict[str, dict[str, dict[str, float]]], way: str) -> None:
    for start in STARTS:
        found = errors[way][start]
        assert set(found) == {"lower", "upper", "whole"}
        assert all(error < 1e-4 for error in found.values()), (start, found)
