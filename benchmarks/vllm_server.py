"""A `vllm serve` of its own process on a free port of this machine, what it says, and its end.

Nothing here has a time limit but the last: what is waited for comes, or the server ends and with it the
waiting.
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
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Ports that the system hands out to nobody who does not ask for them by number.
_PORTS = range(20000, 32000)
# Seconds that a server gets to end by itself when nobody waits for it any more.
_PATIENCE_S = 60


class VllmServer:
    """A server of one checkpoint. As a context it is ready inside, and gone behind it.

    Args:
        checkpoint: folder of the model.
        log: file that takes what the server prints.
        overrides: for --hf-overrides.
        options: more arguments of `vllm serve`.
        environment: more variables of its process.

    """

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        overrides: Mapping[str, Any],
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self.port = _free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint)]
        command += ["--host=127.0.0.1", f"--port={self.port}", f"--hf-overrides={json.dumps(overrides)}"]
        usual = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        with log.open("wb") as file:
            # A session of its own, so that its children can be ended with it.
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=usual | dict(os.environ) | dict(environment or {}),
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """All the server has printed."""
        return self.log.read_text(errors="replace")

    def ready(self) -> Self:
        """Wait until the server answers. Where the waiting is broken off, the server ends.

        Raises:
            RuntimeError: it ended; its last lines are in the message.

        """
        try:
            while self.process.poll() is None:
                try:
                    self._get("/health")
                    return self
                except (OSError, HTTPException):
                    time.sleep(0.2)
        except BaseException:
            self.kill()
            raise
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.output[-4000:]}")

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over its labels."""
        return summed_samples(self._get("/metrics"))

    def reduced(self, level: str | None = None) -> dict[str, float]:
        """The plugin's own counters by name: "images", "live_tokens", ...; of one level or of all."""
        return reduced(self._get("/metrics"), level)

    def post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """What the server answers to a JSON object.

        Raises:
            urllib.error.HTTPError: it refuses it.

        """
        with urllib.request.urlopen(self._request(path, content)) as answer:
            return json.load(answer)

    def stream(self, path: str, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The pieces of an answer that the server sends one by one, each as it comes.

        Raises:
            urllib.error.HTTPError: it refuses the request.
            RuntimeError: it breaks off; the message is the server's.

        """
        with urllib.request.urlopen(self._request(path, content)) as answer:
            for data in events(answer):
                if data == "[DONE]":
                    continue
                piece = json.loads(data)
                if "error" in piece:
                    raise RuntimeError(f"the server broke off: {piece['error']}")
                yield piece

    def interrupt(self) -> int:
        """Ask the server to end as Ctrl-C does, wait for it, and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait()

    def kill(self) -> None:
        """End the server and its children at once, if any of them is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self.ready()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_PATIENCE_S)
        self.kill()

    def _request(self, path: str, content: Mapping[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(self.url + path, json.dumps(content).encode(), headers)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read().decode()


def events(answer: Iterable[bytes]) -> Iterator[str]:
    """The data of a stream's events, each as it comes."""
    for line in answer:
        if data := line.decode().partition("data: ")[2].strip():
            yield data


def reduced(metrics: str, level: str | None = None) -> dict[str, float]:
    """The plugin's own counters in a text of /metrics by name, of one level or of all."""
    own, total = "vllm_hybrid:", "_total"
    labels = {} if level is None else {"level": level}
    return {
        name.removeprefix(own).removesuffix(total): value
        for name, value in summed_samples(metrics, labels).items()
        if name.startswith(own) and name.endswith(total)
    }


def summed_samples(metrics: str, labels: Mapping[str, str] | None = None) -> dict[str, float]:
    """Every sample of a text of /metrics that has all of some labels, by its name, summed over the others."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = {}
    wanted = set((labels or {}).items())
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if wanted <= set(sample.labels.items()):
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def _free_port() -> int:
    """A port that is free now, and that nobody else is likely to take until the server does."""
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free")
