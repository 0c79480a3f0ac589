"""Dense causal attention by vLLM's own CPU kernel, which outruns torch's several times in bf16."""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa


_BLOCK = 128


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ptr: torch.Tensor,
    key_ptr: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """:func:`vllm_hybrid.cpu_attention.torch_causal_attention` by vLLM's kernel; same arguments and result.

    The kernel reads keys from pages, so they are laid out in scratch pages first.
    """
    sequences = key_ptr.shape[0] - 1
    lengths = key_ptr.diff()
    blocks = -(-lengths // _BLOCK)
    first_block = blocks.cumsum(0) - blocks
    places = torch.arange(key.shape[0]) - key_ptr[:-1].repeat_interleave(lengths)
    slots = places + (first_block * _BLOCK).repeat_interleave(lengths)
    table = (first_block[:, None] + torch.arange(int(blocks.max()))).int()
    heads, head_size = query.shape[1:]
    kv_heads = key.shape[1]
    isa = _get_attn_isa(query.dtype, _BLOCK, head_size, "auto")
    cache = query.new_empty(int(blocks.sum()), kv_heads, 2 * _BLOCK, head_size)
    key_cache, value_cache = cache.chunk(2, dim=2)
    # The kernel multiplies whole blocks, so what stands behind the last key must be finite.
    ends = first_block + blocks - 1
    cache[ends] = 0
    ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    starts, seq_lens = query_ptr.int(), lengths.int()
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=sequences,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_size,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=starts,
        seq_lens=seq_lens,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0,
        scheduler_metadata=schedule,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return out


