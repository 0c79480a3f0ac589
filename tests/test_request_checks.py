"""Requests for scores of prompt rows are refused while image tokens are reduced, whatever asks for them."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_hybrid import request_checks


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(request_checks._state, "active", True)


@pytest.mark.parametrize(
    ("asks", "sentence"),
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs=0 is not supported"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1 is not supported"),
        (
            {"prompt_logprob_token_ids": [[1, 2], [3, 4]]},
            r"prompt_logprob_token_ids=\[\[1,? 2\],? \[3,? 4\]\] is",
        ),
        ({"prompt_logprob_token_ids": [[7] * 9] * 500}, r"prompt_logprob_token_ids=.{1,60} is not supported"),
    ],
)
def test_scores_of_prompt_rows_are_refused(active: None, asks: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VLLMValidationError, match=sentence) as refused:
        request_checks.check_request(SamplingParams(**asks))
    assert refused.value.parameter == next(iter(asks))
    assert len(str(refused.value)) < 300


def test_scores_of_answers_are_served(active: None) -> None:
    request_checks.check_request(SamplingParams(logprobs=5, logprob_token_ids=[1, 2]))


def test_a_server_that_reduces_nothing_scores_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine that an earlier test started in this process has switched the check on.
    monkeypatch.setitem(request_checks._state, "active", False)
    request_checks.check_request(SamplingParams(prompt_logprobs=1))


def test_every_parameter_that_scores_the_prompt_is_known() -> None:
    """A vLLM that brings another one has to be looked at."""
    scores = {name for name in SamplingParams.__struct_fields__ if name.startswith("prompt_logprob")}
    assert scores - {"prompt_logprob_start"} == set(request_checks.PROMPT_SCORES)
