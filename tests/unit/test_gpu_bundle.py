"""The offline bundle without a GPU host: what is carried, how it is packed, installed and checked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.offline import bundle, fatbin, install, install_check
from benchmarks.gpu.running.cases import UNLIMITED_S
from benchmarks.gpu.speed import model, thresholds
from tests.support.paths import ROOT


def write_wheel(file: Path, files: dict[str, bytes]) -> None:
    """A wheel named vllm with a true RECORD."""
    record = "vllm-0.32.0.dist-info/RECORD"
    rows = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(record, "\n".join([*rows, f"{record},,"]) + "\n")


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    """An entry as nvcc writes it: a header of 64 bytes, then the payload."""
    header = bytearray(64)
    struct.pack_into("<HHIQ", header, 0, kind, 0x101, 64, len(payload))
    struct.pack_into("<I", header, 0x1C, architecture)
    return bytes(header) + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<4sHHQ", b"\x50\xed\x55\xba", 1, 16, len(body)) + body


ELF, PTX = 2, 1
H100_CODE = entry(ELF, 90, b"code for sm_90a." * 3)
SHORTEST = entry(ELF, 75, b"short")
LIBRARY = (
    b"host code"
    + container(SHORTEST, entry(ELF, 80, b"code for sm_80.." * 9), H100_CODE, entry(PTX, 90, b"text"))
    + b"between"
    + container(entry(ELF, 80, b"long code" * 8), entry(PTX, 80, b"s"))
    + b"end"
)
C, FLASH = bundle.BINARIES
WHEEL_FILES = {
    "vllm/__init__.py": b"version = 1\n",
    C: LIBRARY,
    FLASH: LIBRARY,
    "vllm/_moe_C_stable_libtorch.abi3.so": b"not needed",
    "vllm/vllm-rs": b"a server in another language",
    "vllm/third_party/deep_gemm/include/a.hpp": b"template",
    "vllm/kernels/config.json": b"{}",
    "vllm-0.32.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n",
    "vllm-0.32.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
    "vllm-0.32.0.dist-info/entry_points.txt": b"[vllm.general_plugins]\nhybrid = vllm:register\n",
}
WHEEL = "vllm-0.32.0-py3-none-any.whl"


@pytest.fixture
def slim(tmp_path: Path) -> Path:
    """vLLM's toy wheel as the bundle takes it."""
    (tmp_path / "whole").mkdir()
    write_wheel(tmp_path / "whole" / WHEEL, WHEEL_FILES)
    assert bundle.record_is_true(tmp_path / "whole" / WHEEL)
    bundle.rewrite_wheel(tmp_path / "whole" / WHEEL, tmp_path / WHEEL, bundle.BINARIES, 90)
    return tmp_path / WHEEL


# What is carried.


def test_a_slim_wheel_is_a_true_wheel_of_the_same_version(slim: Path) -> None:
    dropped = {
        "vllm/_moe_C_stable_libtorch.abi3.so",
        "vllm/vllm-rs",
        "vllm/third_party/deep_gemm/include/a.hpp",
    }
    with zipfile.ZipFile(slim) as archive:
        assert set(archive.namelist()) == set(WHEEL_FILES) - dropped | {"vllm-0.32.0.dist-info/RECORD"}
        assert archive.read(C) == fatbin.keep_architecture(LIBRARY, 90) != LIBRARY
    assert bundle.record_is_true(slim)


def test_a_wheel_with_a_wrong_record_is_noticed(tmp_path: Path) -> None:
    source, changed = tmp_path / "whole.whl", tmp_path / "changed.whl"
    write_wheel(source, WHEEL_FILES)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"other" if name == "vllm/__init__.py" else old.read(name))
    assert not bundle.record_is_true(changed)


def test_a_binary_that_the_wheel_does_not_have_is_refused(tmp_path: Path) -> None:
    write_wheel(tmp_path / WHEEL, WHEEL_FILES)
    with pytest.raises(RuntimeError, match=r"has no vllm/none\.so"):
        bundle.rewrite_wheel(tmp_path / WHEEL, tmp_path / "slim.whl", ["vllm/none.so"])


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp38-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", True),
        ("a-1-cp312-abi3-manylinux_2_26_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp313-abi3-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_39_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("a-1-cp312-cp312-macosx_11_0_arm64.whl", False),
    ],
)
def test_only_wheels_for_the_host_fit(wheel: str, fits: bool) -> None:
    assert bundle.fits_host(wheel) is fits


METADATA = "\n".join(
    [
        "Metadata-Version: 2.1",
        "Requires-Dist: torch==2.13.0",
        "Requires-Dist: flashinfer-python==0.7.0",
        "Requires-Dist: msgspec",
        'Requires-Dist: six>=1.16.0; python_version > "3.11"',
        'Requires-Dist: old; python_version < "3.12"',
        'Requires-Dist: pandas; extra == "bench"',
        "Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0",
    ]
)


def test_requirements_leave_out_the_host_s_torch_and_what_llava_never_imports() -> None:
    assert bundle.needed_of(METADATA) == ["msgspec", "six>=1.16.0", "fastapi[standard]<0.137.0,>=0.133.0"]


def test_what_the_host_has_or_llava_does_without_is_not_carried() -> None:
    left = ("torch", "triton", "nvidia-cublas", "cuda-bindings", "numpy", "opentelemetry-sdk", "PyJWT")
    assert [name for name in left if bundle.carried(name)] == []
    assert all(bundle.carried(name) for name in ("msgspec", "Apache_TVM_FFI", "pydantic"))
    assert not bundle.keeps("vllm-hybrid", "vllm_hybrid/demo/embedded/model.safetensors")
    assert bundle.keeps("vllm-hybrid", "vllm_hybrid/demo/embedded/tokenizer.model")
    assert not bundle.keeps("vllm", "vllm/_flashmla_C.abi3.so", bundle.BINARIES)
    assert bundle.keeps("vllm", FLASH, bundle.BINARIES) and bundle.keeps("msgspec", "msgspec/_core.so")
    # What is left out of the wheels has to be in this project's files, or the rule is about nothing.
    assert all((ROOT / name).is_file() for name in bundle.LEFT_OUT["vllm-hybrid"])


def test_the_host_is_held_to_the_bounds_of_what_is_carried() -> None:
    names = {"requests": "2.34.2", "torch": "2.11.0", "msgspec": "0.22.0", "numba": "0.65.0"}
    resolved = [{"metadata": {"name": name, "version": version}} for name, version in names.items()]
    pinned = METADATA + "\nRequires-Dist: numba==0.65.0\nRequires-Dist: requests>=2.33.0"
    assert bundle.host_needs(resolved, [pinned, "Requires-Dist: requests<3"]) == {
        "requests": {"resolved": "2.34.2", "needs": "<3,>=2.33.0"},
        "torch": {"resolved": "2.11.0", "needs": "==2.11.0"},
        "numba": {"resolved": "0.65.0", "needs": ""},
    }


def test_sources_for_the_check_and_the_benchmark_are_carried(tmp_path: Path) -> None:
    bundle.copy_sources(tmp_path / "source")
    for file in (install.CHECK, install.FIRST_RUN, Path("source/benchmarks/gpu/speed/thresholds.json")):
        assert (tmp_path / file).is_file()
    assert (tmp_path / "source" / "tests" / "support" / "engines.py").is_file()
    assert {"typer", "rich"} <= set(bundle.project_requirements())


# Machine code for one architecture.


def test_of_a_library_the_code_for_one_architecture_stays_in_its_place() -> None:
    kept = fatbin.keep_architecture(LIBRARY, 90)
    assert len(kept) == len(LIBRARY)
    places = [at for at, _ in fatbin.containers(LIBRARY)]
    assert [at for at, _ in fatbin.containers(kept)] == places
    (_, first), (_, second) = fatbin.containers(kept)
    assert [found.content for found in first] == [H100_CODE]
    # Nothing here is for sm_90; the library's shortest other entry stands in, so that no container is empty.
    assert [found.content for found in second] == [SHORTEST]
    for text in (b"host code", b"between", b"end"):
        assert kept.index(text) == LIBRARY.index(text)
    assert kept.count(b"code for sm_80") == 0


def test_a_library_that_cannot_be_read_is_left_whole() -> None:
    with pytest.raises(ValueError, match="no machine code for sm_70"):
        fatbin.keep_architecture(LIBRARY, 70)
    torn = container(entry(ELF, 90, b"x" * 40))[:16] + entry(ELF, 90, b"x" * 60)
    with pytest.raises(ValueError, match="do not fill it"):
        fatbin.keep_architecture(torn, 90)
    with pytest.raises(ValueError, match="version 7"):
        fatbin.keep_architecture(b"\x50\xed\x55\xba" + struct.pack("<HHQ", 7, 16, 0), 90)


# Packing and installing.


def packed(tree: Path, parts: Path, part_bytes: int) -> dict[str, Any]:
    """The parts of a tree and their manifest."""
    parts.mkdir()
    manifest = bundle.pack(tree, parts, tree.parent, part_bytes) | {"host": {}}
    (parts / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enough files for several archives."""
    folder = tmp_path / "tree"
    (folder / "package").mkdir(parents=True)
    for number in range(4):
        (folder / "package" / f"module_{number}.py").write_bytes(random.randbytes(2000))
    (folder / "large.so").write_bytes(random.randbytes(5000))
    (folder / "package" / "empty.py").write_text("")
    monkeypatch.setattr(bundle, "_LARGE_BYTES", 4000)
    monkeypatch.setattr(bundle, "_ARCHIVE_BYTES", 3000)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_that_another_thread_makes_first_is_no_error(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.makedirs

    def make_late(path: str, *args: Any, **kwargs: Any) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", make_late)
    manifest = packed(tree, tmp_path / "parts", 3000)
    install.install(tmp_path / "parts", tmp_path / "target", manifest)
    assert install.installed(tmp_path / "target", manifest)


def test_what_is_installed_is_what_was_packed(tmp_path: Path, tree: Path) -> None:
    parts, target = tmp_path / "parts", tmp_path / "target"
    manifest = packed(tree, parts, 3000)
    assert len(manifest["archives"]) == 3 and len(manifest["parts"]) > 3
    assert all(part["bytes"] <= 3000 for part in manifest["parts"])
    assert not install.installed(target, manifest)
    install.install(parts, target, manifest)
    assert install.installed(target, manifest)
    assert content_of(target) == content_of(tree) | {install.STAMP: install.stamp_of(manifest).encode()}
    assert not os.access(target / "package" / "module_0.py", os.X_OK) and os.access(
        target / "large.so", os.X_OK
    )
    # Another bundle takes the place of all of it.
    (tree / "package" / "module_0.py").unlink()
    second = packed(tree, tmp_path / "second", 3000)
    assert not install.installed(target, second)
    install.install(tmp_path / "second", target, second)
    assert "package/module_0.py" not in content_of(target)


def test_missing_and_damaged_parts_are_named(tmp_path: Path, tree: Path) -> None:
    parts, target = tmp_path / "parts", tmp_path / "target"
    manifest = packed(tree, parts, 3000)
    names = [part["name"] for part in manifest["parts"]]
    whole = (parts / names[1]).read_bytes()
    (parts / names[1]).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=rf"{names[1]} is damaged \(its sha256 differs\); copy it again"):
        install.install(parts, target, manifest)
    (parts / names[0]).unlink()
    (parts / names[2]).unlink()
    with pytest.raises(
        RuntimeError, match=f"{names[0]}, {names[2]} are missing; copy all {len(names)} parts"
    ):
        install.install(parts, target, manifest)
    assert not target.exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, tree: Path) -> None:
    manifest = packed(tree, tmp_path / "parts", 3000)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(
        RuntimeError, match="holds something else than a bundle; give a new or an empty folder"
    ):
        install.install(tmp_path / "parts", tmp_path / "mine", manifest)
    assert content_of(tmp_path / "mine") == {"notes.txt": b"kept"}


def test_the_installed_tree_keeps_entry_points(tmp_path: Path, slim: Path) -> None:
    bundle.install_tree([slim], tmp_path / "tree")
    packed(tmp_path / "tree", tmp_path / "parts", 3000)
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    install.install(tmp_path / "parts", tmp_path / "target", manifest)
    code = (
        "from importlib.metadata import *; d = distribution('vllm'); print(d.version, *d.entry_points.names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=install.environment(tmp_path / "target"),
        check=True,
    )
    assert done.stdout.split() == ["0.32.0", "hybrid"]


# Checking what is installed.


CHECKS = """
import sys
sys.path.insert(0, {repo!r})
from benchmarks.gpu.offline import install_check
install_check.MODULES = {modules!r}
install_check.plugin_is_found = lambda: None
install_check.main()
"""


def check(folder: Path, modules: tuple[str, ...]) -> list[str]:
    """What the installer says of modules that lie in a folder."""
    (folder / "check.py").write_text(CHECKS.format(repo=str(ROOT), modules=modules))
    return install.check(folder, Path("check.py"), UNLIMITED_S)


def test_the_installer_names_what_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "present.py").write_text("")
    (tmp_path / "broken.py").write_text("import absent_module\n")
    (tmp_path / "deadly.py").write_text("import os, sys\nprint('died here', file=sys.stderr)\nos._exit(3)\n")
    assert check(tmp_path, ("present", "broken", "deadly", "json", "nowhere")) == [
        "broken cannot be imported: ModuleNotFoundError: No module named 'absent_module'",
        "deadly ends the process with code 3: died here",
        "nowhere cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
        "there is no CUDA device on this host, so neither vLLM's GPU worker nor a kernel was tried.",
    ]


def test_a_check_that_does_not_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text("raise SystemExit('no interpreter for this')")
    assert install.check(tmp_path, Path("check.py"), UNLIMITED_S) == [
        "check.py ended with code 1: no interpreter for this",
    ]


def test_a_check_that_hangs_is_ended_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text("import time; time.sleep(600)")
    (said,) = install.check(tmp_path, Path("check.py"), limit_s=1)
    assert said.startswith(
        "check.py was not done after 1 s and was ended; see where it hangs with PYTHONPATH="
    )


def test_the_plugin_is_looked_for_by_its_entry_point() -> None:
    install_check.plugin_is_found()


def test_a_result_of_the_device_that_is_off_is_noticed() -> None:
    wanted = torch.tensor([1.0, -2.0])
    install_check._compare(wanted.bfloat16(), wanted)
    for wrong in (torch.tensor([1.0, -1.9]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ArithmeticError, match="off by"):
            install_check._compare(wrong, wanted)


def test_the_installer_names_what_does_not_fit() -> None:
    have = torch.__version__.split("+")[0]
    needs = {"torch": f"=={have}", "numpy": "<0.1", "no-such-package": "", "packaging": ""}
    host = {name: {"resolved": "1", "needs": bounds} for name, bounds in needs.items()}
    found = install.differences({"host": host})
    assert len(found) == 2
    assert found[0] == "no-such-package is not on this host; the bundle was resolved with 1 there."
    assert found[1].startswith("numpy is ") and found[1].endswith("the bundle needs <0.1.")


# Thresholds found beforehand.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the tiny size, whose thresholds for 195 tokens of 3 pictures are in the carried file."""
    file = tmp_path / "thresholds.json"
    monkeypatch.setattr(thresholds, "FILE", file)
    arguments = ["--out", str(file), "--size", "tiny", "--lives", "195", "--pictures", "3"]
    monkeypatch.setattr(sys, "argv", ["thresholds.py", *arguments])
    thresholds.main()
    return model.write_folder(tmp_path / "model", model.SIZES["tiny"])


def test_thresholds_found_beforehand_are_those_found_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = model.find_thresholds(tiny, [195], pictures=3)
    # For another number of pictures they are not taken.
    other = model.find_thresholds(model.write_folder(tmp_path / "b", model.SIZES["tiny"]), [195], pictures=2)
    assert found["195"] != other["195"]
    monkeypatch.setattr(model, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    (tiny / "thresholds.json").unlink()
    assert model.find_thresholds(tiny, [195, 576], pictures=3) == found
    # The same as without the carried file.
    monkeypatch.undo()
    (tiny / "thresholds.json").unlink()
    assert model.find_thresholds(tiny, [195], pictures=3) == found


def test_thresholds_of_another_tower_are_not_taken(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(thresholds.FILE.read_text())
    content["found"]["195"]["thresholds"] = [0.5]
    thresholds.FILE.write_text(json.dumps(content))
    assert model.find_thresholds(tiny, [195], pictures=3)["195"]["thresholds"] == [0.5]
    (tiny / "thresholds.json").unlink()
    monkeypatch.setattr(model, "SEED", 1)
    assert model.find_thresholds(tiny, [195], pictures=3)["195"]["thresholds"] != [0.5]
    assert "are for a tower with other random weights" in capsys.readouterr().out


def test_the_carried_thresholds_are_for_the_benchmark_s_size() -> None:
    content = json.loads(thresholds.FILE.read_text())
    vision = model.config(model.SIZES["7b"]).vision_config
    assert thresholds.known_for(vision, model.CALIBRATION_PICTURES) == content
    assert thresholds.known_for(vision, 1) is None
    assert thresholds.known_for(model.config(model.SIZES["tiny"]).vision_config, 32) is None
    for live in thresholds.LIVES:
        found = content["found"][str(live)]
        assert len(found["thresholds"]) == model.SIZES["7b"].vision_layers - 1
        assert len(found["counts"]) == model.CALIBRATION_PICTURES
        assert sum(found["counts"]) / len(found["counts"]) == pytest.approx(live, rel=0.03)


def test_towers_are_told_apart_but_for_rounding() -> None:
    vision = model.config(model.SIZES["tiny"]).vision_config
    first = thresholds.fingerprint(model.seeded_tower(vision))
    assert thresholds.same_tower(first, [x + 1e-8 for x in first])
    assert not thresholds.same_tower(first, [*first[:-1], first[-1] + 1e-4])
    assert not thresholds.same_tower(first, first[:-1])
