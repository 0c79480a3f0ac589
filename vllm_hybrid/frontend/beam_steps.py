"""Steps of a beam search: which of a step's prompt tokens are the prompt's, not the beam's.

vLLM sends each step of each beam as a request of its own, whose prompt ends in tokens that the beam chose.
What is dropped of an image is the prompt's choice, so the scheduler has to know where the prompt ended.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from vllm_hybrid.frontend.details import DETAILS
from vllm_hybrid.frontend.extra_arguments import said_to_engine
from vllm_hybrid.levels import REQUEST_LEVEL

# Key of a prompt on its way to the input processor, and of a request's extra arguments from there on.
PROMPT_TOKENS = "vllm_hybrid_prompt_tokens"


def install() -> None:
    """Have the prompt of every beam's step say how long the searched prompt was, and its pictures' levels."""
    # Not at the top: the scheduler, which asks what is said, loads nothing of the API server.
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

    get_prompt = BeamSearchSequence.get_prompt
    if getattr(get_prompt, "says_prompt_tokens", False):
        return
    BeamSearchSequence.get_prompt = _saying_prompt_tokens(get_prompt)


def _saying_prompt_tokens(get_prompt: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(self: Any) -> Any:
        prompt = get_prompt(self)
        if prompt["type"] == "multimodal":
            prompt[PROMPT_TOKENS] = len(self.orig_prompt["prompt_token_ids"])
            said = {key: self.orig_prompt[key] for key in (DETAILS, REQUEST_LEVEL) if key in self.orig_prompt}
            prompt.update(said)
        return prompt

    wrapped.says_prompt_tokens = True  # type: ignore[attr-defined]
    return wrapped


def note_prompt_tokens(request: EngineCoreRequest, prompt: Any) -> None:
    """Carry what a beam's step says about its prompt into the request.

    Args:
        request: the request made of the prompt; it is changed. What a client wrote there is removed.
        prompt: the prompt as the input processor got it.

    """
    if request.sampling_params is None:
        return
    count = prompt.get(PROMPT_TOKENS) if isinstance(prompt, dict) else None
    extra = dict(request.sampling_params.extra_args or {})
    if count is None and PROMPT_TOKENS not in extra:
        return
    extra.pop(PROMPT_TOKENS, None)
    if count is not None:
        extra[PROMPT_TOKENS] = count
    # The steps of all beams share their parameters.
    request.sampling_params = copy.copy(request.sampling_params)
    request.sampling_params.extra_args = extra or None


def prompt_tokens(request: Request) -> int:
    """Length of a request's prompt in tokens, without what a beam search has appended to it."""
    return int(said_to_engine(request.sampling_params, PROMPT_TOKENS, request.num_prompt_tokens))
