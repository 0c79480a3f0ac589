"""The command line: what it prints, its exit codes, and that a mistake is one sentence, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vllm_hybrid
from tests.conftest import Made
from tests.support.paths import ROOT
from tests.support.tiny_checkpoints import write_checkpoint
from vllm_hybrid import cli
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.demo.pictures import write_pictures
from vllm_hybrid.tools.thresholds import read_thresholds


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("plain") / "llava", architecture="LlavaForConditionalGeneration"
    )


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vllm-hybrid", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"vllm-hybrid {vllm_hybrid.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv[1:] = ['prepare', '--help']\n"
        "from vllm_hybrid import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fastv-ratio" in done.stdout


@pytest.mark.parametrize("arguments", [["prepare"], ["prepare", "a", "b", "--fastv-layer", "two"], ["fly"]])
def test_wrong_usage(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_prepare(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, thresholds = tmp_path / "out", tmp_path / "t.json"
    thresholds.write_text(json.dumps({"low": [0.5, 0.5, 0.5], "high": [0.9, 0.9, 0.9]}))
    options = ("--thresholds", thresholds, "--level", "low", "--fastv-layer", "3", "--fastv-ratio", "0.25")
    assert command(monkeypatch, "prepare", plain, out, *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: levels low (merging, FastV 0.25), high (merging, FastV 0.25), full (all tokens); "
        "default low; FastV after layer 3; serve it with",
        f"  vllm serve {out}",
    ]
    assert json.loads((out / "config.json").read_text())["hybrid"]["default_level"] == "low"

    assert command(monkeypatch, "prepare", plain, out) == 1
    error = capsys.readouterr().err
    reason = "exists and is not empty; give another folder, or --force to replace it"
    assert error == f"vllm-hybrid: error: {out} {reason}\n"
    assert command(monkeypatch, "prepare", plain, out, "--force") == 0
    assert "merging off, FastV off" in capsys.readouterr().out
    assert command(monkeypatch, "prepare", plain, out, "--force", "--fastv-ratio", "0.5") == 0
    assert "merging off, FastV 0.5 after layer 2" in capsys.readouterr().out


def test_prepare_with_levels(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What calibrate writes, prepare reads; and prepare can do both."""
    write_pictures(tmp_path / "pictures")
    numbers = ("--images", tmp_path / "pictures", "--tokens", "mid=250", "--tokens", "low=120")
    ratios = ("--fastv-ratio", "low=0.5", "--fastv-ratio", "pruned=0.75")
    file = tmp_path / "levels.json"
    assert command(monkeypatch, "calibrate", plain, *numbers, *ratios, "--out", file) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}, level mid: 3 thresholds for 250 tokens on average",
        f"{file}, level low: 3 thresholds for 120 tokens on average, FastV 0.5",
        f"{file}, level pruned: FastV 0.75",
    ]
    held = json.loads(file.read_text())
    assert held["default_level"] == "mid" and held["tokens"] == {"mid": 250, "low": 120}
    assert list(held["levels"]) == ["mid", "low", "pruned"]
    assert command(monkeypatch, "prepare", plain, tmp_path / "a", "--thresholds", file) == 0
    assert command(monkeypatch, "prepare", plain, tmp_path / "b", *numbers, *ratios) == 0
    shown = "levels mid (merging), low (merging, FastV 0.5), pruned (FastV 0.75), full (all tokens)"
    assert capsys.readouterr().out.count(f"{shown}; default mid; FastV after layer 2; serve it with") == 2
    sections = [json.loads((tmp_path / out / "config.json").read_text())["hybrid"] for out in ("a", "b")]
    assert sections[0] == sections[1]
    assert sections[0]["levels"] == held["levels"] and sections[0]["default_level"] == "mid"


def test_calibrate_prints_what_a_section_takes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "pictures")
    wanted = ("calibrate", plain, "--images", tmp_path / "pictures", "--tokens", "mid=250")
    assert command(monkeypatch, *wanted, "--fastv-ratio", "0.5") == 0
    section = json.loads(capsys.readouterr().out)
    hybrid = HybridConfig.parse(section, vision_layers=3, decoder_layers=8)
    assert hybrid.levels.default.name == "mid" and hybrid.levels.default.fastv_ratio == 0.5
    assert len(hybrid.levels.default.thresholds or ()) == 3
    assert command(monkeypatch, *wanted[:-1], "250", "--fastv-ratio", "0.5") == 0
    assert json.loads(capsys.readouterr().out) == section["levels"]["mid"]


def test_calibrate(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "pictures")
    out = tmp_path / "t.json"
    options = ("--images", tmp_path / "pictures", "--tokens", "200")
    assert command(monkeypatch, "calibrate", plain, *options, "--out", out) == 0
    shown = capsys.readouterr()
    assert "3 thresholds for 200 tokens" in shown.out
    assert "thresholds" in shown.err and "8/8" in shown.err
    assert json.loads(out.read_text())["pictures"] == 8
    assert command(monkeypatch, "calibrate", plain, *options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"thresholds": printed} == read_thresholds(out, 3, 4)
    assert not (tmp_path / "t.json.partial").exists()


def test_calibrate_with_files_that_are_no_pictures(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What macOS leaves beside pictures, notes, and a broken picture: said, and left out on request."""
    folder, out = tmp_path / "pictures", tmp_path / "t.json"
    write_pictures(folder)
    wanted = ("calibrate", plain, "--images", folder, "--tokens", "200", "--batch-size", "4", "--out", out)
    assert command(monkeypatch, *wanted) == 0
    clean = json.loads(out.read_text())
    (folder / "._wall.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "notes [1].txt").touch()
    (folder / "[broken].png").write_bytes(b"no picture")
    capsys.readouterr()
    assert command(monkeypatch, *wanted) == 1
    passed = f"vllm-hybrid: warning: {folder}: passed over 2 entries: 1 .txt, 1 hidden"
    bad = f"1 of 9 files cannot be read as pictures: {folder}/[broken].png (its format is not known)"
    lines = capsys.readouterr().err.splitlines()
    assert passed in lines and lines[-1].startswith(f"vllm-hybrid: error: {bad}; remove or convert them, or ")
    assert not any("thresholds for" in line for line in lines)
    assert command(monkeypatch, *wanted, "--skip-unreadable") == 0
    lines = capsys.readouterr().err.splitlines()
    assert passed in lines and f"vllm-hybrid: warning: {bad}; left out" in lines
    # The broken file has no part in anything, how pictures are dealt out included.
    assert json.loads(out.read_text()) == clean


def test_calibrate_several_levels(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "pictures")
    out = tmp_path / "levels.json"
    options = ("--images", tmp_path / "pictures", "--tokens", "mid=250", "--tokens", "low=120")
    assert command(monkeypatch, "calibrate", plain, *options, "--out", out) == 0
    assert "levels.json, level low: 3 thresholds for 120 tokens on average" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content.keys() == {"levels", "default_level", "tokens", "pictures"}
    assert (content["tokens"], content["pictures"]) == ({"mid": 250, "low": 120}, 8)
    read = read_thresholds(out, 3, 4)
    assert list(read["levels"]) == ["mid", "low"] and read["default_level"] == "mid"
    assert all(level.keys() == {"thresholds"} for level in read["levels"].values())
    mid, low = (level["thresholds"] for level in read["levels"].values())
    assert all(m > n for m, n in zip(mid, low, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "PLAIN", "--images", "nowhere", "--tokens", "90"], "nowhere is no folder"),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "1000"],
            "1000 live tokens cannot be had",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "90", "--batch-size", "0"],
            "batch size is 0",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "90", "--out", "no/t"],
            "no is no folder",
        ),
        (
            ["calibrate", "PLAIN", "--images", "broken", "--tokens", "90"],
            "1 of 1 files cannot be read as pictures: broken/a.png (its format is not known)",
        ),
        (
            ["prepare", "PLAIN", "out", "--images", "broken", "--tokens", "90"],
            "1 of 1 files cannot be read as pictures: broken/a.png",
        ),
        (
            ["prepare", "PLAIN", "out", "--skip-unreadable"],
            "--skip-unreadable has no effect without --images",
        ),
        (["show", "PLAIN", "broken/a.png"], "broken/a.png cannot be read as a picture"),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "a=90", "--tokens", "b=1000"],
            "1000 live tokens cannot be had",
        ),
        (["calibrate", "PLAIN", "--images", "pictures", "--tokens", "many"], "'many' is no number of tokens"),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "90", "--tokens", "mid=195"],
            "'90' needs a name",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "=90"],
            "'=90' is no number of tokens; write 195, or mid=195",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "a=90", "--tokens", "a=95"],
            "'a=95' needs a name of its own",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "a=90", "--fastv-ratio", "b=1"],
            "hybrid.levels.b.fastv_ratio is 1.0; give a number from 0 up to but not including 1",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "auto=90"],
            "has a level auto, but that detail means the default level; rename it",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "90", "--fastv-ratio", "half"],
            "'half' is no ratio; write 0.5, or mid=0.5",
        ),
        (
            ["prepare", "PLAIN", "out", "--fastv-ratio", "0.5", "--fastv-ratio", "low=0.9"],
            "'0.5' needs a name of its own among several levels; write mid=0.5",
        ),
        (
            ["calibrate", "PLAIN", "--images", "pictures", "--tokens", "90", "--schedule", "steep"],
            "no schedule 'steep'",
        ),
        (["prepare", "nowhere", "out"], "nowhere is no folder"),
        (["demo-model", "pictures"], "exists and is not empty"),
        (["demo-model", "pictures", "--force"], "holds no checkpoint"),
        (["demo-model", "pictures/wall.png/out"], "wall.png"),
    ],
)
def test_mistakes_are_one_sentence(
    plain: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    before = sorted(tmp_path.rglob("*"))
    assert command(monkeypatch, *(str(plain) if a == "PLAIN" else a for a in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-hybrid: error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["prepare", "calibrate"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b'{"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}', "own format"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git-LFS pointer",
        ),
        ("model.safetensors", b"no weights at all", "is cut off or damaged"),
        ("model.safetensors.index.json", b'{"metadata": {}}', "has no weight_map"),
    ],
)
def test_broken_checkpoints_are_one_sentence(
    plain: Path,
    name: str,
    file: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    (source / file).write_bytes(content)
    write_pictures(tmp_path / "pictures")
    before = sorted(tmp_path.rglob("*"))
    more: dict[str, list[str | Path]] = {
        "prepare": [tmp_path / "out"],
        "calibrate": ["--images", tmp_path / "pictures", "--tokens", "200", "--out", tmp_path / "t.json"],
    }
    assert command(monkeypatch, name, source, *more[name]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-hybrid: error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_demo_model(demo_made: Made) -> None:
    out, done = demo_made
    assert done.returncode == 0, done.stderr
    assert f"vllm serve {out}" in done.stdout
    assert (out / "model.safetensors").is_file()
    assert [f.name for f in out.parent.iterdir()] == ["llava-hybrid"]


# ---- the demo client ------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Speaks the part of the API that the demo client uses; like the server it knows some details only."""

    root = ""
    tells = True
    # Level, live and kept tokens, and KV bytes.
    details: ClassVar = {
        "low": ("low", 96, 48, 7),
        "auto": ("mid", 192, 96, 12),
        "original": ("full", 576, 576, 50),
    }
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            model = {"id": "m", "object": "model", "created": 0, "owned_by": "us", "root": self.root}
            return self._send(json.dumps({"object": "list", "data": [model]}))
        self._send("{}", status=404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = request["messages"][0]["content"]
        url, detail = picture["image_url"]["url"], picture["image_url"]["detail"]
        assert url.startswith("data:image/png;base64,")
        if detail not in self.details:
            error = {"message": f"detail is {detail!r}, which means no level", "param": "detail", "code": 400}
            return self._send(json.dumps({"error": error}), status=400)
        self.asked.append((url, detail))
        message = {"role": "assistant", "content": f"An answer to {text['text']}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 600, "completion_tokens": 4, "total_tokens": 604}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        assert request["vllm_xargs"] == {"hybrid_cost": 1}
        level, live, kept, kv_bytes = self.details[detail]
        image = {"level": level, "tokens": 576, "live_tokens": live, "kept_tokens": kept}
        cost = (
            {"hybrid": {"images": [image], "kv_bytes": kv_bytes, "kv_bytes_full": 50}} if self.tells else None
        )
        self._send(json.dumps(reply | {"usage": usage, "kv_transfer_params": cost}))

    def _send(self, text: str, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    Server.tells, Server.root = True, ""
    Server.asked.clear()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()


def demo(base_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BASE_URL": base_url, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    call = [sys.executable, "examples/demo.py", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_demo_client(server: str, plain: Path, tmp_path: Path) -> None:
    """The same picture at every detail, from one server; a detail it does not know costs no other."""
    Server.root = str(tmp_path / "out")
    assert not subprocess.run(
        [sys.executable, "-m", "vllm_hybrid.cli", "prepare", plain, Server.root, "--fastv-ratio", "low=0.5"],
        cwd=ROOT,
    ).returncode
    done = demo(server, "--question", "What?")
    assert done.returncode == 0, done.stderr
    blocks = [block.splitlines() for block in done.stdout.strip().split("\n\n")]
    assert [block[0] for block in blocks] == [f"scene-{number}: What?" for number in (2, 5, 0)]
    expected = [
        ["low", "low", "576 -> 96 live -> 48 kept, 86% KV saved", "An answer to What?"],
        ["auto", "mid", "576 -> 192 live -> 96 kept, 76% KV saved", "An answer to What?"],
        ["high", "not asked:", "detail is 'high', which means no level"],
        ["original", "full", "576 -> 576 live -> 576 kept, 0% KV saved", "An answer to What?"],
    ]
    for block in blocks:
        assert [re.split(r"  +", re.sub(r"(->|,) +", r"\1 ", line.strip())) for line in block[1:]] == expected
        answers = {line.index("An answer") for line in block[1:] if "An answer" in line}
        assert len(answers) == 1, "answers stand below each other"
    assert [detail for _, detail in Server.asked] == ["low", "auto", "original"] * 3
    assert len({url for url, _ in Server.asked}) == 3


@pytest.mark.slow
def test_demo_client_where_nothing_is_reduced(server: str, tmp_path: Path) -> None:
    Server.tells = False
    (picture,) = [f for f in write_pictures(tmp_path) if f.stem == "sky"]
    done = demo(server, "--picture", str(picture), "--detail", "original")
    assert done.returncode == 0, done.stderr
    assert "sky.png" in done.stdout and done.stdout.count("nothing is reduced") == 1
    assert [detail for _, detail in Server.asked] == ["original"]


@pytest.mark.parametrize("arguments", [[], ["--picture", "nowhere.png"]])
def test_demo_client_mistakes(arguments: list[str]) -> None:
    done = demo("http://127.0.0.1:9", *arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "nowhere.png cannot be read" if arguments else "no server answers at http://127.0.0.1:9"
    ) in done.stderr
