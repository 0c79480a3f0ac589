"""Install the offline bundle on a GPU host, with nothing but Python 3.12.

    python install.py PARTS TARGET

joins the parts that lie in the folder PARTS (beside `manifest.json`), checks them, and unpacks the tree that
they hold into the folder TARGET, which goes in front of the host's own packages:

    export PYTHONPATH=TARGET

A target that holds this bundle already is left as it is. Then it says in one sentence each what the host
lacks or has of a version that does not fit, what cannot be imported, and, where there is a GPU, which of the
carried libraries does not run on it. The exit status is 0 when there is nothing to say. The last lines are
the commands that go on from there.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Holds the digest of the installed bundle, once all of it is there.
STAMP = "bundle.sha256"
CHECK = Path("source/benchmarks/gpu/offline/install_check.py")
CHECK_S = 120.0
FIRST_RUN = Path("source/benchmarks/gpu/first_run.py")


def stamp_of(manifest: dict[str, Any]) -> str:
    """What tells one bundle from another: a digest over its parts'."""
    return hashlib.sha256("".join(part["sha256"] for part in manifest["parts"]).encode()).hexdigest()


def installed(target: Path, manifest: dict[str, Any]) -> bool:
    """Whether the target holds this very bundle."""
    stamp = target / STAMP
    return stamp.is_file() and stamp.read_text() == stamp_of(manifest)


def join(folder: Path, manifest: dict[str, Any]) -> bytes:
    """The parts in one.

    Raises:
        RuntimeError: parts are missing or one is damaged; one sentence says which.

    """
    names = [part["name"] for part in manifest["parts"]]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise RuntimeError(f"{', '.join(absent)} {verb} missing; copy all {len(names)} parts to {folder}")
    contents = [(folder / name).read_bytes() for name in names]
    for part, content in zip(manifest["parts"], contents, strict=True):
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise RuntimeError(f"{part['name']} is damaged (its sha256 differs); copy it again")
    return b"".join(contents)


def archives(joined: bytes, lengths: list[int]) -> Iterator[bytes]:
    """The independent archives that the parts were cut from."""
    start = 0
    for length in lengths:
        yield joined[start : start + length]
        start += length


def unpack(archive: bytes, folder: Path) -> None:
    """One archive into a folder, to which other threads unpack others."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r|xz") as tar:
        for member in tar:
            # tarfile looks whether a folder is there and then makes it; in between another thread may have.
            safe = tarfile.data_filter(member, str(folder))
            (folder / safe.name).parent.mkdir(parents=True, exist_ok=True)
            tar.extract(member, folder, filter="data")


def install(parts: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Unpack beside the target, archives in parallel, and put the result in its place.

    Raises:
        RuntimeError: a part is missing or damaged, or the target holds something else than a bundle.

    """
    if target.exists() and any(target.iterdir()) and not (target / STAMP).is_file():
        raise RuntimeError(f"{target} holds something else than a bundle; give a new or an empty folder")
    joined = join(parts, manifest)
    fresh = target.with_name(target.name + ".unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda one: unpack(one, fresh), archives(joined, manifest["archives"])):
            pass
    (fresh / STAMP).write_text(stamp_of(manifest))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def environment(target: Path) -> dict[str, str]:
    """This process's environment with the target in front of the host's packages."""
    path = os.pathsep.join(filter(None, [str(target.resolve()), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def differences(manifest: dict[str, Any]) -> list[str]:
    """What the host lacks or has in a version that does not fit, a sentence each."""
    from packaging.specifiers import SpecifierSet

    found = []
    for name, wanted in sorted(manifest["host"].items()):
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(
                f"{name} is not on this host; the bundle was resolved with {wanted['resolved']} there."
            )
            continue
        if not SpecifierSet(wanted["needs"]).contains(have.split("+")[0], prereleases=True):
            found.append(f"{name} is {have} on this host; the bundle needs {wanted['needs']}.")
    return found


def check(target: Path, script: Path = CHECK, limit_s: float = CHECK_S) -> list[str]:
    """What does not import or run with the target in front, a sentence each.

    One process does all of it. Where one ends without a word (a library that takes it down), another goes on
    behind what it had begun last. One that is not done after ``limit_s`` seconds is ended, which is said too.
    """
    found: list[str] = []
    begun: list[str] = []
    while True:
        try:
            done = subprocess.run(
                [sys.executable, str(target / script), *begun],
                capture_output=True,
                text=True,
                env=environment(target),
                check=False,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return [
                *found,
                f"{script.name} was not done after {limit_s:.0f} s and was ended; see where it hangs with "
                f"PYTHONPATH={target.resolve()} {sys.executable} {target / script}",
            ]
        lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
        new = [line[1] for line in lines if line[0] == "BEGIN"]
        found += [line[1] for line in lines if line[0] == "SAY"]
        if ["END"] in lines:
            return found
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if not new:
            return [*found, f"{script.name} ended with code {done.returncode}: {reason}"]
        found.append(f"{new[-1]} ends the process with code {done.returncode}: {reason}")
        begun += new


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--no-check", action="store_true", help="do not check what is installed")
    args = parser.parse_args()
    if sys.version_info[:2] != (3, 12):
        print(f"this is Python {sys.version.split()[0]}; the bundle is for 3.12, use that")
        return 1
    began = time.monotonic()
    try:
        manifest = json.loads((args.parts / "manifest.json").read_text())
        if installed(args.target, manifest):
            print(f"{args.target} holds this bundle already")
        else:
            install(args.parts, args.target, manifest)
            print(f"installed in {time.monotonic() - began:.0f} s")
    except (OSError, RuntimeError) as error:
        print(error)
        return 1
    began = time.monotonic()
    sys.path.insert(0, str(args.target))
    sentences = [] if args.no_check else [*differences(manifest), *check(args.target)]
    for sentence in sentences:
        print(sentence)
    if not args.no_check:
        print(f"checked in {time.monotonic() - began:.0f} s: {len(sentences) or 'nothing'} to say")
    print(f"vllm {version('vllm')} and vllm-hybrid {version('vllm-hybrid')} are in {args.target}; go on with")
    print(f"  export PYTHONPATH={args.target.resolve()}")
    script = args.target.resolve() / FIRST_RUN
    print(
        f"  {sys.executable} {script} --out RESULTS --stage smoke --minutes 9 --commit {manifest['commit']}"
    )
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
