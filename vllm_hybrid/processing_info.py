"""LLaVA's processing of images in the API server, with embeddings checked before any cache knows them."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava import LlavaProcessingInfo
from vllm.multimodal.parse import ImageEmbeddingItems, ModalityDataItems, MultiModalDataParser

from .request_checks import ImageInput
from .settings import hybrid_config


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
        items = super()._parse_image_data(data)
        if isinstance(items, ImageEmbeddingItems):
            return ImageEmbeddingItems([self.image.embeddings(given) for given in items.get_all()])
        return items
