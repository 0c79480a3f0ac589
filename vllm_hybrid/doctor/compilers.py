"""Check of the compiler that serving on this environment's device needs."""

from __future__ import annotations

from vllm_hybrid.doctor.finding import Finding
from vllm_hybrid.doctor.installed import Environment
from vllm_hybrid.environment.compilers import c_compiler, cpp_compiler


def check_compiler(environment: Environment) -> list[Finding]:
    """Whether it is there and compiles, with Python's headers."""
    compiler = cpp_compiler() if environment.for_cpu else c_compiler()
    return [Finding(f"{compiler.language} compiler", compiler.name, compiler.gap, compiler.remedy)]
