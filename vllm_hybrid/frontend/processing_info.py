"""LLaVA's processing of images in the API server, with each image checked before it costs anything.

Embeddings are checked before any cache knows them, pictures before they are resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.multimodal.parse import (
    ImageEmbeddingItems,
    ImageProcessorItems,
    ModalityDataItems,
    MultiModalDataParser,
)
from vllm.multimodal.processing import ProcessorInputs

from vllm_hybrid.checkpoint.image_processor import check_size
from vllm_hybrid.frontend.details import DETAILS
from vllm_hybrid.frontend.request_checks import ImageInput
from vllm_hybrid.startup.settings import hybrid_config


class HybridProcessingInfo(LlavaProcessingInfo):
    """What vLLM asks about the model's images."""

    def get_data_parser(self) -> MultiModalDataParser:
        """vLLM's parser; where tokens are reduced it also checks embeddings that come as images."""
        if not hybrid_config(self.get_hf_config()).active:
            return super().get_data_parser()
        return CheckingParser(
            ImageInput.of(self.ctx.model_config),
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class CheckingParser(MultiModalDataParser):
    """vLLM's parser of a prompt's images, which takes whole images' embeddings only.

    Args:
        image: what the model takes for an image.
        options: vLLM's own.

    """

    def __init__(self, image: ImageInput, **options: Any) -> None:
        super().__init__(**options)
        self.image = image

    def _parse_image_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        if isinstance(data, Mapping):
            # vLLM would take the names of its tensors for pictures.
            sentence = "image_embeds of an image is an object; give one tensor, saved by torch, in base64"
            raise VLLMValidationError(sentence, parameter="image_embeds", value="object")
        items = super()._parse_image_data(data)
        if isinstance(items, ImageEmbeddingItems):
            return ImageEmbeddingItems([self.image.embeddings(given) for given in items.get_all()])
        return items


class CheckingProcessor(LlavaMultiModalProcessor):
    """vLLM's processor, which takes no picture that would grow beyond all memory, and passes details on."""

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> MultiModalInput:
        """vLLM's processed prompt, with the details of its pictures."""
        processed: Any = super().apply(inputs, *args, **kwargs)
        details = (inputs.mm_uuid_items or {}).get(DETAILS)
        if details is not None:
            processed[DETAILS] = details
        return processed

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        given: Any = hf_data.get("images", ())
        images = ImageProcessorItems(given)
        processor: Any = self.info.get_hf_processor(**hf_kwargs)
        changes = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        for number in range(len(given)):
            size = images.get_image_size(number)
            try:
                check_size((size.width, size.height), processor.image_processor, changes)
            except ValueError as error:
                found = f"{size.width} x {size.height}"
                raise VLLMValidationError(str(error), parameter="image", value=found) from error
        return super()._call_hf_processor(hf_data, hf_kwargs)
