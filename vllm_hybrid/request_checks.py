"""Requests that reduced image tokens cannot answer are refused with a 400, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from .settings import num_patches

# Sampling parameters that ask for scores of prompt rows.
PROMPT_SCORES = ("prompt_logprobs", "prompt_logprob_token_ids")
# What stands for an image whose data lies in memory that the engine shares with its API server.
_SHARED_MEMORY = "address"


@dataclass(frozen=True)
class ImageInput:
    """What a model takes for one image.

    Attributes:
        patches: patches of the image, and so its positions in a prompt and the rows of its embeddings.
        side: height and width of its pixels.
        hidden: width of the language model, and so of its embeddings.
        dtype: what the model computes in.

    """

    patches: int
    side: int
    hidden: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model_config: ModelConfig) -> ImageInput:
        """What the model of a configuration takes."""
        hf_config = model_config.hf_config
        return cls(
            num_patches(hf_config),
            hf_config.vision_config.image_size,
            hf_config.text_config.hidden_size,
            model_config.dtype,
        )

    def check_embeddings(self, embeddings: Any) -> None:
        """Refuse anything but floating-point [patches, hidden], finite in the model's dtype.

        Raises:
            VLLMValidationError: that is not what is given.

        """
        self._check("image_embeds", embeddings, (self.patches, self.hidden))

    def check_pixels(self, pixels: Any) -> None:
        """Refuse anything but floating-point [3, side, side], finite in the model's dtype.

        Raises:
            VLLMValidationError: that is not what is given.

        """
        self._check("pixel_values", pixels, (3, self.side, self.side))

    def _check(self, name: str, given: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
            raise _refusal(name, kind, f"{name} of an image is {kind}; give floating-point numbers")
        if tuple(given.shape) != shape:
            found, wanted = list(given.shape), list(shape)
            raise _refusal(name, found, f"{name} of an image has shape {found}; this model takes {wanted}")
        if not given.to(self.dtype).isfinite().all():
            sentence = (
                f"{name} of an image holds numbers that are not finite in {self.dtype}; give finite ones"
            )
            raise _refusal(name, "not finite", sentence)


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
    check_features(features, image)


def check_scores(params: SamplingParams) -> None:
    """Refuse sampling parameters that ask for log-probabilities of the prompt.

    Raises:
        VLLMValidationError: they do.

    """
    for name in PROMPT_SCORES:
        if (asked := getattr(params, name)) is not None:
            value = _short(asked)
            sentence = (
                f"{name}={value} is not supported with reduced image tokens, because dropped rows "
                "have no log-probabilities; leave it out"
            )
            raise _refusal(name, value, sentence)


def check_features(features: Sequence[MultiModalFeatureSpec], image: ImageInput) -> None:
    """Refuse multimodal inputs that are not whole images of this model.

    They need not come from vLLM's own processor: its token API takes them from clients.

    Args:
        features: a request's multimodal inputs. One without data was sent, and checked, before.
        image: what the model takes for an image.

    Raises:
        VLLMValidationError: an input is no image, has another number of positions, or its data has
            another shape or dtype or is not finite.

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
        if feature.data is not None:
            _check_data(feature.data, image)


def _check_data(data: Any, image: ImageInput) -> None:
    """Check the data of one image, a ``MultiModalKwargsItem``."""
    if "pixel_values" in data:
        image.check_pixels(data["pixel_values"].data)
    elif "image_embeds" in data:
        image.check_embeddings(data["image_embeds"].data)
    elif _SHARED_MEMORY not in data:
        found = sorted(data)
        raise _refusal("mm_kwargs", found, f"an image comes as {found}; give pixel_values or image_embeds")


def _refusal(parameter: str, value: Any, sentence: str) -> VLLMValidationError:
    return VLLMValidationError(sentence, parameter=parameter, value=value)


def _short(value: Any) -> str:
    """A value as a sentence shows it: scores may be asked for by thousands of numbers."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
