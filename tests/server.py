"""A `vllm serve` for tests: its own process on a free port of this machine, taken down at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STARTING, STOPPING = 180.0, 30.0
_OPTIONS = [
    "--served-model-name=tiny",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=2048",
    "--max-num-seqs=32",
    "--kv-cache-memory-bytes=134217728",
    "--max-logprobs=8",
    "--host=127.0.0.1",
]


class Server:
    """A server of one checkpoint and what it says."""

    def __init__(self, checkpoint: Path, log: Path, hybrid: Mapping[str, Any], *options: str) -> None:
        """Start it; `ready` waits until it answers.

        Args:
            checkpoint: folder of the model.
            log: file that takes what the server prints.
            hybrid: the hybrid section.
            options: more arguments of `vllm serve`.

        """
        self.log = log
        self.port = _free_port()
        overrides = json.dumps({"hybrid": dict(hybrid)})
        images = json.dumps({"image": 3})
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *_OPTIONS]
        command += [f"--port={self.port}", f"--hf-overrides={overrides}", f"--limit-mm-per-prompt={images}"]
        variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        with log.open("wb") as file:
            # A session of its own, so that a failed test can take down the server's children too.
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """All the server has printed."""
        return self.log.read_text(errors="replace")

    def ready(self) -> Server:
        """Wait until the server answers.

        Raises:
            RuntimeError: it ended, or took longer than `STARTING` seconds; its last lines are in the message.

        """
        end = time.monotonic() + STARTING
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self._get("/health")
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.output[-4000:]}")

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over its labels."""
        from prometheus_client.parser import text_string_to_metric_families

        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._get("/metrics")):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def interrupt(self) -> int:
        """Ask the server to end as Ctrl-C does, wait for it, and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOPPING)

    def kill(self) -> None:
        """End the server and its children at once, if any of them is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOPPING)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
