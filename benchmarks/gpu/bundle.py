"""Build the offline bundle for a GPU host without network: vLLM, what it needs, and this project.

    python benchmarks/gpu/bundle.py OUT

fills OUT with parts of one archive, `manifest.json` with their sha256, and `install.py`, which is what runs
on that host: it installs the wheels, checks, and starts the benchmark. The host is one Linux machine (x86-64)
with Python 3.12, PyTorch and transformers, and an NVIDIA driver. vLLM comes from its CUDA wheel without the
binaries that LLaVA in bf16 can do without (FlashAttention, MoE and the other model families' kernels: 0.6 of
0.8 GB), so attention runs in Triton. Downloads stay in OUT/downloads: a second run asks the network for
nothing but the resolution.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from email import message_from_string
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
VLLM = "vllm==0.32.0"
PYTHON = (3, 12)
# Oldest C library that the host may have: 2.35 is Ubuntu 22.04's.
GLIBC_MINOR = 35
MIB = 1 << 20

# Resolved with everything else, so that all versions fit these, but expected on the host.
HOST_PINS = ("torch==2.11.0", "torchvision==0.26.0", "transformers==5.17.0")
# Large, or tied to the host's own torch; not carried. install.py says which of them is missing there.
ON_HOST = {
    "huggingface-hub",
    "hf-xet",
    "llvmlite",
    "mpmath",
    "networkx",
    "numba",
    "numpy",
    "opencv-python-headless",
    "safetensors",
    "setuptools",
    "sympy",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
    "triton",
}
ON_HOST_PREFIXES = ("nvidia-", "cuda-")
# What vLLM asks for and LLaVA in bf16 on one GPU never imports: sound, video, other kernels, fast loaders.
NOT_NEEDED = {
    "fastsafetensors",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "nvtx",
    "pynvvideocodec",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torchaudio",
    "torchcodec",
}
# The only compiled file of vLLM's wheel that is carried unless --binary names more.
BINARIES = ("vllm/_C_stable_libtorch.abi3.so",)
# Python sources of the repository that run on the host without being part of the package.
SOURCES = ("benchmarks", "tests")
# Sources and tables of kernels that are compiled elsewhere.
_DROPPED_SUFFIXES = (".so", ".hpp", ".h", ".cuh", ".cu", ".inl", ".cpp", ".jpg")
_DROPPED_FILES = ("vllm/vllm-rs",)


def host_tags() -> list[Tag]:
    """The wheel tags that the host's pip takes, best first."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    tags = list(cpython_tags(PYTHON, platforms=platforms))
    return tags + list(compatible_tags(PYTHON, "cp312", platforms))


def fits_host(wheel: str) -> bool:
    """Whether a wheel of this file name installs on the host."""
    return not parse_wheel_filename(wheel)[3].isdisjoint(host_tags())


def pip_target() -> list[str]:
    """pip's options for the host's interpreter instead of this one."""
    options = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in dict.fromkeys(tag.platform for tag in host_tags() if tag.platform.startswith("many")):
        options += ["--platform", platform]
    return options


def needed_of(metadata: str) -> list[str]:
    """A wheel's requirements on the host that are not in :data:`NOT_NEEDED`, extras left out."""
    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    needed = []
    for line in message_from_string(metadata).get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) in NOT_NEEDED | {"torch", "torchvision"}:
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            needed.append(str(requirement))
    return needed


def carried(name: str) -> bool:
    """Whether a resolved distribution goes into the bundle."""
    name = canonicalize_name(name)
    return name not in ON_HOST and not name.startswith(ON_HOST_PREFIXES)


def pip(*arguments: str) -> None:
    """Run pip of this interpreter.

    Raises:
        RuntimeError: pip failed; its last words.

    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")][-1:]
        raise RuntimeError(f"pip {arguments[0]} failed: {' '.join(last) or done.stderr.strip()[-300:]}")


def download_vllm(downloads: Path) -> Path:
    """vLLM's CUDA wheel, 330 MB; downloaded once."""
    found = sorted(downloads.glob("vllm-*.whl"))
    if not found:
        pip("download", "--no-deps", "--dest", str(downloads), *pip_target(), VLLM)
        found = sorted(downloads.glob("vllm-*.whl"))
    return found[-1]


def resolve(requirements: Iterable[str]) -> list[dict[str, Any]]:
    """All distributions that requirements lead to on the host, as pip's installation report lists them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip(
            *("install", "--dry-run", "--ignore-installed", "--target", f"{folder}/none"),
            *("--report", str(report)),
            *pip_target(),
            *requirements,
        )
        return json.loads(report.read_text())["install"]


def download_wheels(resolved: list[dict[str, Any]], downloads: Path) -> list[Path]:
    """The wheels of everything carried."""
    pins, files = [], []
    for found in resolved:
        name = found["metadata"]["name"]
        if carried(name):
            files.append(downloads / found["download_info"]["url"].rsplit("/", 1)[1])
            if not files[-1].exists():
                pins.append(f"{name}=={found['metadata']['version']}")
    if pins:
        pip("download", "--no-deps", "--dest", str(downloads), *pip_target(), *pins)
    for file in files:
        if not file.exists():
            raise RuntimeError(f"pip did not download {file.name}; remove {downloads} and start again")
        if not fits_host(file.name):
            raise RuntimeError(f"{file.name} does not fit Python 3.12 on Linux x86-64; resolve again")
    return files


def project_requirements() -> list[str]:
    """What this project itself depends on."""
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]


def copy_sources(folder: Path) -> None:
    """The benchmark and the tests' reference, which the check answers to, as they lie in the repository."""
    for package in SOURCES:
        for file in sorted((REPO / package).rglob("*.py")):
            target = folder / file.relative_to(REPO)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def build_project(folder: Path) -> Path:
    """This project's wheel, built with the tools of this environment."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPO))
    return next(folder.glob("vllm_hybrid-*.whl"))


def keeps(name: str, binaries: Iterable[str]) -> bool:
    """Whether a file of vLLM's wheel goes into the bundle."""
    if name in binaries:
        return True
    return name not in _DROPPED_FILES and PurePosixPath(name).suffix not in _DROPPED_SUFFIXES


def rewrite_wheel(source: Path, target: Path, binaries: Iterable[str] | None = None) -> None:
    """Copy a wheel uncompressed, so that the archive around all of them compresses better.

    Args:
        source: a wheel.
        target: the copy.
        binaries: given for vLLM's wheel: leave out what :func:`keeps` does not keep, in RECORD too, so that
            the copy is a complete wheel of the same distribution and version.

    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        kept: set[str] = set()
        for item in old.infolist():
            if item.is_dir() or (binaries is not None and not keeps(item.filename, binaries)):
                continue
            kept.add(item.filename)
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD") and binaries is not None:
                continue
            copied = zipfile.ZipInfo(item.filename, date_time=(1980, 1, 1, 0, 0, 0))
            copied.external_attr = item.external_attr
            new.writestr(copied, content)
        if binaries is None:
            return
        record = next(name for name in kept if name.endswith(".dist-info/RECORD"))
        for wanted in binaries:
            if wanted not in kept:
                raise RuntimeError(f"{source.name} has no {wanted}; give the name of a file in it")
        rows = [row for row in csv.reader(io.StringIO(old.read(record).decode())) if row[0] in kept]
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        new.writestr(zipfile.ZipInfo(record, date_time=(1980, 1, 1, 0, 0, 0)), lines.getvalue())


def record_is_true(wheel: Path) -> bool:
    """Whether RECORD names the wheel's files with their hashes, and no others."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
        if set(rows) != names:
            return False
        for name, written in rows.items():
            if written:
                kind, digest = written.split("=", 1)
                found = hashlib.new(kind, archive.read(name)).digest()
                if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != digest:
                    return False
        return True


def pack(folder: Path, out: Path, part_bytes: int) -> list[dict[str, Any]]:
    """Write everything in a folder as one xz-compressed tar in parts.

    Returns:
        Name, bytes and sha256 of every part, in order.

    """
    for old in out.glob("bundle.tar.xz.*"):
        old.unlink()
    with tempfile.TemporaryFile(dir=out) as whole:
        with lzma.open(whole, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    archive.add(file, str(file.relative_to(folder)))
        whole.seek(0)
        parts: list[dict[str, Any]] = []
        while content := whole.read(part_bytes):
            name = f"bundle.tar.xz.{len(parts):02d}"
            (out / name).write_bytes(content)
            parts.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--part-mib", type=int, default=56, help="size of a part, at most 60")
    parser.add_argument(
        "--binary", action="append", default=[], help="a further compiled file of vLLM's wheel to carry"
    )
    args = parser.parse_args()
    if not 1 <= args.part_mib <= 60:
        parser.error(f"--part-mib is {args.part_mib}; give 1 to 60")
    downloads = args.out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    vllm = download_vllm(downloads)
    with zipfile.ZipFile(vllm) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needed = needed_of(archive.read(metadata).decode())
    resolved = resolve([*needed, *project_requirements(), *HOST_PINS])
    wheels = download_wheels(resolved, downloads)
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        folder = Path(scratch)
        (folder / "wheels").mkdir()
        rewrite_wheel(vllm, folder / "wheels" / vllm.name, (*BINARIES, *args.binary))
        for wheel in wheels:
            rewrite_wheel(wheel, folder / "wheels" / wheel.name)
        project = build_project(folder)
        rewrite_wheel(project, folder / "wheels" / project.name)
        project.unlink()
        copy_sources(folder / "source")
        names = sorted(file.name for file in (folder / "wheels").iterdir())
        parts = pack(folder, args.out, args.part_mib * MIB)
    manifest = {
        "vllm": VLLM,
        "host": {
            r["metadata"]["name"]: r["metadata"]["version"]
            for r in resolved
            if not carried(r["metadata"]["name"])
        },
        "not_needed": sorted(NOT_NEEDED),
        "wheels": names,
        "parts": parts,
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copy(HERE / "install.py", args.out / "install.py")
    total = sum(part["bytes"] for part in parts)
    print(f"{len(parts)} parts, {total / MIB:.1f} MiB, {len(names)} wheels, in {args.out}")


if __name__ == "__main__":
    main()
