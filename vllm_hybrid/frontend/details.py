"""OpenAI's ``detail`` of a picture, on its way from a part of a chat message to the input processor.

vLLM takes a message apart into text and pictures and forgets what else a part says. Here the details of a
conversation's pictures travel with their uuids as far as the model's processor, and from there in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError

from vllm_hybrid.checkpoint.llava import ARCHITECTURE
from vllm_hybrid.levels import AUTO, Level, Levels, shortened
from vllm_hybrid.startup.settings import hybrid_config

# Key of the details beside the uuids of a prompt's pictures, and of the processed prompt.
DETAILS = "vllm_hybrid_details"
# What a part of a message calls it.
DETAIL = "detail"
_PICTURES = ("image", "image_embeds")

# The details of the conversations that are being taken apart, one for each picture.
_noted: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def install() -> None:
    """Have vLLM keep the details of pictures in messages to our architecture."""
    # Not at the top: only processes that read messages need it.
    from vllm.renderers import chat_utils

    module, name = _part_parser(chat_utils)
    parse = getattr(module, name)
    if getattr(parse, "notes_detail", False):
        return
    setattr(module, name, _noting_detail(parse))
    single, several = chat_utils.MultiModalItemTracker, chat_utils.AsyncMultiModalItemTracker
    single.resolve_items = _telling_details(single.resolve_items)
    several.resolve_items = _telling_details_async(several.resolve_items)


def _part_parser(chat_utils: Any) -> tuple[Any, str]:
    """Where vLLM keeps what reads a part of a message: from 0.33 on a file of its own."""
    if hasattr(chat_utils, "chat_message"):
        return chat_utils.chat_message, "parse_chat_message_content_part"
    return chat_utils, "_parse_chat_message_content_part"


def levels_of(model_config: ModelConfig) -> Levels | None:
    """The levels of a model; None where nothing is reduced, or the model is not ours."""
    if model_config.architecture != ARCHITECTURE:
        return None
    hybrid = hybrid_config(model_config.hf_config)
    return hybrid.levels if hybrid.active else None


def level_said(meaning: Callable[[object, str], Level], said: object, parameter: str) -> Level:
    """The level that a request says.

    Args:
        meaning: gives it, :meth:`Levels.of_detail` or :meth:`Levels.asked`.
        said: what the request says.
        parameter: where it says so.

    Raises:
        VLLMValidationError: it means no level; the sentence lists what may be said.

    """
    try:
        return meaning(said, parameter)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=parameter, value=shortened(said)) from None


def detail_of(part: Any) -> Any:
    """What a part of a message says about the detail of its picture; None where it says nothing."""
    if not isinstance(part, dict):
        return None
    image = part.get("image_url")
    inside = image.get(DETAIL) if isinstance(image, dict) else None
    return part.get(DETAIL) if inside is None else inside


def _without_detail(part: Any) -> Any:
    """A part as vLLM may see it: it takes no ``detail`` but OpenAI's."""
    if not isinstance(part, dict):
        return part
    part = {**part, DETAIL: AUTO} if DETAIL in part else part
    if isinstance(image := part.get("image_url"), dict) and DETAIL in image:
        part = {**part, "image_url": {key: value for key, value in image.items() if key != DETAIL}}
    return part


def _noting_detail(parse: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(part: Any, mm_parser: Any, **options: Any) -> Any:
        if mm_parser.model_config.architecture != ARCHITECTURE:
            return parse(part, mm_parser, **options)
        tracker = mm_parser._tracker
        before = _pictures(tracker)
        parsed = parse(_without_detail(part), mm_parser, **options)
        if _pictures(tracker) > before:
            _noted.setdefault(tracker, []).append(detail_of(part))
        return parsed

    wrapped.notes_detail = True  # type: ignore[attr-defined]
    return wrapped


def _pictures(tracker: Any) -> int:
    return sum(len(tracker._items_by_modality.get(modality, ())) for modality in _PICTURES)


def _telling_details(resolve_items: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(self: Any) -> Any:
        data, uuids = resolve_items(self)
        return data, _with_details(self, uuids)

    return wrapped


def _telling_details_async(resolve_items: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def wrapped(self: Any) -> Any:
        data, uuids = await resolve_items(self)
        return data, _with_details(self, uuids)

    return wrapped


def _with_details(tracker: Any, uuids: dict[str, Any] | None) -> dict[str, Any] | None:
    """The uuids of a conversation's pictures, with the details that were noted beside them.

    Raises:
        VLLMValidationError: a detail means no level. The pictures are not processed yet, so that no cache
            knows them, and a stream can still be refused as a whole.

    """
    details = _noted.pop(tracker, [])
    if uuids is None or all(detail is None for detail in details):
        return uuids
    levels = levels_of(tracker.model_config)
    if levels is None:
        return uuids
    for detail in details:
        level_said(levels.of_detail, detail, DETAIL)
    return {**uuids, DETAILS: details}
