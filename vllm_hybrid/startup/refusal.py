"""An architecture that says why it is not served, for an environment in which this package cannot work."""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

from torch import nn

from vllm_hybrid.checkpoint.llava import ARCHITECTURE
from vllm_hybrid.environment.last_words import announced


def register(reason: str) -> None:
    """Have vLLM refuse the package's architecture with one sentence, and be itself for all others.

    Args:
        reason: the sentence.

    """
    # Where even this is not as in the vLLM that is known, the architecture is unknown to vLLM, which says so.
    with contextlib.suppress(Exception):
        from vllm.model_executor.models import ModelRegistry

        ModelRegistry.register_model(ARCHITECTURE, _refused_model(reason))
    with contextlib.suppress(Exception):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        MODELS_CONFIG_MAP[ARCHITECTURE] = _refused_settings(reason)


def _refused_settings(reason: str) -> Any:
    """vLLM's hook for a model's configuration, called before anything is loaded."""

    class RefusedSettings:
        REASON = reason

        @staticmethod
        @announced
        def verify_and_update_model_config(model_config: Any) -> NoReturn:
            raise ValueError(reason)

        @staticmethod
        @announced
        def verify_and_update_config(vllm_config: Any) -> NoReturn:
            raise ValueError(reason)

    return RefusedSettings


def _refused_model(reason: str) -> type[nn.Module]:
    """A text-generating model as vLLM sees it, so that it gets as far as to be refused."""

    class LlavaHybridForConditionalGeneration(nn.Module):
        @announced
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            raise ValueError(reason)

        def embed_input_ids(self, input_ids: Any) -> NoReturn:
            raise ValueError(reason)

        def forward(self, input_ids: Any, positions: Any) -> NoReturn:
            raise ValueError(reason)

        def compute_logits(self, hidden_states: Any) -> NoReturn:
            raise ValueError(reason)

    return LlavaHybridForConditionalGeneration
