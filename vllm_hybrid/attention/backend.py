"""vLLM's view of virtual unmerging attention: backend, metadata, layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import register_backend
from vllm.v1.kv_cache_interface import KVCacheSpec, get_kv_quant_mode
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_hybrid.attention.interface import AttentionPlan, KeyIndex, as_kv_rows
from vllm_hybrid.attention.select import select_attention
from vllm_hybrid.kv.tiers import SPEC_OF_TIER, Tier, tier_block_sizes

BACKEND_NAME = "HYBRID"


@dataclass
class HybridMetadata(AttentionMetadata):
    """What the runner tells one tier about a step; the model adds the plan before its layers run."""

    common: CommonAttentionMetadata
    plan: AttentionPlan[KeyIndex] | None = None


class HybridMetadataBuilder(AttentionMetadataBuilder[HybridMetadata]):
    """Hands the runner's metadata on; the plan needs the images and is completed in the model.

    A step of decodes has none: what the model does for it has the same shapes every time and reads all
    that changes on the device, so that it can be captured.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HybridMetadata:
        return HybridMetadata(common=common_attn_metadata)


@register_backend(BACKEND_NAME)
class HybridBackend(AttentionBackend):
    """Attention over pages with holes; registered under its own name, chosen by the model alone."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[HybridImpl]:
        return HybridImpl

    @staticmethod
    def get_builder_cls() -> type[HybridMetadataBuilder]:
        return HybridMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Blocks outermost, so that the tiers' unlike pages pack into one pool; a slot's heads together,
        # so that a token is one contiguous row.
        return (KVCacheLayout.BLNHC,)


class HybridImpl(AttentionImpl[HybridMetadata]):
    """Writes a layer's keys and values into its pages and attends at virtual positions."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "a logits soft cap": logits_soft_cap,
            "KV sharing between layers": kv_sharing_target_layer_name,
        }
        for feature, value in unsupported.items():
            if value is not None:
                raise ValueError(f"{feature} ({value}) is not supported with reduced image tokens")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        self.ops = select_attention(vllm_config)
        self.cos_sin_cache: torch.Tensor | None = None
        self.positions = vllm_config.model_config.max_model_len

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HybridMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            # Profiling runs have no pages, but what a step allocates here is to be seen in them.
            self._allocate_scratch(query)
            return output.zero_()
        plan, cos_sin_cache = attn_metadata.plan, self.cos_sin_cache
        if plan is None:
            raise RuntimeError("a step reached its attention layers before its rows were planned")
        assert cos_sin_cache is not None, "the model sets the cache before its first step"
        rows, out = plan.batch.kv_row_index.shape[0], output
        if rows < query.shape[0]:
            # Rows behind the batch's only fill the matrix products up.
            output[rows:].zero_()
            query, key, value, out = (x[:rows] for x in (query, key, value, output))
        kv_rows, _ = as_kv_rows(kv_cache)
        k_scale, v_scale = layer._k_scale_float, layer._v_scale_float
        if k_scale != 1:
            key = key / k_scale
        if v_scale != 1:
            value = value / v_scale
        self.ops.write_pages(key, value, kv_rows, plan.batch.kv_row_index)
        attending = (kv_rows, plan, cos_sin_cache, self.scale * k_scale, out)
        if not self.ops.attend_own_rows(query, key, value, *attending):
            self.ops.attend(query, *attending)
        if v_scale != 1:
            out.mul_(v_scale)
        return output

    def _allocate_scratch(self, query: torch.Tensor) -> None:
        """Allocate, and give back, what attention takes for as many rows at most."""
        rows = query.shape[0]
        size = self.ops.scratch_bytes(
            rows, self.positions, self.num_heads, self.num_kv_heads, self.head_size, query.element_size()
        )
        torch.empty(size, dtype=torch.uint8, device=query.device)


class HybridAttention(Attention):
    """vLLM's attention layer, bound to the hybrid backend and to a KV tier."""

    def __init__(self, *args: Any, tier: Tier, lower_layers: int, upper_layers: int, **kwargs: Any) -> None:
        super().__init__(*args, attn_backend=HybridBackend, **kwargs)
        self.tier = tier
        self.lower_layers = lower_layers
        self.upper_layers = upper_layers

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The layer's tier as a cache spec, with the tier's own block size."""
        sizes = tier_block_sizes(vllm_config.cache_config.block_size, self.lower_layers, self.upper_layers)
        return SPEC_OF_TIER[self.tier](
            block_size=sizes[self.tier],
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
        )
