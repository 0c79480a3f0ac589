"""Build the offline bundle for a GPU host without network: vLLM, what it needs, and this project.

    python benchmarks/gpu/offline/bundle.py OUT

fills OUT with parts, `manifest.json` with their sha256, and `install.py`, which is what runs on that host:
it unpacks the installed tree that the parts hold and checks that everything imports. The host is one Linux
machine (x86-64) with Python 3.12, PyTorch and transformers, an NVIDIA driver and a GPU of sm_90 (H100, H200).
vLLM comes from its CUDA wheel with the two libraries that LLaVA in bf16 runs (its own kernels and
FlashAttention 3), and of these only the machine code for sm_90. Downloads, and what was compressed already,
stay in OUT/downloads: a second run asks the network for nothing but the resolution.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from email import message_from_string
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[2]
sys.path.insert(0, str(REPO))

from benchmarks.gpu.offline.fatbin import keep_architecture  # noqa: E402
from benchmarks.gpu.running.facts import commit  # noqa: E402

VLLM = "vllm==0.32.0"
PYTHON = (3, 12)
# Oldest C library that the host may have: 2.35 is Ubuntu 22.04's.
GLIBC_MINOR = 35
# The host's GPU, as nvcc numbers it: H100 and H200.
ARCHITECTURE = 90
MIB = 1 << 20
MOST_PART_MIB = 40

# Resolved with everything else, so that all versions fit these, but expected on the host.
HOST_PINS = ("torch==2.11.0", "torchvision==0.26.0", "transformers==5.17.0")
# Python packages that the host has; not carried. install.py says which is missing there or does not fit.
ON_HOST = {
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "annotated-doc", "anyio", "attrs", "certifi"),
    *("charset-normalizer", "click", "cloudpickle", "einops", "filelock", "frozenlist", "fsspec", "grpcio"),
    *("h11", "hf-xet", "httpcore", "httpx", "huggingface-hub", "idna", "jinja2", "llvmlite"),
    *("markdown-it-py", "markupsafe", "mdurl", "mpmath", "multidict", "networkx", "ninja", "numba", "numpy"),
    *(
        "opencv-python-headless",
        "packaging",
        "pillow",
        "prometheus-client",
        "propcache",
        "protobuf",
        "psutil",
    ),
    *("py-cpuinfo", "pygments", "pyyaml", "regex", "requests", "rich", "safetensors", "sentencepiece"),
    *("setuptools", "shellingham", "sympy", "tiktoken", "tokenizers", "torch", "torchvision", "tqdm"),
    *("transformers", "triton", "typer", "typing-extensions", "urllib3", "uvloop", "yarl"),
}
ON_HOST_PREFIXES = ("nvidia-", "cuda-")
# Versions of these are asked for that the host has not; what it has serves.
OTHER_VERSION_SERVES = {"numba", "numpy", "setuptools", "torch", "torchvision"}
# Asked for by vLLM or by what it asks for, and never imported to serve LLaVA in bf16 on one GPU: sound,
# video, other kernels, fast loaders, other guided-decoding engines, tracing, and what only the HTTP server
# needs.
NOT_NEEDED = {
    *("fastsafetensors", "flashinfer-python", "humming-kernels", "instanttensor", "nvidia-cudnn-frontend"),
    *("nvidia-cutlass-dsl", "nvtx", "pynvvideocodec", "quack-kernels", "tilelang", "tokenspeed-mla"),
    *("torchaudio", "torchcodec"),
    *("anthropic", "docstring-parser", "mcp", "mcp-types", "model-hosting-container-standards"),
    *("ijson", "interegular", "lark", "lm-format-enforcer", "outlines-core", "python-json-logger"),
    *("opentelemetry-api", "opentelemetry-exporter-otlp", "opentelemetry-sdk"),
    "opentelemetry-semantic-conventions-ai",
    *("agent-detector", "cffi", "cryptography", "detect-installer", "dnspython", "fastapi-cli"),
    *("fastapi-cloud-cli", "fastar", "httptools", "jmespath", "pycparser", "pydantic-settings", "pyjwt"),
    *("python-dotenv", "rich-toolkit", "rignore", "sentry-sdk", "sse-starlette", "supervisor", "truststore"),
    *("uvicorn", "watchfiles", "websockets"),
}
# The compiled files of vLLM's wheel that are carried unless --binary names more.
BINARIES = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
# What else is left out of a distribution: translations, tokenizers of other models, the demo's weights.
LEFT_OUT = {
    "mistral-common": ("mistral_common/data/",),
    "pycountry": ("pycountry/locales/",),
    "vllm": ("vllm/vllm-rs",),
    "vllm-hybrid": ("vllm_hybrid/demo/embedded/model.safetensors",),
}
# Of vLLM's wheel: sources and tables of kernels that are compiled elsewhere.
_DROPPED_SUFFIXES = (".so", ".hpp", ".h", ".cuh", ".cu", ".inl", ".cpp", ".jpg")
# Python sources of the repository that run on the host without being part of the package, and what they read.
SOURCES = ("benchmarks", "tests")
_SOURCE_SUFFIXES = (".py", ".json")
# Files from this size on are archives of their own; what is smaller shares archives of _ARCHIVE_BYTES.
_LARGE_BYTES = 8 * MIB
_ARCHIVE_BYTES = 40 * MIB


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


def requirements_of(metadata: str) -> list[Requirement]:
    """A distribution's requirements on the host, extras left out."""
    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    needed = [Requirement(line) for line in message_from_string(metadata).get_all("Requires-Dist") or []]
    return [r for r in needed if r.marker is None or r.marker.evaluate(environment)]


def needed_of(metadata: str) -> list[str]:
    """A wheel's requirements on the host that are not in :data:`NOT_NEEDED`, extras left out."""
    needed = []
    for requirement in requirements_of(metadata):
        if canonicalize_name(requirement.name) not in NOT_NEEDED | {"torch", "torchvision"}:
            requirement.marker = None
            needed.append(str(requirement))
    return needed


def carried(name: str) -> bool:
    """Whether a resolved distribution goes into the bundle."""
    name = canonicalize_name(name)
    return name not in ON_HOST | NOT_NEEDED and not name.startswith(ON_HOST_PREFIXES)


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
    """The benchmark, and the tests' reference which the check answers to, as they lie in the repository."""
    for package in SOURCES:
        for file in sorted((REPO / package).rglob("*")):
            if file.is_file() and file.suffix in _SOURCE_SUFFIXES:
                target = folder / file.relative_to(REPO)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def build_project(folder: Path) -> Path:
    """This project's wheel, built with the tools of this environment."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPO))
    return next(folder.glob("vllm_hybrid-*.whl"))


def keeps(distribution: str, name: str, binaries: Iterable[str] = ()) -> bool:
    """Whether a file of a distribution's wheel goes into the bundle.

    Args:
        distribution: its canonical name.
        name: the file's path in the wheel.
        binaries: the compiled files of vLLM's wheel that are wanted.

    """
    if name.startswith(LEFT_OUT.get(distribution, ())):
        return False
    return distribution != "vllm" or name in binaries or PurePosixPath(name).suffix not in _DROPPED_SUFFIXES


def rewrite_wheel(source: Path, target: Path, binaries: Iterable[str] = (), architecture: int = 0) -> None:
    """Copy a wheel without what :func:`keeps` does not keep: a complete wheel of the same version.

    Args:
        source: a wheel.
        target: the copy, uncompressed.
        binaries: files that the wheel must have, of vLLM's the compiled ones to keep.
        architecture: if given, of those keep the machine code for this one only.

    Raises:
        RuntimeError: the wheel lacks one of the binaries.

    """
    distribution = canonicalize_name(parse_wheel_filename(source.name)[0])
    wanted = set(binaries)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        rows = []
        record = next(n for n in old.namelist() if n.endswith(".dist-info/RECORD"))
        if absent := wanted - set(old.namelist()):
            raise RuntimeError(f"{source.name} has no {min(absent)}; give the name of a file in it")
        for item in old.infolist():
            if item.is_dir() or item.filename == record or not keeps(distribution, item.filename, wanted):
                continue
            content = old.read(item)
            if architecture and item.filename in wanted:
                content = keep_architecture(content, architecture)
            copied = zipfile.ZipInfo(item.filename, date_time=(1980, 1, 1, 0, 0, 0))
            copied.external_attr = item.external_attr
            new.writestr(copied, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append([item.filename, f"sha256={digest}", str(len(content))])
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([*rows, [record, "", ""]])
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


def install_tree(wheels: list[Path], tree: Path) -> None:
    """Install wheels into a folder for the host's interpreter; scripts, which name this one, are left out."""
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(tree)]
    pip("install", *options, *pip_target(), *map(str, wheels))
    shutil.rmtree(tree / "bin", ignore_errors=True)


def host_needs(resolved: list[dict[str, Any]], metadata: Iterable[str]) -> dict[str, dict[str, str]]:
    """What must be on the host: by name the version that was resolved and the bounds that are asked for.

    Args:
        resolved: of :func:`resolve`.
        metadata: METADATA of everything carried.

    """
    bounds: dict[str, list[str]] = {}
    for text in metadata:
        for requirement in requirements_of(text):
            name = canonicalize_name(requirement.name)
            if name not in OTHER_VERSION_SERVES and str(requirement.specifier):
                bounds.setdefault(name, []).append(str(requirement.specifier))
    for pin in map(Requirement, HOST_PINS):
        bounds[canonicalize_name(pin.name)] = [str(pin.specifier)]
    needs: dict[str, dict[str, str]] = {}
    for found in resolved:
        name = canonicalize_name(found["metadata"]["name"])
        if name in ON_HOST:
            wanted = ",".join(sorted(set(bounds.get(name, []))))
            needs[name] = {"resolved": found["metadata"]["version"], "needs": wanted}
    return needs


def groups_of(folder: Path) -> list[list[Path]]:
    """The files of a folder, parted into what shares an archive: large files alone, the rest by kind."""
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    groups = [[file] for file in sorted(files) if file.stat().st_size >= _LARGE_BYTES]
    group: list[Path] = []
    size = 0
    for file in sorted(files, key=lambda file: (file.suffix == ".so", file)):
        if file.stat().st_size >= _LARGE_BYTES:
            continue
        if size > _ARCHIVE_BYTES:
            groups.append(group)
            group, size = [], 0
        group.append(file)
        size += file.stat().st_size
    return [*groups, group] if group else groups


def compress(folder: Path, files: list[Path], cache: Path) -> bytes:
    """One xz-compressed tar of files of a folder.

    Args:
        folder: what the names in the archive begin under.
        files: what goes in.
        cache: keeps the archive of a single file, which is a large one and takes a minute, under its digest.

    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    if any(file.suffix == ".so" for file in files):
        filters.insert(0, {"id": lzma.FILTER_X86})
    known = None
    if len(files) == 1:
        names = f"{files[0].relative_to(folder)}{filters}".encode()
        known = cache / f"{hashlib.sha256(names + files[0].read_bytes()).hexdigest()}.tar.xz"
        if known.exists():
            return known.read_bytes()
    packed = io.BytesIO()
    with (
        lzma.open(packed, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|") as archive,
    ):
        for file in files:
            member = tarfile.TarInfo(str(file.relative_to(folder)))
            member.size, member.mode = file.stat().st_size, 0o755 if file.suffix == ".so" else 0o644
            with file.open("rb") as content:
                archive.addfile(member, content)
    if known is not None:
        known.write_bytes(packed.getvalue())
    return packed.getvalue()


def pack(folder: Path, out: Path, cache: Path, part_bytes: int) -> dict[str, Any]:
    """Write everything in a folder as independent archives, joined and cut into parts.

    Args:
        folder: what to pack.
        out: gets the parts, `bundle.tar.xz.00` and on; earlier ones go.
        cache: see :func:`compress`.
        part_bytes: most bytes of a part.

    Returns:
        ``archives``: bytes of each, in order; ``parts``: name, bytes and sha256 of each, in order.

    """
    for old in out.glob("bundle.tar.xz.*"):
        old.unlink()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        archives = list(pool.map(lambda files: compress(folder, files, cache), groups_of(folder)))
    whole = b"".join(archives)
    parts: list[dict[str, Any]] = []
    for start in range(0, len(whole), part_bytes):
        content = whole[start : start + part_bytes]
        name = f"bundle.tar.xz.{len(parts):02d}"
        (out / name).write_bytes(content)
        parts.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return {"archives": [len(archive) for archive in archives], "parts": parts}


def sizes_of(tree: Path) -> list[tuple[str, float, float]]:
    """Every distribution in a tree with its MiB, as they are and each file compressed; largest first."""
    found = []
    for distribution in distributions(path=[str(tree)]):
        files = [Path(str(file.locate())) for file in distribution.files or []]
        contents = [file.read_bytes() for file in files if file.is_file()]
        packed = sum(len(zlib.compress(content)) for content in contents)
        found.append((distribution.name, sum(map(len, contents)) / MIB, packed / MIB))
    return sorted(found, key=lambda row: -row[2])


def build(out: Path, part_bytes: int, binaries: tuple[str, ...], whole: bool, sizes: bool) -> dict[str, Any]:
    """Download, install into a tree, pack; returns the manifest."""
    downloads = out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    vllm = download_vllm(downloads)
    with zipfile.ZipFile(vllm) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needed = needed_of(archive.read(metadata).decode())
    resolved = resolve([*needed, *project_requirements(), *HOST_PINS])
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder, tree = Path(scratch) / "wheels", Path(scratch) / "tree"
        folder.mkdir()
        for wheel in download_wheels(resolved, downloads):
            rewrite_wheel(wheel, folder / wheel.name)
        rewrite_wheel(vllm, folder / vllm.name, binaries, 0 if whole else ARCHITECTURE)
        project = build_project(Path(scratch))
        rewrite_wheel(project, folder / project.name)
        install_tree(sorted(folder.iterdir()), tree)
        if sizes:
            for name, raw, packed in sizes_of(tree):
                print(f"{name:44} {raw:8.2f} MiB, compressed {packed:7.2f}")
        found = list(distributions(path=[str(tree)]))
        manifest = {
            "vllm": VLLM,
            "commit": commit(),
            "host": host_needs(resolved, [str(d.read_text("METADATA")) for d in found]),
            "not_needed": sorted(NOT_NEEDED),
            "carried": {d.name: d.version for d in sorted(found, key=lambda d: d.name.lower())},
        }
        copy_sources(tree / "source")
        return manifest | pack(tree, out, downloads, part_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--part-mib", type=int, default=MOST_PART_MIB, help=f"size of a part, at most {MOST_PART_MIB}"
    )
    parser.add_argument(
        "--binary", action="append", default=[], help="a further compiled file of vLLM's wheel to carry"
    )
    parser.add_argument(
        "--whole-libraries", action="store_true", help="carry machine code for every GPU, not sm_90 alone"
    )
    parser.add_argument("--sizes", action="store_true", help="list what every distribution takes")
    args = parser.parse_args()
    if not 1 <= args.part_mib <= MOST_PART_MIB:
        parser.error(f"--part-mib is {args.part_mib}; give 1 to {MOST_PART_MIB}")
    binaries = (*BINARIES, *args.binary)
    manifest = build(args.out, args.part_mib * MIB, binaries, args.whole_libraries, args.sizes)
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copyfile(HERE / "install.py", args.out / "install.py")
    total = sum(part["bytes"] for part in manifest["parts"])
    print(
        f"{len(manifest['parts'])} parts, {total / MIB:.1f} MiB, {len(manifest['carried'])} distributions, "
        f"in {args.out}"
    )


if __name__ == "__main__":
    main()
