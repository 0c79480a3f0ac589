"""Which implementation of attention a process uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_hybrid.attention.interface import AttentionOps, AttentionPlan, KeyIndex

IMPLEMENTATION_ENV = "VLLM_HYBRID_ATTENTION"

# What --kv-cache-dtype may say. FP8 is float8_e4m3fn, which hardware converts from sm_89 on.
_FLOATS = ("auto", "float16", "bfloat16")
_FP8 = ("fp8", "fp8_e4m3")
_FP8_CAPABILITY = 89

# What an implementation makes is only ever given back to itself, so its users see the bases.
AnyAttentionOps = AttentionOps[KeyIndex, AttentionPlan[KeyIndex]]


def _reference(vllm_config: VllmConfig) -> AttentionOps[Any, Any]:
    from vllm_hybrid.attention.reference import ReferenceAttention

    return ReferenceAttention()


def _cpu(vllm_config: VllmConfig) -> AttentionOps[Any, Any]:
    # vLLM's CPU modules do not belong in a process that serves on CUDA.
    from vllm_hybrid.attention.cpu import CpuAttention
    from vllm_hybrid.attention.cpu_dense import DenseCausalAttention

    return CpuAttention(DenseCausalAttention)


def _triton(vllm_config: VllmConfig) -> AttentionOps[Any, Any]:
    # Triton comes with vLLM on CUDA; a CPU does without, unless it interprets the kernels.
    from vllm_hybrid.attention.dense import select_dense_attention
    from vllm_hybrid.attention.gpu import GpuAttention

    model = vllm_config.model_config
    return GpuAttention(select_dense_attention(model.dtype, model.get_head_size()))


IMPLEMENTATIONS: dict[str, Callable[[VllmConfig], AttentionOps[Any, Any]]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
}


def _name() -> str:
    return os.environ.get(IMPLEMENTATION_ENV, "cpu" if current_platform.is_cpu() else "triton")


def compiles_cpp() -> bool:
    """Whether this process's implementation is the one in C++."""
    return _name() == "cpu"


def serves_kv_dtype(cache_dtype: str) -> bool:
    """Whether the implementation of this process reads and writes a KV cache of one of vLLM's dtypes."""
    if cache_dtype in _FP8 and _name() == "triton":
        return current_platform.is_cpu() or current_platform.has_device_capability(_FP8_CAPABILITY)
    return cache_dtype in _FLOATS


def select_attention(vllm_config: VllmConfig) -> AnyAttentionOps:
    """The implementation VLLM_HYBRID_ATTENTION names; where it is not set, the platform's.

    Args:
        vllm_config: the server's, which is vLLM's current one.

    Raises:
        ValueError: the environment names none that exists.
        RuntimeError: the CPU's cannot be compiled.

    """
    name = _name()
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{IMPLEMENTATION_ENV}={name!r} is not an implementation; use one of {sorted(IMPLEMENTATIONS)}"
        )
    return cast(AnyAttentionOps, IMPLEMENTATIONS[name](vllm_config))
