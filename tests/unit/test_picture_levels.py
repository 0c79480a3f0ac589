"""At which level a picture is served: what a request says, on its way to the identifier, and from there on.

Input processors are made as an API server makes them; no engine is started.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.renderers import ChatParams, chat_utils
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.configurations import configure
from tests.support.engines import STOCK
from tests.support.tiny_checkpoints import make_images
from vllm_hybrid.frontend import details, picture_levels
from vllm_hybrid.frontend.details import DETAILS, detail_of
from vllm_hybrid.frontend.picture_levels import (
    LEVEL_NUMBER,
    REQUEST_LEVEL,
    choose_levels,
    level_of,
    tell_level,
)
from vllm_hybrid.levels import Levels, parse_levels

SECTION: dict[str, Any] = {
    "levels": {"low": {"fastv_ratio": 0.75}, "high": {"fastv_ratio": 0.25}},
    "default_level": "high",
    "detail": {"thumbnail": "low"},
}
LEVELS = parse_levels(SECTION, 3)
PICTURES = list(make_images(3).values())


def picture(identifier: str, **data: Any) -> MultiModalFeatureSpec:
    field = MultiModalBatchedField()
    elements = {name: MultiModalFieldElem(data=value, field=field) for name, value in data.items()}
    item = MultiModalKwargsItem(elements) if elements else None
    return MultiModalFeatureSpec(item, "image", identifier, PlaceholderRange(0, 576))


def request(names: list[str], extra: dict[str, Any] | None = None) -> EngineCoreRequest:
    params = SamplingParams(extra_args=extra)
    return EngineCoreRequest(
        "a request", [1], [picture(n) for n in names], params, None, 0.0, None, None, None
    )


def chosen(
    names: list[str],
    extra: dict[str, Any] | None = None,
    said: dict[str, Any] | None = None,
    levels: Levels = LEVELS,
) -> list[str]:
    """The identifiers of a request's pictures, which began as these names."""
    asked = request(names, extra)
    choose_levels(asked, {"type": "multimodal"} | (said or {}), levels)
    return [feature.identifier for feature in asked.mm_features or []]


# ---- identifiers ----------------------------------------------------------------------------------


def test_pictures_for_which_nothing_is_asked_are_at_the_default_level() -> None:
    assert chosen(["a", "b"]) == ["a@high", "b@high"]
    by_full = parse_levels(SECTION | {"level": "full"}, 3)
    assert chosen(["a"], levels=by_full) == ["a@full"]


def test_each_picture_is_at_the_level_that_its_detail_means() -> None:
    given = {"low": "low", "high": "high", "full": "full", "original": "full", "thumbnail": "low"}
    names = [f"picture-{number}" for number in range(len(given) + 2)]
    wanted = [f"{name}@{level}" for name, level in zip(names, [*given.values(), "high", "high"], strict=True)]
    assert chosen(names, said={DETAILS: [*given, "auto", None]}) == wanted


@pytest.mark.parametrize("said_in", ["request", "prompt"])
def test_what_a_request_says_of_all_its_pictures_goes_before_their_details(said_in: str) -> None:
    for level in LEVELS.names:
        extra = {REQUEST_LEVEL: level} if said_in == "request" else {"other": 1}
        prompt = {REQUEST_LEVEL: level} if said_in == "prompt" else {}
        # Not even an unknown detail counts then.
        said = {DETAILS: ["low", "mid"]} | prompt
        assert chosen(["a", "b"], extra, said) == [f"a@{level}", f"b@{level}"]


def test_requests_without_pictures_or_sampling_parameters_are_left_alone() -> None:
    assert chosen([], {REQUEST_LEVEL: "low"}) == []
    asked = request(["a"])
    asked.sampling_params = None
    choose_levels(asked, "a prompt", LEVELS)
    assert asked.mm_features is not None and asked.mm_features[0].identifier == "a@high"


@pytest.mark.parametrize(
    ("said", "parameter", "value", "sentence"),
    [
        ({DETAILS: [None, "mid"]}, "detail", "mid", "which means no level; use auto, "),
        ({DETAILS: ["low", 7]}, "detail", 7, "detail is 7, which means no level"),
        ({REQUEST_LEVEL: "mid"}, REQUEST_LEVEL, "mid", "is 'mid', which is no level; use low, high or full"),
        ({REQUEST_LEVEL: "auto"}, REQUEST_LEVEL, "auto", "which is no level; use low, high or full"),
        ({REQUEST_LEVEL: 0}, REQUEST_LEVEL, 0, "hybrid_level is 0, which is no level"),
    ],
)
def test_what_means_no_level_is_the_client_s_mistake(
    said: dict[str, Any], parameter: str, value: object, sentence: str
) -> None:
    with pytest.raises(VLLMValidationError, match=sentence) as refused:
        chosen(["a", "b"], said=said)
    assert (refused.value.parameter, refused.value.value) == (parameter, repr(value))
    for name in LEVELS.names:
        assert name in str(refused.value)


def test_an_unknown_level_in_the_request_s_arguments_is_refused() -> None:
    with pytest.raises(VLLMValidationError, match="hybrid_level is 'mid', which is no level; use low"):
        chosen(["a"], {REQUEST_LEVEL: "mid"})


def test_the_level_of_an_identifier() -> None:
    for identifier, name in {
        "cat@low": "low",
        "cat@full": "full",
        "cat@low@full": "full",
        "cat": "high",
        "low": "high",
        "full": "high",
        "cat@mid": "high",
        "cat@low@mid": "high",
        "@": "high",
        "": "high",
    }.items():
        assert level_of(identifier, LEVELS).name == name, identifier


def test_a_picture_s_own_name_never_says_its_level(draw: random.Random) -> None:
    """Whatever clients call their pictures: different pictures or levels are different identifiers."""
    parts = ["cat", "@", "@low", "@high", "@full", "low", "@mid", "/"]
    names = {"".join(draw.choices(parts, k=draw.randrange(1, 5))) for _ in range(50)} | {"cat", "cat@low"}
    seen = set()
    for name, level in itertools.product(names, LEVELS.names):
        (identifier,) = chosen([name], {REQUEST_LEVEL: level})
        assert level_of(identifier, LEVELS).name == level
        seen.add(identifier)
    assert len(seen) == len(names) * len(LEVELS.names)


# ---- the model ------------------------------------------------------------------------------------


def test_the_model_gets_the_numbers_of_a_batch_in_its_order(draw: random.Random) -> None:
    names = [draw.choice(["@low", "@high", "@full", "", "@mid"]) for _ in range(9)]
    features = [picture(f"{n}{name}", pixel_values=torch.full((3, 2, 2), n)) for n, name in enumerate(names)]
    for feature in features:
        tell_level(feature, LEVELS)
    batches = list(group_and_batch_mm_kwargs([("image", f.data) for f in features if f.data is not None]))
    assert len(batches) == 1
    given = batches[0][2]
    numbers = {"@low": 0, "@high": 1, "@full": 2, "": 1, "@mid": 1}
    assert list(given[LEVEL_NUMBER]) == [numbers[name] for name in names]
    assert given["pixel_values"][:, 0, 0, 0].tolist() == list(range(9))


def test_what_other_requests_share_is_not_written_to() -> None:
    feature = picture("cat@low", pixel_values=torch.zeros(3, 2, 2))
    shared = feature.data
    assert shared is not None
    tell_level(feature, LEVELS)
    # A preempted request comes again.
    tell_level(feature, LEVELS)
    assert list(shared) == ["pixel_values"]
    assert feature.data is not None and set(feature.data) == {"pixel_values", LEVEL_NUMBER}
    assert feature.data["pixel_values"] is shared["pixel_values"]


def test_a_picture_whose_data_is_elsewhere_stays_so() -> None:
    feature = picture("cat@low")
    tell_level(feature, LEVELS)
    assert feature.data is None


# ---- messages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors() -> Iterator[dict[str, InputProcessor]]:
    made = {"ours": InputProcessor(configure(SECTION)), "stock": InputProcessor(configure(None, STOCK))}
    yield made
    for processor in made.values():
        processor.renderer.shutdown()


@pytest.fixture
def ours(processors: dict[str, InputProcessor]) -> InputProcessor:
    return processors["ours"]


def url_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


URL = url_of(PICTURES[0])
TEXT: dict[str, Any] = {"type": "text", "text": "What is here?"}
# Parts of messages that say a detail wherever OpenAI's interfaces, and vLLM's, have a place for it.
PARTS: dict[str, dict[str, Any]] = {
    "low": {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
    "full": {"type": "image_url", "image_url": {"url": URL}, "detail": "full"},
    "original": {"type": "input_image", "image_url": URL, "detail": "original"},
    "thumbnail": {"type": "image_pil", "image_pil": PICTURES[1], "detail": "thumbnail"},
    "auto": {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
    "none": {"type": "image_url", "image_url": {"url": URL}},
    "bare": {"image_url": URL},
}
MEANT = {"low": "low", "full": "full", "original": "full", "thumbnail": "low"}


def rendered(processor: InputProcessor, *messages: list[dict[str, Any]]) -> Any:
    """A conversation, given by the parts of its messages, as the server hands it to the input processor."""
    conversation: Any = [{"role": "user", "content": parts} for parts in messages]
    (prompt,) = processor.renderer.render_chat([conversation], ChatParams())[1]
    return prompt


def identifiers(processor: InputProcessor, prompt: Any, **extra: Any) -> list[str]:
    params = SamplingParams(max_tokens=4, extra_args=extra or None)
    made = processor.process_inputs("a request", prompt, params, ("generate",))
    return [feature.identifier for feature in made.mm_features or []]


def asked_of(found: list[str]) -> list[str]:
    return [identifier.rpartition("@")[2] for identifier in found]


@pytest.mark.parametrize("name", PARTS)
def test_a_detail_reaches_the_picture_s_identifier(ours: InputProcessor, name: str) -> None:
    prompt = rendered(ours, [TEXT, PARTS[name]])
    assert asked_of(identifiers(ours, prompt)) == [MEANT.get(name, "high")]
    # And what was asked for is not in the way of a second request made of the same prompt.
    assert asked_of(identifiers(ours, prompt)) == [MEANT.get(name, "high")]


def test_details_stay_with_their_pictures(ours: InputProcessor, draw: random.Random) -> None:
    for _ in range(10):
        messages, wanted = list[list[dict[str, Any]]](), list[str]()
        for count in draw.choice([[3], [1, 2], [2, 0, 1], [0, 1, 1]]):
            names = draw.choices(list(PARTS), k=count)
            wanted += [MEANT.get(name, "high") for name in names]
            parts = [PARTS[name] for name in names]
            parts.insert(draw.randrange(len(parts) + 1), TEXT)
            messages.append(parts)
        assert asked_of(identifiers(ours, rendered(ours, *messages))) == wanted


def test_messages_that_are_read_at_the_same_time_keep_their_details_apart(ours: InputProcessor) -> None:
    async def all_of(names: list[str]) -> list[Any]:
        conversations: list[Any] = [[{"role": "user", "content": [TEXT, PARTS[name]]}] for name in names]
        rendering = (ours.renderer.render_chat_async([it], ChatParams()) for it in conversations)
        return [prompts[0] for _, prompts in await asyncio.gather(*rendering)]

    names = [*PARTS, *reversed(PARTS)]
    for name, prompt in zip(names, asyncio.run(all_of(names)), strict=True):
        assert asked_of(identifiers(ours, prompt)) == [MEANT.get(name, "high")]


def test_a_client_s_name_for_a_picture_stays_apart_from_its_level(ours: InputProcessor) -> None:
    part = {"type": "image_url", "image_url": {"url": URL}, "uuid": "cat@low"}
    assert identifiers(ours, rendered(ours, [TEXT, part])) == ["cat@low@high"]
    part = {"type": "image_url", "image_url": {"url": URL, "detail": "full"}, "uuid": "cat@low"}
    assert identifiers(ours, rendered(ours, [TEXT, part])) == ["cat@low@full"]


def test_the_request_s_level_goes_before_a_detail(ours: InputProcessor) -> None:
    prompt = rendered(ours, [TEXT, PARTS["low"], PARTS["none"]])
    assert asked_of(identifiers(ours, prompt, **{REQUEST_LEVEL: "full"})) == ["full", "full"]


def test_a_picture_at_two_levels_is_processed_once(ours: InputProcessor) -> None:
    part = PARTS["none"] | {"uuid": "seen at two levels"}
    features = list[MultiModalFeatureSpec]()
    for level in ("low", "full"):
        params = SamplingParams(extra_args={REQUEST_LEVEL: level})
        made = ours.process_inputs("a request", rendered(ours, [TEXT, part]), params, ("generate",))
        features += made.mm_features or []
    assert features[0].mm_hash == features[1].mm_hash
    assert features[0].identifier != features[1].identifier
    assert features[0].data is not None and features[1].data is None


def test_a_picture_whose_level_was_refused_is_sent_again(ours: InputProcessor) -> None:
    part = {"type": "image_url", "image_url": {"url": URL}, "uuid": "refused"}
    with pytest.raises(VLLMValidationError, match="detail is 'mid', which means no level; use auto"):
        identifiers(ours, rendered(ours, [TEXT, part | {"detail": "mid"}]))
    made = ours.process_inputs("a", rendered(ours, [TEXT, part]), SamplingParams(), ("generate",))
    assert made.mm_features is not None and made.mm_features[0].data is not None


def test_prompts_that_were_no_messages_are_at_the_default_level(ours: InputProcessor) -> None:
    prompt = {"prompt": "<image> What is here?", "multi_modal_data": {"image": [PICTURES[2]]}}
    (made,) = ours.renderer.render_cmpl([prompt])
    assert asked_of(identifiers(ours, made)) == ["high"]
    assert asked_of(identifiers(ours, made, **{REQUEST_LEVEL: "low"})) == ["low"]


def test_other_models_know_nothing_of_levels(processors: dict[str, InputProcessor]) -> None:
    stock = processors["stock"]
    for name in ("low", "full", "none"):
        prompt = rendered(stock, [TEXT, PARTS[name] | {"uuid": "a cat"}])
        assert DETAILS not in prompt
        assert identifiers(stock, prompt, **{REQUEST_LEVEL: "mid"}) == ["a cat"]


def test_a_detail_inside_goes_before_the_part_s() -> None:
    inside: dict[str, Any] = {"url": "x", "detail": "low"}
    assert detail_of({"image_url": inside, "detail": "full"}) == "low"
    assert detail_of({"image_url": inside | {"detail": None}, "detail": "full"}) == "full"
    assert detail_of({"image_url": "x", "detail": "full"}) == "full"
    assert detail_of({"image_url": "x"}) is None and detail_of("text") is None


def test_hooks_that_are_installed_twice_are_there_once() -> None:
    def hooks() -> list[Any]:
        trackers = chat_utils.MultiModalItemTracker, chat_utils.AsyncMultiModalItemTracker
        parse = getattr(*details._part_parser(chat_utils))
        return [parse, OnlineRenderer.preprocess_chat, *(tracker.resolve_items for tracker in trackers)]

    before = hooks()
    details.install()
    picture_levels.install()
    assert hooks() == before


# ---- requests of the server, and beams ------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (SimpleNamespace(vllm_xargs={REQUEST_LEVEL: "low"}), "low"),
        (SimpleNamespace(vllm_xargs={"other": 1}), None),
        (SimpleNamespace(vllm_xargs=None), None),
        # Of requests without such a field vLLM keeps whatever comes under that name.
        (SimpleNamespace(vllm_xargs="low"), None),
        # Requests of other kinds have no such field.
        (SimpleNamespace(), None),
    ],
)
def test_a_chat_request_s_prompt_says_the_level_that_it_asks_for(
    ours: InputProcessor, monkeypatch: pytest.MonkeyPatch, asked: Any, said: str | None
) -> None:
    async def preprocess_chat(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        return [args, kwargs], [{"type": "multimodal"}, {"type": "token"}]

    monkeypatch.setattr(OnlineRenderer, "preprocess_chat", preprocess_chat)
    picture_levels.install()
    renderer = SimpleNamespace(model_config=ours.model_config)
    found, prompts = asyncio.run(OnlineRenderer.preprocess_chat(renderer, asked, [], 1, two=2))
    assert found == [([], 1), {"two": 2}]
    assert prompts == [{"type": "multimodal"} | ({REQUEST_LEVEL: said} if said else {}), {"type": "token"}]


@pytest.mark.parametrize("level", [None, "high"])
def test_a_beam_s_steps_are_at_the_levels_of_their_prompt(ours: InputProcessor, level: str | None) -> None:
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

    prompt = rendered(ours, [TEXT, PARTS["low"], PARTS["full"], PARTS["none"]])
    if level is not None:
        prompt[REQUEST_LEVEL] = level
    wanted = identifiers(ours, prompt)
    assert asked_of(wanted) == (["low", "full", "high"] if level is None else [level] * 3)
    for more in ([], [7], [7, 8]):
        beam = BeamSearchSequence(prompt, tokens=prompt["prompt_token_ids"] + more, logprobs=[])
        assert identifiers(ours, beam.get_prompt()) == wanted
