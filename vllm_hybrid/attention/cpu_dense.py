"""Dense attention by vLLM's own CPU kernel, which outruns torch's several times in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_hybrid.attention.cpu import Workspace

_BLOCK = 128


@dataclass
class ScratchPages:
    """Where the expanded keys of a step stand while the kernel reads them; one layout for all layers.

    Attributes:
        blocks: scratch blocks in all.
        last_blocks: int64 [sequences], the last block of each sequence.
        slots: int64 [keys], scratch slot of each key.
        table: int32 [sequences, blocks per sequence].
        query_start_loc: int32 [sequences + 1].
        lengths: int32 [sequences], keys of each sequence.
        schedule: the kernel's own plan, made with the first layer.

    """

    blocks: int
    last_blocks: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor
    query_start_loc: torch.Tensor
    lengths: torch.Tensor
    schedule: torch.Tensor | None = None

    @classmethod
    def lay_out(cls, query_start_loc: torch.Tensor, key_start_loc: torch.Tensor) -> ScratchPages:
        """Give every sequence blocks of its own.

        Args:
            query_start_loc: int64 [sequences + 1], each one's stretch of queries.
            key_start_loc: int64 [sequences + 1], each one's stretch of keys.

        """
        lengths = key_start_loc.diff()
        blocks = -(-lengths // _BLOCK)
        first = blocks.cumsum(0) - blocks
        shift = (first * _BLOCK - key_start_loc[:-1]).repeat_interleave(lengths)
        return cls(
            blocks=int(blocks.sum()),
            last_blocks=first + blocks - 1,
            slots=torch.arange(int(key_start_loc[-1])) + shift,
            table=(first[:, None] + torch.arange(int(blocks.max()))).int(),
            query_start_loc=query_start_loc.int(),
            lengths=lengths.int(),
        )


class DenseCausalAttention:
    """Causal attention inside each of several sequences, aligned at their ends, for every layer of a step.

    Args:
        query_start_loc: int64 [sequences + 1], each one's stretch of queries.
        key_start_loc: int64 [sequences + 1], each one's stretch of keys.
        memory: where scratch pages and results lie from layer to layer.

    """

    def __init__(self, query_start_loc: torch.Tensor, key_start_loc: torch.Tensor, memory: Workspace) -> None:
        self._start_locs = query_start_loc, key_start_loc
        self._memory = memory
        self._pages: ScratchPages | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend; shapes as :data:`vllm_hybrid.attention.cpu.DenseAttention` has them."""
        if self._pages is None:
            self._pages = ScratchPages.lay_out(*self._start_locs)
        return _attend(query, key, value, self._pages, scale, self._memory)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: ScratchPages,
    scale: float,
    memory: Workspace,
) -> torch.Tensor:
    heads, head_size = query.shape[1:]
    kv_heads = key.shape[1]
    isa = _get_attn_isa(query.dtype, _BLOCK, head_size, "auto")
    cache = memory.get("scratch pages", query, pages.blocks, kv_heads, 2 * _BLOCK, head_size)
    key_cache, value_cache = cache.chunk(2, dim=2)
    # The kernel multiplies whole blocks, so what stands behind a sequence's last key must be finite.
    cache[pages.last_blocks] = 0
    ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, pages.slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    if pages.schedule is None:
        pages.schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=pages.lengths.shape[0],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_size,
            seq_lens=pages.lengths,
            dtype=query.dtype,
            query_start_loc=pages.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )
    out = memory.get("copies", query, *query.shape)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=pages.query_start_loc,
        seq_lens=pages.lengths,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=pages.table,
        softcap=0,
        scheduler_metadata=pages.schedule,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return out
