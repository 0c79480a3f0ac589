"""The set-up and serve scripts, run on a copy with a recording interpreter in place of Python and pip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Stands in for the system's Python and, through links, for the one in .venv: makes such an environment,
# writes down every pip command, and fails at `pip install` while a file "broken" exists.
RECORDING_PYTHON = """#!{bash}
case "$1 $2" in
  "- ") echo "$0" ;;
  "-m venv") mkdir -p "$3/bin" && ln -s "$0" "$3/bin/python" && echo "venv" >>"$RECORD" ;;
  "-m pip")
    shift 3
    echo "pip $*" >>"$RECORD"
    [[ ! -e $(dirname "$RECORD")/broken ]] || {{ echo "no network" && exit 1; }} ;;
  "-m vllm_hybrid.cli") shift 2 && echo "vllm-hybrid $*" >>"$RECORD" && exit "${{DOCTOR_STATUS:-0}}" ;;
  "--version ") echo "Python 3.11.0" ;;
  *"torch.version.cuda"*) echo "$HYBRID_DEVICE" ;;
  *) exec {python} "$@" ;;
esac
"""


class Checkout:
    """A copy of what the scripts read, and a way to run them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = root / "tree"
        self.tree.mkdir()
        self.record = root / "record"
        for name in ("setup_hybrid.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.tree)
        for name in ("vllm_hybrid/doctor/stand_ins", "scripts"):
            shutil.copytree(ROOT / name, self.tree / name)
        self.python = self.executable(
            root / "python", RECORDING_PYTHON.format(bash=shutil.which("bash"), python=sys.executable)
        )
        self.venv = self.tree / ".venv"

    def executable(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script and forget what earlier runs recorded."""
        self.record.write_text("")
        defaults = {"HYBRID_PYTHON": str(self.python), "HYBRID_DEVICE": "cpu", "RECORD": str(self.record)}
        inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        return subprocess.run(
            [str(self.tree / script)],
            env=inherited | defaults | environment,
            capture_output=True,
            text=True,
        )

    def set_up(self, **environment: str) -> str:
        done = self.run("setup_hybrid.sh", **environment)
        assert done.returncode == 0, done.stderr
        return self.record.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setting_up_again_does_nothing(checkout: Checkout) -> None:
    first = checkout.set_up()
    assert "venv" in first
    assert "-e .[cpu,dev]" in first
    assert checkout.set_up() == ""


def test_changed_requirements_are_installed_into_the_same_environment(checkout: Checkout) -> None:
    checkout.set_up()
    with (checkout.tree / "pyproject.toml").open("a") as project:
        project.write("# changed\n")
    second = checkout.set_up()
    assert "-e .[cpu,dev]" in second
    assert "venv" not in second.splitlines()


def test_a_failed_installation_fails_the_set_up_and_is_started_over(checkout: Checkout) -> None:
    (checkout.root / "broken").touch()
    failed = checkout.run("setup_hybrid.sh")
    assert failed.returncode == 1
    assert "no network" in failed.stderr
    assert "error: pip could not install vllm-hybrid[cpu,dev]" in failed.stderr
    (checkout.venv / "left-behind").touch()
    (checkout.root / "broken").unlink()
    assert "venv" in checkout.set_up().splitlines()
    assert not (checkout.venv / "left-behind").exists()


def test_cpu_gaps_are_closed_on_a_cpu_only_and_devices_share_no_environment(checkout: Checkout) -> None:
    assert checkout.set_up().splitlines()[-1] == "vllm-hybrid doctor --fix"
    on_cuda = checkout.set_up(HYBRID_DEVICE="cuda")
    assert "venv" in on_cuda.splitlines()
    assert "-e .[cuda,dev]" in on_cuda
    assert "doctor" not in on_cuda


def test_a_gap_that_stays_fails_the_set_up(checkout: Checkout) -> None:
    failed = checkout.run("setup_hybrid.sh", DOCTOR_STATUS="1")
    assert failed.returncode == 1
    assert failed.stderr == "setup: error: this environment lacks something to serve (above)\n"
    assert "venv" in checkout.set_up().splitlines()


def test_a_changed_stand_in_has_the_doctor_look_again(checkout: Checkout) -> None:
    checkout.set_up()
    with (checkout.tree / "vllm_hybrid/doctor/stand_ins/torchvision-operators/pyproject.toml").open(
        "a"
    ) as project:
        project.write("# changed\n")
    assert "doctor --fix" in checkout.set_up()


def test_a_given_torch_index_is_passed_on(checkout: Checkout) -> None:
    assert "--extra-index-url" not in checkout.set_up()
    assert "--extra-index-url file:///torch " in checkout.set_up(TORCH_INDEX_URL="file:///torch")


def test_an_environment_of_the_users_is_left_alone(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "precious").touch()
    refused = checkout.run("setup_hybrid.sh")
    assert refused.returncode == 1
    assert refused.stderr == "setup: error: .venv exists and was not made by this script: move it away\n"
    assert (checkout.venv / "precious").exists()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"HYBRID_DEVICE": "tpu"}, "HYBRID_DEVICE is 'tpu', but must be cpu or cuda"),
        ({"HYBRID_PYTHON": "/no/python"}, "HYBRID_PYTHON is '/no/python', which is not a working Python"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found: install g++"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    checkout: Checkout, environment: dict[str, str], message: str
) -> None:
    refused = checkout.run("setup_hybrid.sh", **environment)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"setup: error: {message}")
    assert refused.stderr.count("\n") == 1


@pytest.fixture
def installed(checkout: Checkout) -> Checkout:
    """A checkout whose `vllm` and `vllm-hybrid` write down their arguments."""
    checkout.set_up()
    checkout.executable(checkout.venv / "bin" / "vllm", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    checkout.executable(
        checkout.venv / "bin" / "vllm-hybrid",
        '#!/bin/bash\necho "$*" >>"$RECORD"\nmkdir "${@: -1}" && [[ -z ${FAIL:-} ]]\n',
    )
    return checkout


def served(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The arguments that `vllm` was started with."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines[lines.index("serve") :]


def test_the_demo_model_is_made_once_and_served(installed: Checkout) -> None:
    wanted = ["serve", "--model", "llava-hybrid", "--port", "8000"]
    assert served(installed.run("scripts/serve.sh")) == wanted
    assert installed.record.read_text() == "demo-model ./.llava-hybrid.partial\n"
    assert served(installed.run("scripts/serve.sh")) == wanted
    assert installed.record.read_text() == ""


def test_a_failed_demo_model_is_not_served_and_is_made_again(installed: Checkout) -> None:
    assert installed.run("scripts/serve.sh", FAIL="1").returncode != 0
    assert not (installed.tree / "llava-hybrid").exists()
    assert served(installed.run("scripts/serve.sh"))[2] == "llava-hybrid"


def test_a_cpu_server_has_a_kv_cache_size_unless_the_user_gives_one(installed: Checkout) -> None:
    installed.executable(
        installed.venv / "bin" / "vllm", '#!/bin/bash\necho "size=${VLLM_CPU_KVCACHE_SPACE:-none}"\n'
    )

    def size(**environment: str) -> str:
        return installed.run("scripts/serve.sh", **environment).stdout.splitlines()[-1]

    assert size() == "size=4"
    assert size(VLLM_CPU_KVCACHE_SPACE="9") == "size=9"
    assert size(ARGS="--gpu-memory-utilization 0.5") == "size=none"
    assert size(ARGS="--kv-cache-memory-bytes 1G") == "size=none"


def test_port_and_quoted_arguments_reach_vllm(installed: Checkout) -> None:
    arguments = """--hf-overrides '{"hybrid": {"level": "low"}}' --seed 1"""
    assert served(installed.run("scripts/serve.sh", PORT="8123", ARGS=arguments))[3:] == [
        "--port",
        "8123",
        "--hf-overrides",
        '{"hybrid": {"level": "low"}}',
        "--seed",
        "1",
    ]


def test_checkpoints_of_one_name_are_prepared_apart(installed: Checkout, tmp_path: Path) -> None:
    models = [tmp_path / folder / "llava-1.5-7b-hf" for folder in ("a", "b c")]
    names = []
    for model in models:
        model.mkdir(parents=True)
        names.append(served(installed.run("scripts/serve.sh", MODEL=str(model)))[2])
        assert installed.record.read_text().startswith(f"prepare {model} prepared/.llava-1.5-7b-hf-")
    assert all(name.startswith("prepared/llava-1.5-7b-hf-") for name in names)
    assert names[0] != names[1]
    assert served(installed.run("scripts/serve.sh", MODEL=str(models[0])))[2] == names[0]
    assert installed.record.read_text() == ""


def test_a_model_that_is_no_folder_is_refused(installed: Checkout) -> None:
    refused = installed.run("scripts/serve.sh", MODEL="llava-hf/llava-1.5-7b-hf")
    assert refused.returncode == 1
    assert "MODEL is 'llava-hf/llava-1.5-7b-hf', which is no folder" in refused.stderr
