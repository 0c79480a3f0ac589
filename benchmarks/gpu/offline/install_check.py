"""Import what the benchmark imports and run the carried libraries' kernels once: what `install.py` starts.

    python install_check.py [NAME ...]

skips what is named, and prints one line before each step (`BEGIN name`), one for each that fails
(`SAY sentence`), and `END`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO))

SCRIPTS = [
    ".".join(file.relative_to(REPO).with_suffix("").parts)
    for file in sorted((REPO / "benchmarks" / "gpu").rglob("[a-z]*.py"))
    if file != Path(__file__).resolve()
]
# What stock vLLM and the plugin load to serve LLaVA on one GPU, and what measures them.
MODULES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.platforms.cuda",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.model_executor.models.llava",
    "vllm_hybrid",
    "vllm_hybrid_plugin",
    "vllm_hybrid_stat_logger",
    "vllm_hybrid.attention.backend",
    "vllm_hybrid.models.llava",
    "vllm_hybrid.engine.scheduler",
    "vllm_hybrid.attention.gpu",
    "tests.support.engines",
    "tests.support.reference",
    "tests.support.tiny_checkpoints",
    *SCRIPTS,
)
# These import only where Triton has a device.
GPU_MODULES = (
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm_hybrid.engine.cuda_worker",
)
# bf16 against float32, relative to the largest value.
TOLERANCE = 0.02


def plugin_is_found() -> None:
    """vLLM finds the plugin by its entry point, so it must lie beside the package as it was installed."""
    from importlib.metadata import entry_points

    if "hybrid" not in entry_points(group="vllm.general_plugins").names:
        raise LookupError("no entry point hybrid in vllm.general_plugins")


def vllm_kernel_runs() -> None:
    """One kernel of vLLM's own library, against plain torch."""
    import torch
    from vllm import _custom_ops

    x = torch.randn(7, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    out = torch.full_like(x, float("nan"))
    _custom_ops.rms_norm(out, x, weight, 1e-5)
    wide = x.float().cpu()
    _compare(out, wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5))


def flash_attention_runs() -> None:
    """FlashAttention 3 at the decoder's and the tower's head size, against plain torch."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    for head_size, causal in ((128, True), (64, False)):
        q, k, v = torch.randn(3, 65, 4, head_size, device="cuda", dtype=torch.bfloat16).unbind()
        borders = torch.tensor([0, 65], device="cuda", dtype=torch.int32)
        out = flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            max_seqlen_q=65,
            cu_seqlens_q=borders,
            max_seqlen_k=65,
            cu_seqlens_k=borders,
            causal=causal,
            fa_version=3,
        )
        wide = [x.float().cpu().transpose(0, 1) for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal)
        _compare(out, wanted.transpose(0, 1))


def _compare(found: object, wanted: object) -> None:
    """Raises ArithmeticError where a result on the device is off."""
    import torch

    assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor)
    error = float((found.float().cpu() - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise ArithmeticError(f"its result is off by {error:.3g} of the largest value")


def sentence(name: str, step: Callable[[], object], failed: str) -> str | None:
    """Run one step; what to say where it fails."""
    print("BEGIN", name, flush=True)
    try:
        step()
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return f"{name} {failed}: {type(error).__name__}: {reason}"
    return None


def say(name: str, step: Callable[[], object], failed: str) -> None:
    """Run one step unless the command line names it, and print what there is to say."""
    if name in sys.argv[1:]:
        return
    text = sentence(name, step, failed)
    if text is not None:
        print("SAY", text, flush=True)


def main() -> None:
    for name in MODULES:
        say(name, functools.partial(importlib.import_module, name), "cannot be imported")
    say("the plugin's entry point", plugin_is_found, "is not found")
    import torch

    if torch.cuda.is_available():
        for name in GPU_MODULES:
            say(name, functools.partial(importlib.import_module, name), "cannot be imported")
        say("vLLM's library", vllm_kernel_runs, "does not run on this device")
        say("FlashAttention 3", flash_attention_runs, "does not run on this device")
    else:
        print(
            "SAY there is no CUDA device on this host, so neither vLLM's GPU worker nor a kernel was tried."
        )
    print("END", flush=True)


if __name__ == "__main__":
    main()
