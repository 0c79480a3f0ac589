"""vLLM's input processor for engines that reduce image tokens: the API server's last look at a request.

Each engine has an input processor of its own, so nothing here concerns other engines of the process.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_hybrid.frontend import beam_steps
from vllm_hybrid.frontend.picture_levels import choose_levels
from vllm_hybrid.frontend.request_checks import ImageInput, check_request
from vllm_hybrid.frontend.request_cost import check_asks_cost
from vllm_hybrid.startup.settings import check_options, hybrid_config, reduces


class HybridInputProcessor(InputProcessor):
    """Refuses what the engine cannot answer, while that is one request's error and not the server's end."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        # Made before the engine is, from the configuration that the engine will get.
        check_options(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self.image = ImageInput.of(vllm_config.model_config)
        self.levels = hybrid_config(vllm_config.model_config.hf_config).levels

    def process_inputs(self, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        """vLLM's request for a prompt, checked, with the levels of its pictures.

        Raises:
            VLLMValidationError, ValueError: vLLM, :func:`request_checks.check_request` or
                :func:`picture_levels.choose_levels` refuses it.

        """
        try:
            request = super().process_inputs(request_id, prompt, *args, **kwargs)
            check_request(request, self.image)
            choose_levels(request, prompt, self.levels)
            check_asks_cost(request.sampling_params)
        except Exception:
            self._forget_unsent(prompt)
            raise
        beam_steps.note_prompt_tokens(request, prompt)
        return request

    def _forget_unsent(self, prompt: Any) -> None:
        """Take a refused request's images out of the list of those that the engine has."""
        cache = self.renderer.mm_processor_cache
        if cache is None or not isinstance(prompt, dict) or prompt.get("type") != "multimodal":
            return
        for modality, items in prompt["mm_kwargs"].items():
            for item, name in zip(items, prompt["mm_hashes"][modality], strict=True):
                if item is not None:
                    cache.invalidate(name)


def install() -> None:
    """Have engines that reduce image tokens get this input processor; others keep vLLM's."""
    InputProcessor.__new__ = staticmethod(_new)


def _new(
    cls: type[InputProcessor], vllm_config: VllmConfig | None = None, *args: Any, **kwargs: Any
) -> InputProcessor:
    # Copies are made without a configuration, of whichever class they are.
    ours = cls is InputProcessor and vllm_config is not None and reduces(vllm_config)
    return object.__new__(HybridInputProcessor if ours else cls)
