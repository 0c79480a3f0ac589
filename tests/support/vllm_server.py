"""A `vllm serve` of a tiny checkpoint, for tests, and how they talk to it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image

from benchmarks.vllm_server import VllmServer

_OPTIONS = [
    "--served-model-name=tiny",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=4096",
    "--max-num-seqs=32",
    "--kv-cache-memory-bytes=134217728",
    "--max-logprobs=8",
    f"--limit-mm-per-prompt={json.dumps({'image': 3})}",
]
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


class Server(VllmServer):
    """A server of one checkpoint, float32 and eager."""

    def __init__(self, checkpoint: Path, log: Path, hybrid: Mapping[str, Any], *options: str) -> None:
        """Start it; `ready` waits until it answers.

        Args:
            checkpoint: folder of the model.
            log: file that takes what the server prints.
            hybrid: the hybrid section.
            options: more arguments of `vllm serve`.

        """
        super().__init__(checkpoint, log, {"hybrid": dict(hybrid)}, [*_OPTIONS, *options], _ENVIRONMENT)

    def client(self) -> OpenAI:
        """A client that waits as long as it takes and asks once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=None)


def png(image: Image.Image) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """A picture's file as the API takes it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
