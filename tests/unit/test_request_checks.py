"""Requests that reduced image tokens cannot answer are refused, by the engine that reduces them and no other.

Input processors are made as an API server makes them; no engine is started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    MultiModalSharedField,
    PlaceholderRange,
)
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.configurations import PRUNES, configure
from tests.support.engines import STOCK
from tests.support.tiny_checkpoints import make_images
from vllm_hybrid.frontend import beam_steps, request_checks
from vllm_hybrid.frontend.request_checks import ImageInput

# Not LLaVA's sizes: nothing may be taken for granted.
IMAGE = ImageInput(patches=49, side=98, hidden=32, dtype=torch.float16)
LENGTH = 100
PICTURES = list(make_images(3).values())
SCORES = SamplingParams(prompt_logprobs=1, max_tokens=4)


# --------------------------------------------------------------------------------------------------
# Scores of the prompt
# --------------------------------------------------------------------------------------------------


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
def test_scores_of_prompt_rows_are_refused(asks: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VLLMValidationError, match=sentence) as refused:
        request_checks.check_scores(SamplingParams(**asks))
    assert refused.value.parameter == next(iter(asks))
    assert len(str(refused.value)) < 300


def test_scores_of_answers_are_served() -> None:
    request_checks.check_scores(SamplingParams(logprobs=5, logprob_token_ids=[1, 2]))


def test_every_parameter_that_scores_the_prompt_is_known() -> None:
    """A vLLM that brings another one has to be looked at."""
    scores = {name for name in SamplingParams.__struct_fields__ if name.startswith("prompt_logprob")}
    assert scores - {"prompt_logprob_start"} == set(request_checks.PROMPT_SCORES)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def item(field: Any = None, **tensors: Any) -> MultiModalKwargsItem:
    """The data of one image, as an input processor gets it."""
    field = field or MultiModalBatchedField()
    return MultiModalKwargsItem(
        {name: MultiModalFieldElem(data=data, field=field) for name, data in tensors.items()}
    )


def feature(data: MultiModalKwargsItem | None, length: int = 49, **options: Any) -> MultiModalFeatureSpec:
    mask = options.pop("is_embed", None)
    place = PlaceholderRange(options.pop("offset", 0), length, mask)
    given = {"modality": "image", "identifier": "an image"} | options
    return MultiModalFeatureSpec(data=data, mm_position=place, **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whole_images_are_taken(dtype: torch.dtype) -> None:
    features = [
        feature(item(pixel_values=torch.randn(3, 98, 98, dtype=dtype))),
        feature(item(image_embeds=torch.randn(49, 32, dtype=dtype))),
        feature(None),
        feature(None, is_embed=torch.ones(49, dtype=torch.bool)),
    ]
    request_checks.check_features(features, IMAGE, LENGTH)
    assert {next(iter(f.data.values())).data.dtype for f in features if f.data} == {IMAGE.dtype}


def test_images_in_shared_memory_are_taken_where_there_is_one() -> None:
    address = feature(item(address=1, monotonic_id=2, signature=[3]))
    request_checks.check_features([address], dataclasses.replace(IMAGE, shares_memory=True), LENGTH)
    with pytest.raises(VLLMValidationError, match="an image comes as .*; give pixel_values or image_embeds"):
        request_checks.check_features([address], IMAGE, LENGTH)


def test_images_of_several_clients_go_into_one_batch() -> None:
    """vLLM batches in the dtype of the first, in which the others' numbers need not be finite."""
    given = [torch.randn(49, 32, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)]
    image = dataclasses.replace(IMAGE, dtype=torch.float32)
    given[1][0, 0] = 1e5
    features = [feature(item(image_embeds=embeddings)) for embeddings in given]
    request_checks.check_features(features, image, LENGTH)
    batched = list(group_and_batch_mm_kwargs([("image", f.data) for f in features]))
    assert len(batched) == 1
    for got, wanted in zip(batched[0][2]["image_embeds"], given, strict=True):
        assert torch.equal(got, wanted.float())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (feature(None, length=48), "48 positions of the prompt"),
        (feature(None, length=98), "98 positions of the prompt"),
        (feature(None, is_embed=torch.arange(49) > 0), "has rows for 48; this model takes 49"),
        (feature(None, length=50, is_embed=torch.arange(50) > 0), "50 positions of the prompt"),
        (feature(None, modality="prompt_embeds"), "prompt_embeds is not supported"),
        (feature(item()), "an image comes as"),
        (feature(None, offset=52), "at positions 52 to 100 of a prompt of 100; place it inside"),
        (feature(None, offset=-1), "at positions -1 to 47 of a prompt of 100"),
        (feature(item(pixel_values=torch.zeros(3, 98, 98), image_embeds=torch.zeros(49, 32))), "comes as"),
        (
            feature(item(MultiModalSharedField(batch_size=1), pixel_values=torch.zeros(3, 98, 98))),
            "give a batched field",
        ),
        (feature(item(image_embeds=torch.zeros(49, 32).to(torch.float8_e4m3fn))), "is torch.float8_e4m3fn;"),
        (feature(item(pixel_values=torch.zeros(3, 112, 112))), r"pixel_values .* \[3, 112, 112\]"),
        (feature(item(pixel_values=torch.zeros(98, 98, 3))), r"this model takes \[3, 98, 98\]"),
        (feature(item(pixel_values=torch.full((3, 98, 98), torch.nan))), "pixel_values .* not finite"),
        (feature(item(image_embeds=torch.zeros(48, 32))), r"image_embeds .* \[48, 32\]; .* takes \[49, 32\]"),
        (feature(item(image_embeds=torch.zeros(49, 33))), r"image_embeds .* has shape \[49, 33\]"),
        (feature(item(image_embeds=torch.zeros(49 * 32))), r"image_embeds .* has shape \[1568\]"),
        (feature(item(image_embeds=torch.zeros(49, 32, dtype=torch.int64))), "is torch.int64; give floating"),
        (feature(item(image_embeds=torch.zeros(49, 32, dtype=torch.complex64))), "is torch.complex64; give"),
        (feature(item(image_embeds=[[0.0] * 32] * 49)), "is list; give floating"),
        (feature(item(image_embeds=torch.full((49, 32), torch.inf))), "not finite in torch.float16"),
        # Finite as it comes, infinite in what the model computes in.
        (feature(item(image_embeds=torch.full((49, 32), 1e6))), "not finite in torch.float16"),
    ],
)
def test_anything_else_is_refused(wrong: MultiModalFeatureSpec, sentence: str) -> None:
    right = feature(item(image_embeds=torch.zeros(49, 32)))
    with pytest.raises(VLLMValidationError, match=sentence) as refused:
        request_checks.check_features([right, wrong], IMAGE, LENGTH)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, number: float) -> None:
    image = dataclasses.replace(IMAGE, dtype=dtype)
    largest = torch.finfo(dtype).max
    for place in (0, 1, 5_000, 98 * 98 * 3 - 1):
        pixels = torch.randn(3, 98, 98, dtype=dtype)
        pixels.view(-1)[[3, 4]] = torch.tensor([largest, -largest], dtype=dtype)
        assert image.pixels(pixels) is pixels
        pixels.view(-1)[place] = number
        with pytest.raises(VLLMValidationError, match="not finite"):
            image.pixels(pixels)


class Seen(TorchDispatchMode):
    """Notes how many numbers torch's operations go through and how many they make; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.gone_through: list[int] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)] for x in (args, result)
        )
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        new = [leaf.numel() for leaf in made if leaf.untyped_storage().data_ptr() not in known]
        self.made += new
        self.gone_through += [leaf.numel() for leaf in given] if new else []
        return result


def test_a_picture_is_looked_at_once_by_the_calling_thread_and_not_copied() -> None:
    """Every request pays for it, in the thread that serves all of them; torch shares out 32768 numbers."""
    image = dataclasses.replace(IMAGE, side=336)
    pixels = torch.zeros(3, 336, 336, dtype=image.dtype)
    with Seen() as seen:
        image.pixels(pixels)
    assert sum(seen.gone_through) == pixels.numel() and max(seen.gone_through) < 32768
    assert set(seen.made) == {1}


# --------------------------------------------------------------------------------------------------
# Input processors
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors() -> Iterator[dict[str, InputProcessor]]:
    """Those of two engines in one process, ours made between two of vLLM's own model."""
    made = {
        "before": InputProcessor(configure(None, STOCK)),
        "ours": InputProcessor(configure(PRUNES, enable_mm_embeds=True)),
        "after": InputProcessor(configure(None, STOCK)),
        "off": InputProcessor(configure(None)),
    }
    yield made
    for processor in made.values():
        processor.renderer.shutdown()


def rendered(processor: InputProcessor, data: Any, count: int = 1) -> Any:
    """A prompt with images, or their embeddings, as the server hands it to the input processor."""
    prompt = {"prompt": "<image>" * count + " What is here?", "multi_modal_data": {"image": data}}
    return processor.renderer.render_cmpl([prompt])[0]


def accept(processor: InputProcessor, prompt: Any, params: SamplingParams, **options: Any) -> Any:
    return processor.process_inputs("a request", prompt, params, ("generate",), **options)


@pytest.mark.parametrize("name", ["before", "after", "off"])
def test_another_engine_of_the_process_scores_prompts(
    processors: dict[str, InputProcessor], name: str
) -> None:
    prompt = rendered(processors["ours"], [PICTURES[0]])
    with pytest.raises(VLLMValidationError, match="prompt_logprobs=1 is not supported"):
        accept(processors["ours"], prompt, SCORES)
    assert type(processors[name]) is InputProcessor
    prompt = rendered(processors[name], [PICTURES[0]])
    assert accept(processors[name], prompt, SCORES).sampling_params.prompt_logprobs == 1


@pytest.mark.parametrize("shape", [(100, 128), (577, 128), (0, 128), (576, 129)])
@pytest.mark.parametrize("listed", [True, False])
def test_embeddings_of_no_whole_image_reach_no_cache(
    processors: dict[str, InputProcessor], shape: tuple[int, int], listed: bool
) -> None:
    ours = processors["ours"]
    given = [torch.randn(576, 128), torch.randn(shape)] if listed else torch.randn(2, *shape)
    with pytest.raises(
        (ValueError, VLLMValidationError), match=r"takes \[576, 128\]|hidden dimension mismatch"
    ):
        rendered(ours, given, 2)


@pytest.mark.parametrize("listed", [True, False])
def test_embeddings_of_whole_images_are_accepted(processors: dict[str, InputProcessor], listed: bool) -> None:
    given = torch.randn(2, 576, 128)
    prompt = rendered(processors["ours"], list(given) if listed else given, 2)
    features = accept(processors["ours"], prompt, SamplingParams(max_tokens=4)).mm_features
    assert [f.mm_position.length for f in features] == [576, 576]
    for sent, known in zip(features, given, strict=True):
        assert torch.equal(sent.data["image_embeds"].data, known)


def test_an_image_that_the_engine_was_not_sent_is_sent_again(processors: dict[str, InputProcessor]) -> None:
    """A refused request's images are not among those that the engine has."""
    ours = processors["ours"]
    for refused in (SCORES, SamplingParams(max_tokens=4, logprobs=10**6)):
        with pytest.raises((ValueError, VLLMValidationError), match="logprobs"):
            accept(ours, rendered(ours, [PICTURES[1]]), refused)
    sent = accept(ours, rendered(ours, [PICTURES[1]]), SamplingParams(max_tokens=4)).mm_features
    again = accept(ours, rendered(ours, [PICTURES[1]]), SamplingParams(max_tokens=4)).mm_features
    assert sent[0].data is not None and again[0].data is None


def test_images_that_came_by_no_processor_are_looked_at(processors: dict[str, InputProcessor]) -> None:
    """As clients of vLLM's token API send them."""
    data = item(pixel_values=torch.randn(3, 336, 336))
    for count, start, length, wanted in (
        (700, 5, 576, None),
        (700, 5, 100, "100 positions"),
        (100, 5, 576, "positions 5 to 580 of a prompt of 100"),
        (20, 25, 576, "positions 25 to 600 of a prompt of 20"),
        (100, 0, 576, "positions 0 to 575 of a prompt of 100"),
    ):
        prompt = mm_input(
            [1] * count,
            mm_kwargs=MultiModalKwargsItems({"image": [data]}),
            mm_hashes={"image": [f"{length}"]},
            mm_placeholders={"image": [PlaceholderRange(start, length)]},
        )
        if wanted is None:
            accept(processors["ours"], prompt, SamplingParams())
            continue
        with pytest.raises(VLLMValidationError, match=wanted):
            accept(processors["ours"], prompt, SamplingParams())


def test_a_prompt_with_images_is_not_sent_in_pieces(processors: dict[str, InputProcessor]) -> None:
    ours = processors["ours"]
    with pytest.raises(VLLMValidationError, match="sent in pieces"):
        accept(ours, rendered(ours, [PICTURES[2]]), SamplingParams(), resumable=True)


# --------------------------------------------------------------------------------------------------
# Steps of beam searches
# --------------------------------------------------------------------------------------------------


def test_a_beam_s_step_says_where_its_prompt_ended(processors: dict[str, InputProcessor]) -> None:
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
    from vllm.v1.request import Request

    ours = processors["ours"]
    prompt = rendered(ours, [PICTURES[3]])
    length = len(prompt["prompt_token_ids"])
    shared = SamplingParams(max_tokens=1, skip_clone=True)
    for chosen in ([], [7], [7, 8, 9]):
        step = BeamSearchSequence(
            prompt, tokens=prompt["prompt_token_ids"] + chosen, logprobs=[]
        ).get_prompt()
        request = Request.from_engine_core_request(accept(ours, step, shared), None)
        assert request.num_prompt_tokens == length + len(chosen)
        assert beam_steps.prompt_tokens(request) == length
    assert shared.extra_args is None


def test_a_client_cannot_say_where_its_prompt_ended(processors: dict[str, InputProcessor]) -> None:
    from vllm.v1.request import Request

    ours = processors["ours"]
    for extra, left in (
        ({beam_steps.PROMPT_TOKENS: 1}, None),
        ({beam_steps.PROMPT_TOKENS: 1, "x": 2}, {"x": 2}),
    ):
        params = SamplingParams(extra_args=extra)
        request = Request.from_engine_core_request(accept(ours, rendered(ours, [PICTURES[3]]), params), None)
        assert beam_steps.prompt_tokens(request) == request.num_prompt_tokens
        assert request.sampling_params.extra_args == left
