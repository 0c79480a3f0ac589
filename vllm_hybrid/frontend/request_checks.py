"""Requests that reduced image tokens cannot answer are refused with a 400, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFeatureSpec, MultiModalKwargsItem
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_hybrid.errors import abbreviated
from vllm_hybrid.startup.settings import num_patches

# Sampling parameters that ask for scores of prompt rows.
PROMPT_SCORES = ("prompt_logprobs", "prompt_logprob_token_ids")
# What stands for an image whose data lies in memory that the engine shares with its API server.
_SHARED_MEMORY = "address"
# Numbers that torch goes through in the calling thread: to wait for others would cost a request more than all
# the rest of its checks. From 32768 on it shares them out.
_ALONE = 1 << 14
# Others do not go into a batch together with these.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ImageInput:
    """What a model takes for one image.

    Attributes:
        patches: patches of the image, and so its positions in a prompt and the rows of its embeddings.
        side: height and width of its pixels.
        hidden: width of the language model, and so of its embeddings.
        dtype: what the model computes in.
        shares_memory: whether the engine finds images in memory that it shares with its API servers.

    """

    patches: int
    side: int
    hidden: int
    dtype: torch.dtype
    shares_memory: bool = False

    @classmethod
    def of(cls, model_config: ModelConfig) -> ImageInput:
        """What the model of a configuration takes."""
        hf_config = model_config.hf_config
        return cls(
            num_patches(hf_config),
            hf_config.vision_config.image_size,
            hf_config.text_config.hidden_size,
            model_config.dtype,
            _shares_memory(model_config),
        )

    def embeddings(self, given: Any) -> torch.Tensor:
        """An image's embeddings [patches, hidden] in the model's dtype.

        vLLM batches images of several requests in the dtype of the first, so all have the same.

        Raises:
            VLLMValidationError: they are of another shape, no floating-point numbers, or not finite in the
                model's dtype.

        """
        return self._checked("image_embeds", given, (self.patches, self.hidden))

    def pixels(self, given: Any) -> torch.Tensor:
        """An image's pixels [3, side, side] in the model's dtype.

        Raises:
            VLLMValidationError: see :meth:`embeddings`.

        """
        return self._checked("pixel_values", given, (3, self.side, self.side))

    def _checked(self, name: str, given: Any, shape: tuple[int, ...]) -> torch.Tensor:
        if not isinstance(given, torch.Tensor) or given.dtype not in _DTYPES:
            kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise _refusal(name, kind, f"{name} of an image is {kind}; give floating-point numbers ({known})")
        if tuple(given.shape) != shape:
            found, wanted = list(given.shape), list(shape)
            raise _refusal(name, found, f"{name} of an image has shape {found}; this model takes {wanted}")
        # Also where nothing is to be done, torch lets go of the interpreter's lock, and waits for it.
        converted = given if given.dtype is self.dtype else given.to(self.dtype)
        if not _is_finite(converted):
            sentence = (
                f"{name} of an image holds numbers that are not finite in {self.dtype}; give finite ones"
            )
            raise _refusal(name, "not finite", sentence)
        return converted


def _is_finite(numbers: torch.Tensor) -> bool:
    """Whether no number is infinite or NaN; looked at in one pass and without a mask as large as they are."""
    # Both ends are NaN where any number is.
    ends = (end for part in numbers.flatten().split(_ALONE) for end in torch.aminmax(part))
    return all(math.isfinite(end.item()) for end in ends)


def _shares_memory(model_config: ModelConfig) -> bool:
    options = model_config.get_multimodal_config()
    return options.mm_processor_cache_type == "shm" and options.mm_processor_cache_gb > 0


def check_request(request: EngineCoreRequest, image: ImageInput) -> None:
    """Refuse what cannot be computed, before the engine sees it.

    Args:
        request: the request as the engine would get it.
        image: what the model takes for an image.

    Raises:
        VLLMValidationError: the request asks for log-probabilities of its prompt, adds images to a prompt
            that is still open, or carries an image that the model does not take; vLLM answers with a 400.

    """
    if request.sampling_params is not None:
        check_scores(request.sampling_params)
    features = request.mm_features or []
    if features and request.resumable:
        sentence = "a prompt with images that is sent in pieces is not supported with reduced image tokens"
        raise _refusal("resumable", True, f"{sentence}; send it as a whole")
    check_features(features, image, len(request.prompt_token_ids or ()))


def check_scores(params: SamplingParams) -> None:
    """Refuse sampling parameters that ask for log-probabilities of the prompt.

    Raises:
        VLLMValidationError: they do.

    """
    for name in PROMPT_SCORES:
        if (asked := getattr(params, name)) is not None:
            # They may be asked for by thousands of numbers.
            value = abbreviated(str(asked))
            sentence = (
                f"{name}={value} is not supported with reduced image tokens, because dropped rows "
                "have no log-probabilities; leave it out"
            )
            raise _refusal(name, value, sentence)


def check_features(features: Sequence[MultiModalFeatureSpec], image: ImageInput, prompt_length: int) -> None:
    """Refuse multimodal inputs that are not whole images of this model inside the prompt.

    They need not come from vLLM's own processor: its token API takes them from clients.

    Args:
        features: a request's multimodal inputs; their data is brought to the model's dtype. One without
            data was sent, and checked, before.
        image: what the model takes for an image.
        prompt_length: positions of the prompt.

    Raises:
        VLLMValidationError: an input is no image, has another number of positions or lies outside the prompt,
            or its data has another shape or dtype, is not finite, or is not an image of its own.

    """
    for feature in features:
        if (kind := feature.modality) != "image":
            sentence = f"{kind} is not supported with reduced image tokens; give images and text"
            raise _refusal("modality", kind, sentence)
        place = feature.mm_position
        rows = place.length if place.is_embed is None else int(place.is_embed.sum())
        if not place.length == rows == image.patches:
            found = f"an image stands at {place.length} positions of the prompt and has rows for {rows}"
            raise _refusal("mm_placeholders", rows, f"{found}; this model takes {image.patches}")
        end = place.offset + place.length
        if not 0 <= place.offset <= end <= prompt_length:
            found = f"an image stands at positions {place.offset} to {end - 1}"
            raise _refusal("mm_placeholders", end, f"{found} of a prompt of {prompt_length}; place it inside")
        if feature.data is not None:
            _check_data(feature.data, image)


def _check_data(data: MultiModalKwargsItem, image: ImageInput) -> None:
    """Check the data of one image, and bring it to the model's dtype."""
    if _SHARED_MEMORY in data and image.shares_memory:
        # Read from there, it has been through vLLM's own processor.
        return
    checks = {"pixel_values": image.pixels, "image_embeds": image.embeddings}
    if len(data) != 1 or not data.keys() <= checks.keys():
        found = sorted(data)
        raise _refusal("mm_kwargs", found, f"an image comes as {found}; give pixel_values or image_embeds")
    name, element = next(iter(data.items()))
    if not isinstance(element.field, MultiModalBatchedField):
        kind = type(element.field).__name__
        raise _refusal("mm_kwargs", kind, f"{name} of an image comes as {kind}; give a batched field")
    element.data = checks[name](element.data)


def _refusal(parameter: str, value: Any, sentence: str) -> VLLMValidationError:
    return VLLMValidationError(sentence, parameter=parameter, value=value)
