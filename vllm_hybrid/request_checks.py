"""Requests that reduced image tokens cannot answer are refused with a 400, one sentence each."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

_state = {"active": False}


def activate() -> None:
    """Check the requests of this process from here on: its server reduces image tokens."""
    _state["active"] = True


def check_request(params: Any) -> None:
    """Refuse what cannot be computed.

    Raises:
        VLLMValidationError: the request asks for prompt log-probabilities; vLLM answers with a 400.

    """
    if _state["active"] and isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
        raise VLLMValidationError(
            f"prompt_logprobs={params.prompt_logprobs} is not supported with reduced image tokens, because "
            "dropped rows have no log-probabilities; leave it out",
            parameter="prompt_logprobs",
            value=params.prompt_logprobs,
        )


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
