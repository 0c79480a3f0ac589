"""Checks of what serving on CUDA needs: a device, Triton, and FlashAttention for fast prefills."""

from __future__ import annotations

from vllm_hybrid.doctor import fresh
from vllm_hybrid.doctor.finding import Finding
from vllm_hybrid.doctor.installed import Environment

# The kernels are written for these and later ones: docs/kernels.md.
LEAST_CAPABILITY = (8, 0)
_DEVICES = (
    "import torch\n"
    "torch.cuda.init()\n"
    "found([[torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)]"
    " for i in range(torch.cuda.device_count())])"
)
_TRITON = "import triton; found(triton.__version__)"
_FLASH = (
    "import torch\n"
    "from vllm.vllm_flash_attn import fa_version_unsupported_reason as why_not\n"
    "reasons = {version: why_not(version) for version in (2, 3, 4)}\n"
    "found([[v for v, reason in reasons.items() if reason is None], str(reasons)])"
)


def check_cuda(environment: Environment) -> list[Finding]:
    """Devices, Triton and FlashAttention of a CUDA environment; nothing for a CPU's."""
    if environment.for_cpu or environment.torch.cuda is None:
        return []
    return [_check_devices(), _check_triton(), _check_flash_attention()]


def _check_devices() -> Finding:
    ran = fresh.run(_DEVICES)
    if not ran.result:
        gap = f"no GPU can be used ({ran.error or 'none is visible'})"
        return Finding(
            "CUDA", "", gap, "see that nvidia-smi shows one, and CUDA_VISIBLE_DEVICES does not hide it"
        )
    names = ", ".join(f"{name} (compute capability {major}.{minor})" for name, major, minor in ran.result)
    if all((major, minor) < LEAST_CAPABILITY for _, major, minor in ran.result):
        return Finding("CUDA", names, "the kernels need 8.0 or later", "serve on a newer GPU")
    return Finding("CUDA", names)


def _check_triton() -> Finding:
    ran = fresh.run(_TRITON)
    if ran.result is None:
        return Finding(
            "Triton", "", f"cannot be imported ({ran.error})", "install what the installed torch requires"
        )
    return Finding("Triton", ran.result)


def _check_flash_attention() -> Finding:
    ran = fresh.run(_FLASH)
    remedy = "install vllm anew; without it Triton attends in prefill, which is slower"
    if ran.result is None:
        return Finding("FlashAttention", "", f"vLLM's cannot be imported ({ran.error})", remedy)
    usable, reasons = ran.result
    if not usable:
        return Finding("FlashAttention", "", f"none of vLLM's can be used ({reasons})", remedy)
    return Finding("FlashAttention", f"vLLM's, version {' and '.join(map(str, usable))}")
