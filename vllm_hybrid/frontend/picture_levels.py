"""At which level a request's pictures are served: what was asked for, and how the engine is told.

The level becomes part of a picture's identifier. So a picture at two levels is two pictures to whatever goes
by identifiers: the encoder cache, the prefix cache, live counts. The cache of processed pictures goes by the
hash of their content instead: a picture's pixels are the same at all levels, and are kept once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)
from vllm.v1.engine import EngineCoreRequest

from vllm_hybrid.frontend.details import DETAIL, DETAILS, level_said, levels_of
from vllm_hybrid.frontend.extra_arguments import said_to_engine, said_to_server
from vllm_hybrid.levels import REQUEST_LEVEL, Level, Levels

# The model's argument that carries the number of each picture's level.
LEVEL_NUMBER = "hybrid_level_number"
_MARK = "@"


def install() -> None:
    """Have the prompts of the server's chat requests say at which level the request wants its pictures.

    A beam search does not pass on what else a request says.
    """
    # Not at the top: the scheduler, which asks for levels, loads nothing of the API server.
    from vllm.renderers.chat_utils import has_non_text_content
    from vllm.renderers.online_renderer import OnlineRenderer

    preprocess_chat = OnlineRenderer.preprocess_chat
    if not getattr(preprocess_chat, "says_level", False):
        OnlineRenderer.preprocess_chat = _saying_level(preprocess_chat, has_non_text_content)


def _saying_level(
    preprocess_chat: Callable[..., Awaitable[Any]], has_pictures: Callable[[Any], bool]
) -> Callable[..., Awaitable[Any]]:
    async def wrapped(self: Any, request: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        asked = said_to_server(request, REQUEST_LEVEL)
        levels = levels_of(self.model_config) if asked is not None else None
        if levels is not None and has_pictures(messages):
            # Before any picture is fetched, and while a stream can still be refused as a whole.
            level_said(levels.asked, asked, REQUEST_LEVEL)
        conversation, prompts = await preprocess_chat(self, request, messages, *args, **kwargs)
        for prompt in prompts:
            if levels is not None and prompt["type"] == "multimodal":
                prompt[REQUEST_LEVEL] = asked
        return conversation, prompts

    wrapped.says_level = True  # type: ignore[attr-defined]
    return wrapped


def choose_levels(request: EngineCoreRequest, prompt: Any, levels: Levels) -> None:
    """Give each of a request's pictures the level that was asked for.

    What a request says for all its pictures goes before the ``detail`` of each.

    Args:
        request: the request made of the prompt; the identifiers of its pictures are changed.
        prompt: the prompt as the input processor got it.
        levels: the model's.

    Raises:
        VLLMValidationError: a level or detail is not known; the sentence lists what is.

    """
    features = request.mm_features
    if not features:
        return
    asked = said_to_engine(request.sampling_params, REQUEST_LEVEL)
    said = prompt if isinstance(prompt, dict) else {}
    asked = said.get(REQUEST_LEVEL) if asked is None else asked
    details = said.get(DETAILS) or [None] * len(features)
    for feature, detail in zip(features, details, strict=True):
        if asked is None:
            level = level_said(levels.of_detail, detail, DETAIL)
        else:
            level = level_said(levels.asked, asked, REQUEST_LEVEL)
        feature.identifier = identifier_at(feature.identifier, level)


def identifier_at(identifier: str, level: Level) -> str:
    """The identifier of a picture at a level."""
    return f"{identifier}{_MARK}{level.name}"


def level_of(identifier: str, levels: Levels) -> Level:
    """The level of the picture that an identifier is of; one that says none is at the default level."""
    _, mark, name = identifier.rpartition(_MARK)
    return levels.named(name) if mark and name in levels.names else levels.default


def tell_level(feature: MultiModalFeatureSpec, levels: Levels) -> None:
    """Have the model that encodes a picture get the number of its level.

    Args:
        feature: the picture; its data is replaced, not written to, since other requests may share it.
        levels: the model's.

    """
    if feature.data is None:
        return
    number = levels.number(level_of(feature.identifier, levels).name)
    told = MultiModalFieldElem(data=number, field=MultiModalBatchedField())
    feature.data = MultiModalKwargsItem({**feature.data, LEVEL_NUMBER: told})
