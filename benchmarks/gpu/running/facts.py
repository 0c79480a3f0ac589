"""What is measured: device, versions, commit."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
# Where FlashAttention is not a distribution of its own it comes inside vLLM's.
PACKAGES = ("vllm", "vllm-hybrid", "torch", "triton", "transformers", "flash-attn")
NO_DEVICE = "there is no CUDA device; use a GPU host, or --tiny for a toy run on a CPU"


def versions() -> dict[str, str]:
    """Versions of what is measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def device(tiny: bool) -> dict[str, Any]:
    """The device that is measured.

    Returns:
        Its ``name`` and ``kind``; of a GPU also ``memory_bytes``, ``multiprocessors``, ``cuda``, ``driver``.

    Raises:
        RuntimeError: there is no GPU, and --tiny was not given.

    """
    import torch

    if tiny:
        return {"name": platform.machine(), "kind": "cpu"}
    if not torch.cuda.is_available():
        raise RuntimeError(NO_DEVICE)
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "kind": "cuda",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def driver() -> str:
    """Version of the NVIDIA driver, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: nvidia-smi is not installed"
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or f"unknown: {said.stderr.strip()}"


def library() -> str:
    """A fingerprint of the plugin's code: what was measured with other code is measured again."""
    package = importlib.util.find_spec("vllm_hybrid")
    assert package is not None and package.origin is not None
    digest = hashlib.sha256()
    for file in sorted(Path(package.origin).parent.rglob("*")):
        if file.suffix in (".py", ".cpp", ".h"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The checkout's commit, with ``+`` where files differ from it; ``unknown`` outside of a checkout."""
    if shutil.which("git") is None or not (REPO / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPO), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if changed else "")
