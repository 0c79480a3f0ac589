"""LLaVA with merged and pruned image tokens, as a vLLM model."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImageEmbeddingInputs,
    LlavaMultiModalProjector,
    init_vision_tower_for_llava,
)
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.model_executor.models.vision import run_dp_sharded_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_hybrid.config import HybridConfig
from vllm_hybrid.frontend.picture_levels import LEVEL_NUMBER
from vllm_hybrid.frontend.processing_info import CheckingProcessor, HybridProcessingInfo
from vllm_hybrid.levels import FULL, Thresholds
from vllm_hybrid.method.row_plan import RowPlan, StepImages, to_device
from vllm_hybrid.method.token_merging import LiveTokens
from vllm_hybrid.models import encoder_output
from vllm_hybrid.models.clip import encode_merged
from vllm_hybrid.models.clip_on_device import DeviceEncoder
from vllm_hybrid.models.llama import HybridLlamaForCausalLM
from vllm_hybrid.models.picture_shares import no_tokens, share_out
from vllm_hybrid.models.row_padding import map_row_chunks
from vllm_hybrid.models.tensor_parallel import ranks_with_whole_towers
from vllm_hybrid.models.tower_graphs import DEFAULT_IMAGES, TowerGraphs
from vllm_hybrid.startup.settings import check_options, hybrid_config, num_patches


@MULTIMODAL_REGISTRY.register_processor(
    CheckingProcessor, info=HybridProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaHybridForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA-1.5 served with DyMU merging, virtual unmerging and FastV pruning.

    With nothing switched on this is vLLM's own LLaVA. An image's encoder output has one row per patch,
    as vLLM expects: the live tokens' features fill the first rows, and behind the features every row
    carries the live token that owns *its* patch, and the image's level.
    """

    # Unlike vLLM's own LLaVA, whose tower is always divided by heads.
    supports_encoder_tp_data = True
    # The hub writes the tower's weights with "vision_model.", transformers 5 without.
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
            for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        hf_config = vllm_config.model_config.hf_config
        hybrid = hybrid_config(hf_config)
        if hybrid.active:
            # Here too: engines without an API server of their own have no other place.
            check_options(vllm_config)
            self._init_reduced(vllm_config, prefix, hybrid)
        else:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hybrid = hybrid
        self._tower_ranks = ranks_with_whole_towers(self.multimodal_config)
        self._images: StepImages | None = None
        # Live tokens of encoder outputs, as long as somebody holds them.
        self._live_counts: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()

    def _init_reduced(self, vllm_config: VllmConfig, prefix: str, hybrid: HybridConfig) -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.patches = num_patches(config)
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_index]
        )
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = init_vision_tower_for_llava(
                config,
                quant_config=vllm_config.quant_config,
                require_post_norm=False,
                prefix=maybe_prefix(prefix, "vision_tower"),
            )
            self.multi_modal_projector = LlavaMultiModalProjector(
                vision_hidden_size=config.vision_config.hidden_size,
                text_hidden_size=config.text_config.hidden_size,
                projector_hidden_act=config.projector_hidden_act,
                multimodal_projector_bias=config.multimodal_projector_bias,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "multi_modal_projector"),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = HybridLlamaForCausalLM(
                vllm_config=vllm_config.with_hf_config(config.text_config),
                prefix=maybe_prefix(prefix, "language_model"),
                hybrid=hybrid,
                patches=self.patches,
            )
        self._ops = self.language_model.model.attention_ops
        on_device = self._ops.device_tower
        self._device_encoder = None if on_device is None else DeviceEncoder(on_device, self.patches)
        if self._device_encoder is not None and _captures_tower(vllm_config):
            vision = config.vision_config
            shape = (vision.num_channels, vision.image_size, vision.image_size)
            images = vllm_config.compilation_config.encoder_cudagraph_max_vision_items_per_batch
            self._device_encoder.make_graphs(self.vision_tower, shape, images or DEFAULT_IMAGES)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Encode images, each at its own level; those that come without one, in profiling runs, whole.

        Returns:
            One tensor [patches, hidden + 3] per image, see :func:`encoder_output.encode`: the live tokens'
            features in the first rows, zeros below. With nothing switched on, vLLM's [patches, hidden].

        """
        if not self.hybrid.active:
            return super().embed_multimodal(**kwargs)
        asked: Any = kwargs.pop(LEVEL_NUMBER, None)
        image_input = self._parse_and_validate_image_input(**kwargs)
        if image_input is None:
            return []
        if isinstance(image_input, LlavaImageEmbeddingInputs):
            # Features computed elsewhere come unmerged, in the model's dtype (`ImageInput.embeddings`).
            features = torch.stack(list(image_input["data"]))
            owner = torch.arange(self.patches, device=features.device).expand(features.shape[0], -1)
            level = self._level_numbers(asked, len(features))
            outputs = encoder_output.encode(features, owner, to_device(level, features.device))
            return self._remember(outputs, [self.patches] * len(features))
        pixel_values = image_input["pixel_values"]
        level = self._level_numbers(asked, len(pixel_values))
        thresholds = [self.hybrid.levels.all[number].thresholds for number in level]
        if asked is None and self._device_encoder is not None:
            # A profiling run: the first requests are not to wait for a compiler.
            self._device_encoder.warm_up(self.vision_tower, pixel_values)
        live = self._encode(pixel_values, thresholds)
        projected = map_row_chunks(self.multi_modal_projector, live.features)
        features = projected.new_zeros(len(live.counts), self.patches, projected.shape[1])
        features[live.image, live.index] = projected
        outputs = encoder_output.encode(features, live.owner, to_device(level, features.device))
        return self._remember(outputs, live.counts)

    def _encode(self, pixel_values: torch.Tensor, thresholds: Sequence[Thresholds | None]) -> LiveTokens:
        """Images through the tower, each with its thresholds; in shares where every rank has all of it."""

        def encode(some: slice) -> LiveTokens:
            return self._encode_here(pixel_values[some], thresholds[some])

        images = len(pixel_values)
        if self._tower_ranks is None:
            return encode(slice(images))
        nothing = no_tokens(self.patches, self.vision_tower.vision_model.embeddings.class_embedding)
        return share_out(encode, images, nothing, self._tower_ranks)

    def _encode_here(self, pixel_values: torch.Tensor, thresholds: Sequence[Thresholds | None]) -> LiveTokens:
        """Images through this rank's tower."""
        merge = any(one not in (None, math.inf) for own in thresholds for one in own or ())
        if self._device_encoder is None or not merge:
            return encode_merged(self.vision_tower, pixel_values, thresholds, self._ops)
        return self._device_encoder.encode(self.vision_tower, pixel_values, thresholds)

    def _image_pixels_to_features(self, vision_tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """vLLM's own tower, with nothing switched on."""
        encode = partial(super()._image_pixels_to_features, vision_tower)
        if self._tower_ranks is None:
            return encode(pixel_values)
        return run_dp_sharded_vision_model(pixel_values, encode)

    def _level_numbers(self, asked: Sequence[int] | None, images: int) -> list[int]:
        """The number of each image's level; a profiling run's are as costly as any can be."""
        return [self.hybrid.levels.number(FULL)] * images if asked is None else list(asked)

    def _remember(self, outputs: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """The outputs, whose live tokens are known from here on."""
        self._live_counts.update(zip(outputs, counts, strict=True))
        return outputs

    def live_counts(self, outputs: Sequence[torch.Tensor]) -> list[int]:
        """Live tokens of encoder outputs; those that were made elsewhere cost a round trip to the device."""
        unknown = [output for output in outputs if output not in self._live_counts]
        if unknown:
            _, owner, _ = encoder_output.decode(unknown)
            self._live_counts.update(zip(unknown, (owner.amax(dim=1) + 1).tolist(), strict=True))
        return [self._live_counts[output] for output in outputs]

    @property
    def tower_graphs(self) -> TowerGraphs | None:
        """Graphs of the tower, where they are asked for; who runs the model has them captured."""
        encoder = self._device_encoder if self.hybrid.active else None
        return None if encoder is None else encoder.graphs

    def foreign_pages(self) -> torch.Tensor | None:
        """Whose pages held another request's data in the last step; see :class:`HybridLlamaModel`."""
        return self.language_model.model.foreign_pages() if self.hybrid.active else None

    def copy_page_facts(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy page facts from block to block, of all tiers; see :meth:`TierPages.copy_facts`."""
        if self.hybrid.active:
            self.language_model.model.copy_page_facts(copies)

    def watch_choices(self, watcher: Callable[[StepImages, RowPlan, RowPlan], None]) -> None:
        """Have every step with images shown to a watcher: its images, its live rows, its kept rows."""
        if self.hybrid.active:
            self.language_model.model.watcher = watcher

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed a step's rows and remember its images for the forward pass that follows.

        Raises:
            RuntimeError: an image is not wholly inside the step, or an encoder output is none of
                :meth:`embed_multimodal`, and so names no owners.

        """
        if not self.hybrid.active:
            return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        self._images = None
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            return super().embed_input_ids(input_ids, None, is_multimodal=is_multimodal)
        assert is_multimodal is not None
        encoder_output.check(multimodal_embeddings, self.patches, self.config.text_config.hidden_size)
        features, owner, level = encoder_output.decode(multimodal_embeddings)
        # Both runners hand the mask over on the host, so finding the images asks the device nothing.
        first_rows = is_multimodal.nonzero()[:, 0].view(-1, self.patches)[:, 0].tolist()
        ratios = [each.fastv_ratio for each in self.hybrid.levels]
        header = self.hybrid.ranking_header
        self._images = StepImages.of(first_rows, owner, level, ratios, input_ids, header)
        return super().embed_input_ids(input_ids, features, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        if not self.hybrid.active:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        # Dummy runs call forward without embedding first, so nothing may be left for them to find.
        images, self._images = self._images, None
        return self.language_model.model(input_ids, positions, inputs_embeds, images)


def _captures_tower(vllm_config: VllmConfig) -> bool:
    """Whether CUDA graphs of the tower are asked for, by vLLM's own option."""
    asked = vllm_config.compilation_config.cudagraph_mm_encoder
    return asked and current_platform.is_cuda() and not vllm_config.model_config.enforce_eager
