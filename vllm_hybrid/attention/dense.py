"""Who attends in a prefill on CUDA: vLLM's FlashAttention, or our own kernel where that does not serve."""

from __future__ import annotations

import functools

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from vllm_hybrid.attention.triton_kernels.dense import DenseAttention, causal_attention
from vllm_hybrid.errors import one_line

# vLLM shows what its own loggers and those below them say.
logger = init_logger(f"vllm.{__name__}")

# FlashAttention's limits: arXiv 2307.08691, and its authors' interface.
_MOST_CHANNELS = 256
_CHANNELS = 8


def select_dense_attention(dtype: torch.dtype, head_size: int) -> DenseAttention:
    """Causal attention of packed sequences, for heads of a dtype and size on this platform.

    FlashAttention of the version that vLLM takes itself on this device, or is told to take by the server's
    configuration, which must be the current one; Triton in float32 and for other head sizes.
    """
    version, reason = _flash_version(dtype, head_size)
    if version is None:
        logger.info_once("Prefills attend with Triton: %s", reason)
        return causal_attention
    logger.info_once("Prefills attend with FlashAttention %d", version)
    return functools.partial(flash_attention, version)


def _flash_version(dtype: torch.dtype, head_size: int) -> tuple[int | None, str]:
    """The version of FlashAttention to use; None and why where there is none."""
    if not current_platform.is_cuda():
        return None, f"FlashAttention does not run on {current_platform.device_name}"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"FlashAttention does not compute in {dtype}"
    if head_size > _MOST_CHANNELS or head_size % _CHANNELS:
        return None, f"FlashAttention does not take heads of {head_size} channels"
    try:
        # Whether its compiled files are there and load is looked up on import.
        from vllm.vllm_flash_attn import fa_version_unsupported_reason
    except ImportError as error:
        return None, one_line(error)
    version = get_flash_attn_version(head_size=head_size)
    if version is None:
        return None, "vLLM's FlashAttention of the version asked for does not serve this device"
    reason = fa_version_unsupported_reason(version)
    return (version, "") if reason is None else (None, reason)


def flash_attention(
    version: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start: torch.Tensor,
    key_start: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """As :func:`causal_attention`, by vLLM's FlashAttention; keys are not split, so runs agree to the bit."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=query_start,
        max_seqlen_q=longest_query,
        cu_seqlens_k=key_start,
        max_seqlen_k=longest_key,
        softmax_scale=scale,
        causal=True,
        fa_version=version,
        num_splits=1,
    )
