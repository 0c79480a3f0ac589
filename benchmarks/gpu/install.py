"""Install the offline bundle on a GPU host, with nothing but Python 3.12 and its pip.

    python install.py PARTS TARGET [--run OUT]

joins the parts that lie in the folder PARTS (beside `manifest.json`), checks them, and installs every wheel
into the folder TARGET, which goes in front of the host's own packages:

    export PYTHONPATH=TARGET

Then it imports what the benchmark imports and says in one sentence each what is missing or of another
version than the bundle was resolved for. With --run it goes on to check and time the kernels (into
OUT/kernels.json) and the servers (into OUT/results.json); the scripts lie in TARGET/source, to be started by
hand too. What was measured is not measured again: `--check-only --run OUT` goes on with a run that was cut
off. The exit status is 0 when everything imports and nothing failed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What stock vLLM and the plugin load to serve LLaVA on one GPU.
MODULES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm._C_stable_libtorch",
    "vllm.platforms.cuda",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.model_executor.models.llava",
    "vllm_hybrid",
    "vllm_hybrid_plugin",
    "vllm_hybrid.attention",
    "vllm_hybrid.model",
    "vllm_hybrid.scheduler",
    "vllm_hybrid.cuda_worker",
    "vllm_hybrid.gpu_attention",
)


def join(folder: Path, manifest: dict[str, Any]) -> bytes:
    """The whole archive.

    Raises:
        RuntimeError: a part is missing or damaged; one sentence says which.

    """
    parts = []
    for part in manifest["parts"]:
        file = folder / part["name"]
        if not file.is_file():
            raise RuntimeError(
                f"{part['name']} is missing; copy all {len(manifest['parts'])} parts to {folder}"
            )
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise RuntimeError(f"{part['name']} is damaged (its sha256 differs); copy it again")
        parts.append(content)
    return b"".join(parts)


def install(archive: bytes, target: Path) -> None:
    """Unpack beside the target; put wheels, and the sources as `source`, into it in place of earlier ones."""
    unpacked = target.with_name(target.name + ".wheels")
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:xz") as tar:
        tar.extractall(unpacked, filter="data")
    wheels = sorted(str(file) for file in (unpacked / "wheels").glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(target), *wheels]
    subprocess.run(command, check=True)
    shutil.rmtree(target / "source", ignore_errors=True)
    shutil.move(unpacked / "source", target / "source")
    shutil.rmtree(unpacked)


def environment(target: Path) -> dict[str, str]:
    """This process's environment with the target in front of the host's packages."""
    path = os.pathsep.join(filter(None, [str(target.resolve()), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def commands(target: Path, out: Path, budget: float) -> list[list[str]]:
    """Kernels, then servers: each checks before it times, prints a table and writes JSON."""
    scripts = target / "source" / "benchmarks" / "gpu"
    return [
        [sys.executable, str(scripts / "kernels.py"), "--out", str(out / "kernels.json")],
        [
            *(sys.executable, str(scripts / "bench.py"), "--out", str(out / "results.json")),
            *("--budget", f"{budget:g}"),
        ],
    ]


def measure(target: Path, out: Path, budget: float) -> bool:
    """Run the benchmark; returns whether all of it succeeded."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    kernels, servers = commands(target.resolve(), out.resolve(), budget)
    done = out / "kernels.json"
    fine = done.exists() and bool(json.loads(done.read_text()).get("complete"))
    if not fine:
        fine = subprocess.run(kernels, env=environment(target), check=False).returncode == 0
    servers[-1] = f"{budget - (time.monotonic() - began):g}"
    return subprocess.run(servers, env=environment(target), check=False).returncode == 0 and fine


def differences(manifest: dict[str, Any]) -> list[str]:
    """What the host has other than the bundle was resolved for, a sentence each."""
    found = []
    for name, wanted in sorted(manifest["host"].items()):
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(f"{name} is not on this host; the bundle was resolved with {wanted} there.")
            continue
        if have.split("+")[0] != wanted:
            found.append(f"{name} is {have} on this host; the bundle was resolved for {wanted}.")
    return found


def missing(target: Path, modules: tuple[str, ...] = MODULES) -> list[str]:
    """Modules that cannot be imported with the target in front, a sentence each."""
    found = []
    code = "import importlib,sys\nfor m in sys.argv[1:]:\n importlib.import_module(m); print(m, flush=True)"
    left = list(modules)
    while left:
        done = subprocess.run(
            [sys.executable, "-c", code, *left],
            capture_output=True,
            text=True,
            env=environment(target),
            check=False,
        )
        imported = [line for line in done.stdout.split() if line in left]
        if done.returncode == 0:
            break
        failed = left[len(imported)]
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        found.append(f"{failed} cannot be imported: {reason}")
        left = left[len(imported) + 1 :]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--check-only", action="store_true", help="do not install, only check")
    parser.add_argument("--run", type=Path, metavar="OUT", help="then run the benchmark, results in OUT")
    parser.add_argument("--budget", type=float, default=3000, help="seconds after which nothing is begun")
    args = parser.parse_args()
    if sys.version_info[:2] != (3, 12):
        print(f"this is Python {sys.version.split()[0]}; the bundle's wheels are for 3.12, use that")
        return 1
    manifest = json.loads((args.parts / "manifest.json").read_text())
    if not args.check_only:
        try:
            archive = join(args.parts, manifest)
        except RuntimeError as error:
            print(error)
            return 1
        install(archive, args.target)
    sys.path.insert(0, str(args.target))
    for sentence in differences(manifest):
        print(sentence)
    failed = missing(args.target)
    for sentence in failed:
        print(sentence)
    print(f"vllm {version('vllm')} and vllm-hybrid {version('vllm-hybrid')} are in {args.target}")
    print(f"export PYTHONPATH={args.target}")
    if failed:
        return 1
    return 0 if args.run is None or measure(args.target, args.run, args.budget) else 1


if __name__ == "__main__":
    sys.exit(main())
