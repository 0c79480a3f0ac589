"""The pixel values that vLLM makes of a picture in a request, by its own code and without an engine."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media.connector import MediaConnector
from vllm.plugins import load_general_plugins


class ServerPixels:
    """What a server of one checkpoint hands to its vision tower, in float32."""

    def __init__(self, checkpoint: Path) -> None:
        load_general_plugins()
        config = ModelConfig(model=str(checkpoint), dtype="float32", max_model_len=2048)
        self.processor: Any = MULTIMODAL_REGISTRY.create_processor(config)

    def of_file(self, data: bytes) -> torch.Tensor:
        """Of a file that comes as a data URL, as [3, height, width]; raises what the server would answer."""
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        return self.of_picture(MediaConnector().fetch_image(url))

    def of_picture(self, picture: Any) -> torch.Tensor:
        """Of a picture in memory, such as a chat's ``image_pil``."""
        items = self.processor.info.parse_mm_data({"image": [picture]})
        made = self.processor("USER: <image>\nWhat is it? ASSISTANT:", items)
        return made["mm_kwargs"]["image"][0]["pixel_values"].data
