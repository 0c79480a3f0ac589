"""``vllm-hybrid doctor``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vllm_hybrid.doctor import checkpoint as checkpoints
from vllm_hybrid.doctor import stand_in
from vllm_hybrid.doctor.compilers import check_compiler
from vllm_hybrid.doctor.cuda import check_cuda
from vllm_hybrid.doctor.finding import Finding
from vllm_hybrid.doctor.installed import Environment
from vllm_hybrid.doctor.libraries import check_around_torch, check_name, check_torch, check_vllm
from vllm_hybrid.doctor.plugin import check_plugin

CHECKS: tuple[Callable[[Environment], list[Finding]], ...] = (
    check_vllm,
    check_name,
    check_torch,
    check_around_torch,
    check_compiler,
    check_cuda,
)


def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint to look at too.", show_default=False)
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="On a CPU, close the gaps that small packages of this one's close.")
    ] = False,
) -> None:
    """Say in a line each what this environment has and lacks to serve.

    The status is 0 where nothing is lacking.
    """
    environment = Environment()
    if fix and not environment.for_cpu:
        print("--fix has nothing to close here: it is for installations of vLLM for CPUs")
    findings = [finding for check in CHECKS for finding in _shown(check(environment))]
    stand_ins = [finding.stand_in for finding in findings if finding.stand_in]
    if fix and stand_ins:
        print(f"installing {', '.join(stand_ins)}")
        stand_in.install(stand_ins, environment)
        findings = [f for f in findings if not f.stand_in]
        findings += [f for check in (check_name, check_around_torch) for f in _shown(check(environment))]
    if not any(finding.gap for finding in findings):
        # These two import what the others only look at.
        findings += _shown(check_plugin())
        if checkpoint is not None:
            findings += _shown(checkpoints.check_checkpoint(checkpoint))
    gaps = sum(bool(finding.gap) for finding in findings)
    print("nothing is lacking" if not gaps else f"{gaps} {'gap' if gaps == 1 else 'gaps'}")
    if gaps:
        raise typer.Exit(1)


def _shown(findings: list[Finding]) -> list[Finding]:
    """The findings, printed."""
    for finding in findings:
        print(finding.line, flush=True)
    return findings
