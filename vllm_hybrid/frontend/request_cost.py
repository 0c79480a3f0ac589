"""What a request cost, told in its response where the request asks for it.

The engine's answer travels in ``kv_transfer_params``, the open mapping that vLLM has in the responses of all
its APIs and in offline outputs; KV transfer itself is refused. vLLM leaves it out of streamed chat
completions, so there it is added to the chunk that ends a choice.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_hybrid.frontend.extra_arguments import said_to_engine, said_to_server
from vllm_hybrid.levels import shortened

# The extra argument of a request that asks for its cost, in ``vllm_xargs``.
ASKS_COST = "hybrid_cost"
# Key of the cost in ``kv_transfer_params``.
COST = "hybrid"
FIELD = "kv_transfer_params"


def install() -> None:
    """Have streamed chat completions tell costs that were asked for."""
    # Not at the top: the scheduler, which asks who asks, loads nothing of the API server.
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    stream = OpenAIServingChat.chat_completion_stream_generator
    if not getattr(stream, "tells_cost", False):
        OpenAIServingChat.chat_completion_stream_generator = _telling_cost(stream)


def asks_cost(params: SamplingParams | None) -> bool:
    """Whether a request asks for its cost."""
    return bool(said_to_engine(params, ASKS_COST))


def check_asks_cost(params: SamplingParams | None) -> None:
    """Refuse what does not say whether the cost is asked for.

    Raises:
        VLLMValidationError: the value is neither 0 nor 1, false nor true.

    """
    said = said_to_engine(params, ASKS_COST, 0)
    if said not in (0, 1):
        value = shortened(said)
        sentence = f"{ASKS_COST} is {value}; give 1 to have the response tell what it cost, or leave it out"
        raise VLLMValidationError(sentence, parameter=ASKS_COST, value=value)


def _telling_cost(stream: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    async def wrapped(
        self: Any, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        told: dict[str, Any] = {}

        async def noted() -> AsyncIterator[Any]:
            async for output in result_generator:
                if output.kv_transfer_params and COST in output.kv_transfer_params:
                    told[FIELD] = output.kv_transfer_params
                yield output

        asked = bool(said_to_server(request, ASKS_COST))
        async for data in stream(self, request, noted() if asked else result_generator, *args, **kwargs):
            yield _with_cost(data, told) if told else data

    wrapped.tells_cost = True  # type: ignore[attr-defined]
    return wrapped


def _with_cost(data: str, told: dict[str, Any]) -> str:
    """A server-sent event with the cost, where it is the chunk that ends a choice."""
    prefix = "data: {"
    if not data.startswith(prefix):
        return data
    chunk = json.loads(data.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
        return data
    return f"data: {json.dumps(chunk | told, ensure_ascii=False)}\n\n"
