"""A `vllm serve` for tests: its own process on a free port of this machine, taken down at the end.

Nothing here has a time limit: what is waited for comes, or the server ends and with it the waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
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

# Ports that the system hands out to nobody who does not ask for them by number.
_PORTS = range(20000, 32000)
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
            RuntimeError: it ended; its last lines are in the message.

        """
        while self.process.poll() is None:
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
        return self.process.wait()

    def kill(self) -> None:
        """End the server and its children at once, if any of them is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """What the server answers to a JSON object.

        Raises:
            urllib.error.HTTPError: it refuses it.

        """
        data, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as answer:
            return json.load(answer)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read().decode()


def _free_port() -> int:
    """A port that is free now, and that nobody else is likely to take until the server does."""
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free")
