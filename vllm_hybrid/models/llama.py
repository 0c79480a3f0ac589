"""The language model on live rows: lower layers, FastV's choice, upper layers.

The stacks below and above the choice are compiled separately and the row drop between them runs
eagerly: compiled as one, the profiling run, which has no images, would bake in the branch that drops
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, extract_layer_index
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import AttentionType

from vllm_hybrid.attention.backend import HybridAttention, HybridMetadata
from vllm_hybrid.attention.interface import AttentionPlan, KeyIndex, as_kv_rows, make_cos_sin_cache
from vllm_hybrid.attention.select import select_attention
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.kv.tiers import Tier
from vllm_hybrid.method.row_plan import RowPlan, StepImages, plan_text_rows
from vllm_hybrid.models.row_padding import pad_to_bucket
from vllm_hybrid.models.step import Step, TierPages, store_facts_and_plan


class HybridLlamaAttention(LlamaAttention):
    """Llama's attention whose pages may have holes; text rows are rotated here, image rows by the kernel."""

    def __init__(
        self,
        config: LlamaConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        attn_type: str = AttentionType.DECODER,
        *,
        hybrid: HybridConfig,
    ) -> None:
        nn.Module.__init__(self)
        tp_size = get_tensor_model_parallel_world_size()
        self.hidden_size = hidden_size
        self.total_num_heads = num_heads
        self.num_heads = num_heads // tp_size
        self.total_num_kv_heads = num_kv_heads
        self.num_kv_heads = max(1, num_kv_heads // tp_size)
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.scaling = self.head_dim**-0.5
        self.max_position_embeddings = max_position_embeddings
        self.qkv_proj = QKVParallelLinear(
            hidden_size=hidden_size,
            head_size=self.head_dim,
            total_num_heads=num_heads,
            total_num_kv_heads=num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            input_size=num_heads * self.head_dim,
            output_size=hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self._init_rotary_emb(config, quant_config=quant_config)
        lower = lower_layers(config, hybrid)
        self.attn = HybridAttention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            attn_type=attn_type,
            prefix=f"{prefix}.attn",
            tier=Tier.LOWER if extract_layer_index(prefix) < lower else Tier.UPPER,
            lower_layers=lower,
            upper_layers=config.num_hidden_layers - lower,
        )

    def attend(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`LlamaAttention.forward`; also hands out rotated queries [rows, heads * head_size]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output, query

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.attend(positions, hidden_states)[0]


class RankingDecoderLayer(LlamaDecoderLayer):
    """The layer before FastV's choice, which also hands out the queries it asked with."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states, query = self.self_attn.attend(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual, query


def lower_layers(config: LlamaConfig, hybrid: HybridConfig) -> int:
    """Decoder layers in the lower tier: K when image tokens are pruned, else all."""
    return hybrid.fastv_layer if hybrid.prunes else config.num_hidden_layers


class _Stack(nn.Module):
    """Consecutive decoder layers; the layers themselves belong to the model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class WholeStack(_Stack):
    """All layers, where nothing is pruned."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class LowerStack(_Stack):
    """The layers before FastV's choice; the last one's queries rank the image tokens."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: Sequence[nn.Module]) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layers=layers[:-1])
        self.ranking_layer = layers[-1]

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.ranking_layer(positions, hidden_states, residual)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0, "residual": 0})
class UpperStack(_Stack):
    """The layers after FastV's choice, without the final norm."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


def make_stacks(
    vllm_config: VllmConfig, prefix: str, layers: Sequence[nn.Module], split: int
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], ...]:
    """The layers as a lower and an upper stack, or as one where the split is behind the last layer.

    Each has a tag of its own, by which vLLM's compile cache tells their graphs apart.
    """
    if split == len(layers):
        with set_model_tag("hybrid_whole"):
            return (WholeStack(vllm_config=vllm_config, prefix=f"{prefix}.whole", layers=layers),)
    with set_model_tag("hybrid_lower"):
        lower = LowerStack(vllm_config=vllm_config, prefix=f"{prefix}.lower", layers=layers[:split])
    with set_model_tag("hybrid_upper"):
        return lower, UpperStack(vllm_config=vllm_config, prefix=f"{prefix}.upper", layers=layers[split:])


class HybridLlamaModel(nn.Module):
    """Llama's decoder over the live rows of a step, in two stacks with a KV tier each."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", hybrid: HybridConfig, patches: int
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.hybrid = hybrid
        self.attention_ops = select_attention(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config
        )
        attention = _attention_type(hybrid)
        split = lower_layers(config, hybrid)
        ranking = split - 1 if hybrid.prunes else None
        self.layers = nn.ModuleList(
            (RankingDecoderLayer if i == ranking else LlamaDecoderLayer)(
                vllm_config=vllm_config,
                prefix=f"{prefix}.layers.{i}",
                config=config,
                attn_layer_type=attention,
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # The stacks are kept out of the module tree: their layers are registered above, once.
        self._stacks = make_stacks(vllm_config, prefix, list(self.layers), split)
        self._first_layers = [self.layers[0], *([self.layers[split]] if len(self._stacks) > 1 else [])]
        self._pages = [TierPages(patches) for _ in self._stacks]
        scheduler = vllm_config.scheduler_config
        self._most_requests = scheduler.max_num_seqs
        self._most_rows = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        self._text_rows: RowPlan | None = None
        # One tensor for good: captured graphs write into it.
        self._foreign: torch.Tensor | None = None
        # Called with the images, lower and upper rows of every step that has images; see ``show``.
        self.watcher: Callable[[StepImages, RowPlan, RowPlan], None] | None = None
        self._max_positions = vllm_config.model_config.max_model_len
        self._cos_sin_cache: torch.Tensor | None = None

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def foreign_pages(self) -> torch.Tensor | None:
        """Whose pages held another request's data in the last step, bool [tiers, requests].

        None where the attention raises instead of reporting, and before the first step.
        """
        return self._foreign if self.attention_ops.flags_foreign_pages else None

    def copy_page_facts(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy page facts from block to block, in all tiers: which tier a block serves is not asked."""
        for pages in self._pages:
            pages.copy_facts(copies)

    def _set_up(self, device: torch.device) -> None:
        """Make what every step reads or writes: the cos-sin cache, facts, flags, a text's row plan."""
        self._set_cos_sin_cache(device)
        for pages, layer in zip(self._pages, self._first_layers, strict=True):
            pages.bind(layer.self_attn.attn.kv_cache)
        if self._text_rows is None:
            self._text_rows = plan_text_rows(self._most_rows, device)
        if self._foreign is None:
            self._foreign = torch.zeros(
                len(self._pages), self._most_requests, dtype=torch.bool, device=device
            )

    def _set_cos_sin_cache(self, device: torch.device) -> None:
        """Give every attention layer the cosines and sines of all positions, in float32."""
        if self._cos_sin_cache is not None:
            return
        head_size = self.layers[0].self_attn.head_dim
        theta = self.config.rope_parameters["rope_theta"]
        exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
        self._cos_sin_cache = make_cos_sin_cache(theta**-exponent, self._max_positions)
        for layer in self.layers:
            layer.self_attn.attn.impl.cos_sin_cache = self._cos_sin_cache

    def _tier_metadata(self) -> list[HybridMetadata] | None:
        """The runner's metadata of each tier, None in profiling runs."""
        attn_metadata = get_forward_context().attn_metadata
        if attn_metadata is None:
            return None
        assert isinstance(attn_metadata, dict), "micro-batches are refused at start"
        return [attn_metadata[layer.self_attn.attn.layer_name] for layer in self._first_layers]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        images: StepImages | None,
    ) -> torch.Tensor:
        """Hidden states of every virtual row of a step.

        Args:
            input_ids: int [N], used where there are no embeddings.
            positions: int64 [N], virtual positions.
            inputs_embeds: [N, hidden], an image's live tokens in the first rows of its stretch.
            images: the images of the step, None where there are none.

        Returns:
            [N, hidden]; in steps with images only the last virtual row of each request is filled.

        """
        hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        metadata = self._tier_metadata()
        if metadata is None:
            return self._forward_all_rows(positions, hidden_states)
        self._set_up(hidden_states.device)
        assert self._text_rows is not None
        common = metadata[0].common
        step = Step(
            positions=positions[: common.num_actual_tokens].long(),
            query_start_loc_cpu=common.query_start_loc_cpu[: common.num_reqs + 1].tolist(),
            images=images,
            text_rows=self._text_rows,
        )
        return self._forward_live_rows(step, metadata, hidden_states)

    def _forward_all_rows(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states, residual = self._stacks[0](positions, hidden_states)[:2]
        if len(self._stacks) > 1:
            hidden_states, residual = self._stacks[1](positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]

    def _plan_tier(self, tier: int, step: Step, row_plan: RowPlan, metadata: list[HybridMetadata]) -> None:
        """Plan a tier's attention and leave the plan in its metadata, where its layers look for it."""
        assert self._foreign is not None
        metadata[tier].plan = store_facts_and_plan(
            step, row_plan, metadata[tier].common, self._pages[tier], self._foreign[tier], self.attention_ops
        )

    def _importance(self, query: torch.Tensor, plan: AttentionPlan[KeyIndex] | None) -> torch.Tensor:
        """What the ranking queries of layer K - 1 give to the live rows, float32 [R] (FastV, section 3.2).

        Args:
            query: [rows, heads * head_size] of that layer, rotated; rows behind the plan's only fill up.
            plan: the lower tier's.

        """
        assert plan is not None and self._cos_sin_cache is not None
        attention = self.layers[self.hybrid.fastv_layer - 1].self_attn
        query = query[: plan.batch.kv_row_index.shape[0]].unflatten(-1, (attention.num_heads, -1))
        kv_rows, _ = as_kv_rows(attention.attn.kv_cache)
        scale = attention.scaling * attention.attn._k_scale_float
        return self.attention_ops.importance(query, kv_rows, plan, self._cos_sin_cache, scale)

    def _forward_live_rows(
        self, step: Step, metadata: list[HybridMetadata], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        virtual_rows = hidden_states.shape[0]
        row_plan = live = step.lower_rows()
        self._plan_tier(0, step, live, metadata)
        rows = pad_to_bucket(live.rows)
        in_place = step.images is None and virtual_rows == rows.shape[0]
        if not in_place:
            hidden_states = hidden_states[rows]
        positions = _rope_positions(live, step, rows.shape[0])
        hidden_states, residual, *queries = self._stacks[0](positions, hidden_states)
        if len(self._stacks) > 1:
            if step.ranking_queries:
                importance = self._importance(queries[0], metadata[0].plan)
                heads = self.config.num_attention_heads
                row_plan = step.upper_rows(live, importance, heads)
                rows = pad_to_bucket(row_plan.rows)
                kept = torch.searchsorted(live.rows, rows)
                hidden_states, residual = hidden_states[kept], residual[kept]
                positions = _rope_positions(row_plan, step, rows.shape[0])
            # A view of all queries, keys and values of layer K - 1, which need not outlive the choice.
            del queries
            self._plan_tier(1, step, row_plan, metadata)
            hidden_states, residual = self._stacks[1](positions, hidden_states, residual)
        if self.watcher is not None and step.images is not None:
            self.watcher(step.images, live, row_plan)
        hidden_states = self.norm(hidden_states, residual)[0]
        if in_place:
            return hidden_states
        # Of the virtual rows only each request's last one is ever sampled from.
        virtual = hidden_states.new_empty(virtual_rows, hidden_states.shape[1])
        last = metadata[0].common.query_start_loc[1 : len(step.query_start_loc_cpu)].long() - 1
        virtual.index_copy_(0, last, hidden_states[row_plan.row_of[last]])
        return virtual

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def make_empty_intermediate_tensors(self, *args: object, **kwargs: object) -> IntermediateTensors:
        raise NotImplementedError("pipeline parallelism is refused at start")


def _rope_positions(row_plan: RowPlan, step: Step, rows: int) -> torch.Tensor:
    """Positions to rotate rows to, int64 [rows], at least as many as the plan has.

    A text row's is its own; image rows and padding have 0, which rotates nothing.
    """
    if step.images is None:
        rope_pos = step.positions
    else:
        rope_pos = torch.where(row_plan.image < 0, step.positions[row_plan.rows], 0)
    padding = rows - rope_pos.shape[0]
    return rope_pos if padding == 0 else F.pad(rope_pos, (0, padding))


def _attention_type(hybrid: HybridConfig) -> type[LlamaAttention]:
    """The attention class of one model: vLLM's decoder layer passes a class, not arguments, on."""

    class Attention(HybridLlamaAttention):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, hybrid=hybrid, **kwargs)  # type: ignore[arg-type]

    return Attention


class HybridLlamaForCausalLM(LlamaForCausalLM):
    """Llama with a decoder that computes live rows only; head and weights are vLLM's."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", hybrid: HybridConfig, patches: int
    ) -> None:
        self._hybrid, self._patches = hybrid, patches
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _init_model(
        self,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = LlamaDecoderLayer,
    ) -> HybridLlamaModel:
        return HybridLlamaModel(
            vllm_config=vllm_config, prefix=prefix, hybrid=self._hybrid, patches=self._patches
        )
