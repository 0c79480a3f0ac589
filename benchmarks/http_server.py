"""A running `vllm serve`, and the counters it shows."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

VLLM = str(Path(sys.executable).with_name("vllm"))
SERVED_NAME = "bench"
# Seconds; a busy machine takes minutes to import and compile.
_STARTING, _STOPPING = 900, 60
_LAST_LINES = 15


@contextlib.contextmanager
def running_server(
    checkpoint: Path, options: Sequence[str], overrides: dict[str, Any], log: Path
) -> Iterator[str]:
    """Start a server, wait until it answers, stop it at the end.

    Args:
        checkpoint: folder to serve, under the name SERVED_NAME.
        options: further options of `vllm serve`.
        overrides: for --hf-overrides.
        log: file for its output.

    Yields:
        Its address.

    Raises:
        RuntimeError: it ended or did not answer in time.

    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [VLLM, "serve", str(checkpoint), "--served-model-name", SERVED_NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), *options, "--hf-overrides", json.dumps(overrides)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **os.environ}
    with log.open("w") as file:
        # A session of its own, so that its children can be ended with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address
        finally:
            _stop(process)


def counters(address: str) -> dict[str, float]:
    """The server's own counters by name, without what they have in common: "images", "live_tokens", ..."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("vllm_hybrid:") and "_total" in name:
            found[name.removeprefix("vllm_hybrid:").split("_total")[0]] = float(value)
    return found


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _STARTING
    while time.monotonic() < until:
        if process.poll() is not None:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise RuntimeError(f"the server ended with code {process.returncode}; {log} ends in\n{last}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"the server was not up after {_STARTING} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; what is left of it after a while is killed."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_STOPPING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
