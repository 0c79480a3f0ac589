"""Requests that reduced image tokens cannot answer are refused with a 400, one sentence each."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

# Sampling parameters that ask for scores of prompt rows.
PROMPT_SCORES = ("prompt_logprobs", "prompt_logprob_token_ids")

_state = {"active": False}


def activate() -> None:
    """Check the requests of this process from here on: its server reduces image tokens."""
    _state["active"] = True


def check_request(params: Any) -> None:
    """Refuse what cannot be computed.

    Raises:
        VLLMValidationError: the request asks for log-probabilities of its prompt; vLLM answers with a 400.

    """
    if not _state["active"] or not isinstance(params, SamplingParams):
        return
    for name in PROMPT_SCORES:
        if (asked := getattr(params, name)) is not None:
            value = _short(asked)
            raise VLLMValidationError(
                f"{name}={value} is not supported with reduced image tokens, because dropped rows "
                "have no log-probabilities; leave it out",
                parameter=name,
                value=value,
            )


def _short(value: Any) -> str:
    """A value as a sentence shows it: scores may be asked for by thousands of numbers."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def install() -> None:
    """Put the check behind vLLM's per-platform one, the only per-request check a plugin can reach."""
    platform_check = current_platform.validate_request
    if getattr(platform_check, "checks_hybrid", False):
        return

    def validate_request(processed_inputs: Any, params: Any) -> None:
        platform_check(processed_inputs, params)
        check_request(params)

    validate_request.checks_hybrid = True  # type: ignore[attr-defined]
    current_platform.validate_request = validate_request
