"""How a server ends while clients wait: SIGINT or SIGTERM in the middle of streamed answers.

For each server (the plugin's, the same checkpoint with everything switched off, vLLM's own LLaVA), signal and
`--shutdown-timeout`: seconds from the signal to the end of the process, what the clients had, and what is
left of it: processes, segments of shared memory, temporary files, the port. A stop that has not ended some
time past its timeout hangs; the clients then leave, and what that does not end is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint import data_url  # noqa: E402
from benchmarks.vllm_server import VllmServer, events  # noqa: E402

NAME = "shutdown"
SERVERS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "off": {"hybrid": None},
    "stock": {"architectures": ["LlavaForConditionalGeneration"], "hybrid": None},
}
# Signals to the server's first process, as `kill` and container runtimes send them; or to all of its
# processes, as Ctrl-C in a terminal and systemd do.
SIGNALS = {
    "SIGTERM": (signal.SIGTERM, False),
    "SIGINT": (signal.SIGINT, False),
    "Ctrl-C": (signal.SIGINT, True),
    "SIGTERM to all": (signal.SIGTERM, True),
}


@dataclass
class Client:
    """One client, and what it has seen of its answer.

    Attributes:
        end: how the answer ended; empty until it did.
        ended: when.

    """

    server: VllmServer
    picture: str
    tokens: int
    pieces: int = 0
    end: str = ""
    ended: float = 0.0
    started: threading.Event = field(default_factory=threading.Event)
    connection: HTTPConnection | None = None

    def ask(self) -> None:
        """Ask, and read until the answer ends, one way or another."""
        try:
            self.end = self._read()
        except (OSError, HTTPException, ValueError) as error:
            self.end = f"cut: {type(error).__name__}"
        self.ended = time.monotonic()
        self.started.set()

    def leave(self) -> None:
        """Close the connection."""
        if self.connection is not None and self.connection.sock is not None:
            with contextlib.suppress(OSError):
                self.connection.sock.shutdown(socket.SHUT_RDWR)

    def _read(self) -> str:
        image = {"type": "image_url", "image_url": {"url": self.picture, "detail": "low"}}
        parts = [image, {"type": "text", "text": "What is in the picture?"}]
        content = {
            "model": NAME,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
        }
        self.connection = HTTPConnection("127.0.0.1", self.server.port)
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(content), headers)
        answer = self.connection.getresponse()
        if answer.status != 200:
            return f"status {answer.status}: {json.loads(answer.read())['error']['message'][:60]}"
        reason = None
        for data in events(answer):
            if data == "[DONE]":
                return f"stream ended, finish_reason {reason}"
            piece = json.loads(data)
            if "error" in piece:
                return f"stream ended in error: {piece['error']['message'][:60]}"
            self.pieces += 1
            reason = piece["choices"][0]["finish_reason"]
            if self.pieces > 2:
                self.started.set()
        return "cut: the stream stopped"


@dataclass(frozen=True)
class Stop:
    """What one stop was like.

    Attributes:
        seconds: from the signal to the end of the first process, or as long as was waited.
        hung: whether it had not ended by then.
        status: of the first process; None where it did not end after its clients had left either.
        ends: how many clients saw what.
        last_s: seconds from the signal to the end of the last client's answer.
        late: what a client saw that asked after the signal.
        left: what was left.

    """

    server: str
    signal: str
    timeout: int
    seconds: float
    hung: bool
    status: int | None
    ends: dict[str, int]
    last_s: float
    late: str
    left: list[str]


def processes(group: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def shared_memory(pids: Sequence[int]) -> set[str]:
    """Files in /dev/shm that some processes have mapped."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line and not line.endswith("(deleted)"):
                    found.add(line[line.index("/dev/shm/") :])
    return found


def left_behind(server: VllmServer, segments: set[str], folder: Path) -> list[str]:
    """What is there of a server whose first process has ended; its helpers get some seconds to follow."""
    until = time.monotonic() + 10
    while processes(server.process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    found = [f"process {pid}" for pid in processes(server.process.pid)]
    found += sorted(name for name in segments if Path(name).exists())
    found += sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
    with socket.socket() as probe:
        # As the next server would.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", server.port))
        except OSError:
            found.append("port")
    return found


@contextlib.contextmanager
def asking(server: VllmServer, number: int, tokens: int) -> Iterator[list[Client]]:
    """Clients whose answers have begun; they leave at the end."""
    clients = [Client(server, data_url(index), tokens) for index in range(number)]
    threads = [threading.Thread(target=client.ask) for client in clients]
    for thread in threads:
        thread.start()
    try:
        for client in clients:
            client.started.wait()
        if early := [client.end for client in clients if client.end]:
            raise RuntimeError(f"answers ended before the signal: {early}")
        yield clients
    finally:
        for client in clients:
            client.leave()
        for thread in threads:
            thread.join()


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends in some seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    return process.poll() is not None


def late_client(server: VllmServer, tokens: int) -> str:
    """What /health says now, and what a client sees that asks now; it waits a few seconds for it."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=3)
    try:
        connection.request("GET", "/health")
        health = f"/health {connection.getresponse().status}"
    except (OSError, HTTPException) as error:
        health = f"/health {type(error).__name__}"
    finally:
        connection.close()
    client = Client(server, data_url(99), tokens)
    thread = threading.Thread(target=client.ask)
    thread.start()
    thread.join(3)
    end = client.end or f"{client.pieces} pieces, then waits"
    client.leave()
    thread.join()
    return f"{health}; {end}"


@contextlib.contextmanager
def starting(
    checkpoint: Path, server_name: str, timeout: int, args: argparse.Namespace
) -> Iterator[tuple[VllmServer, Path]]:
    """A server that has just been started, and the folder of its temporary files."""
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--served-model-name", NAME, f"--shutdown-timeout={timeout}", *args.serve_arg]
        environment = {"TMPDIR": temporary, "VLLM_RPC_BASE_PATH": temporary}
        server = VllmServer(checkpoint, args.log, SERVERS[server_name], options, environment)
        try:
            yield server, Path(temporary)
        finally:
            server.kill()


def send(server: VllmServer, signal_name: str) -> None:
    """Send a signal, where the server's first process is still there."""
    number, everyone = SIGNALS[signal_name]
    if server.process.poll() is None:
        (os.killpg if everyone else os.kill)(server.process.pid, number)


def stop(
    checkpoint: Path, server_name: str, signal_name: str, timeout: int, args: argparse.Namespace
) -> Stop:
    """Start a server, let clients ask, send the signal, and look."""
    late = ""
    with starting(checkpoint, server_name, timeout, args) as (server, folder):
        server.ready()
        with asking(server, args.clients, args.answer) as clients:
            segments = shared_memory(processes(server.process.pid))
            began = time.monotonic()
            send(server, signal_name)
            if args.late:
                time.sleep(0.5)
                late = late_client(server, args.answer)
            if args.again:
                time.sleep(args.again)
                send(server, signal_name)
            in_time = wait(server.process, timeout + args.patience)
            seconds = time.monotonic() - began
            ends = Counter(client.end or "waits" for client in clients)
            last = max((client.ended - began for client in clients if client.end), default=0.0)
        if not in_time:
            wait(server.process, args.patience)
        status = server.process.poll()
        left = left_behind(server, segments, folder)
    return Stop(
        server_name,
        signal_name,
        timeout,
        round(seconds, 2),
        not in_time,
        status,
        dict(ends),
        round(last, 2),
        late,
        left,
    )


def stop_early(
    checkpoint: Path, server_name: str, signal_name: str, after: float, args: argparse.Namespace
) -> Stop:
    """Start a server, send the signal some seconds later, before it answers, and look."""
    with starting(checkpoint, server_name, 0, args) as (server, folder):
        time.sleep(after)
        segments = shared_memory(processes(server.process.pid))
        began = time.monotonic()
        send(server, signal_name)
        in_time = wait(server.process, args.patience)
        seconds = time.monotonic() - began
        status = server.process.poll()
        left = left_behind(server, segments, folder)
    return Stop(
        server_name,
        f"{signal_name} after {after:g} s",
        0,
        round(seconds, 2),
        not in_time,
        status,
        {},
        0.0,
        "",
        left,
    )


def report(found: Stop, out: Path | None) -> None:
    """Print a stop, and append it to a file."""
    line = json.dumps(asdict(found))
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of `vllm-hybrid demo-model`")
    parser.add_argument("--servers", default="hybrid,off,stock")
    parser.add_argument("--signals", default="SIGTERM,Ctrl-C")
    parser.add_argument("--timeouts", default="0,5,30")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--answer", type=int, default=3000, help="tokens of an answer")
    parser.add_argument("--early", help="no clients: the signal so many seconds after the start, such as 2,8")
    parser.add_argument("--late", action="store_true", help="one client asks after the signal")
    parser.add_argument("--again", type=float, default=0, help="the signal once more, after so many seconds")
    parser.add_argument("--patience", type=float, default=30, help="seconds past the timeout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve-arg", action="append", default=[], help="one more of vllm serve")
    parser.add_argument("--log", type=Path, default=Path("shutdown.log"))
    parser.add_argument("--out", type=Path, help="JSON lines, appended")
    args = parser.parse_args()
    for _ in range(args.repeats):
        for server in args.servers.split(","):
            for name in args.signals.split(","):
                if args.early:
                    for after in args.early.split(","):
                        report(stop_early(args.checkpoint, server, name, float(after), args), args.out)
                    continue
                for timeout in args.timeouts.split(","):
                    report(stop(args.checkpoint, server, name, int(timeout), args), args.out)


if __name__ == "__main__":
    main()
