"""The installed vLLM is as `vllm_contract.json` says, and the check of it sees what a made-up one changed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import vllm_contract
from tests.support.paths import ROOT

# Called with the name of a module and its source.
Load = Callable[[str, str], ModuleType]

# As the contract below expects it.
FAKE_VLLM = """
import dataclasses
from abc import ABC, abstractmethod
from typing import Literal

KINDS = {"one": 1, "two": 2}
Mode = Literal["fast", "slow"]

@dataclasses.dataclass
class Options:
    size: int
    name: str = ""

class Base(ABC):
    limit = 3

    def __init__(self, options):
        self.kept = options

    @abstractmethod
    def build(self, prefix, metadata, fast=False): ...

    def run(self):
        self._hook(1)

    def _hook(self, request, *, budget=0): ...

def make(first, second, *, third=None): ...
"""
OURS = """
from vllm.fake import Base

class Ours(Base):
    limit = 4

    def build(self, prefix, metadata, fast=False):
        return prefix

    def _hook(self, request, *, budget=0):
        return request
"""
EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "fake.py": {
        "vllm.fake.KINDS": {"has": "one two"},
        "vllm.fake.Mode": {"admits": "fast"},
        "vllm.fake.Options": {"has": "size name", "only": ["size", "name later"], "called": "*, size"},
        "vllm.fake.Base": {"has": "kept limit"},
        "vllm.fake.Base.limit": {},
        "vllm.fake.Base.build": {"takes": ["self, prefix", "self, prefix, metadata, fast=..."]},
        "vllm.fake.Base.run": {"takes": "self, ...", "uses": "_hook", "why": "it calls ours"},
        "vllm.fake.Base._hook": {"takes": "self, request, *, budget=..."},
        "vllm.fake.make": {"called": "first, second, *, third"},
        "vllm.fake.later": {"since": "2.0"},
        "vllm.fake.earlier": {"until": "1.0"},
    }
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Makes a module of its source, which lies in a file, as what is looked at does."""

    def loaded(name: str, source: str) -> ModuleType:
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.mark.engine
def test_the_installed_vllm_is_as_this_package_expects_it() -> None:
    # In a process of its own: it loads the workers of both platforms.
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.vllm_contract"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"


def test_every_name_imported_from_vllm_has_an_entry() -> None:
    assert vllm_contract.undeclared_imports(vllm_contract.read_contract()) == []


def test_a_new_import_needs_an_entry() -> None:
    contract = dict(vllm_contract.read_contract())
    del contract["models/step.py"]
    name = "vllm.v1.attention.backend.CommonAttentionMetadata"
    line = f"{name}: models/step.py imports it, and the contract has no entry"
    assert vllm_contract.undeclared_imports(contract) == [line]


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import vllm.envs\nimport vllm_other\n\ndef f():\n    from vllm import LLM as Model\n"
    assert vllm_contract.vllm_imports(source) == {"vllm.envs", "vllm.LLM"}


# What is replaced in the made-up vLLM, by what, and the phrases that the check has for it.
CHANGES = {
    "a missing function": ("def make(", "def made(", ["vllm.fake.make: is gone"]),
    "a missing class": (
        "class Options:",
        "class Choices:",
        ["vllm.fake.Options: is gone"],
    ),
    "a new required parameter": (
        "prefix, metadata, fast",
        "prefix, metadata, device, fast",
        ["vllm.fake.Base.build: takes a new required parameter 'device' after 'metadata'"],
    ),
    "a new optional parameter": (
        "budget=0",
        "budget=0, shift=0",
        ["vllm.fake.Base._hook: takes a new optional parameter 'shift' after 'budget'"],
    ),
    "a renamed parameter": (
        "prefix, metadata",
        "prefix, common",
        ["vllm.fake.Base.build: parameter 'metadata' is now called 'common'"],
    ),
    "a parameter that is gone": (
        ", *, budget=0",
        "",
        ["vllm.fake.Base._hook: parameter 'budget' is gone"],
    ),
    "a parameter without its default": (
        "fast=False",
        "fast",
        ["vllm.fake.Base.build: parameter 'fast' is now required"],
    ),
    "a function that is a number": (
        "def make(first, second, *, third=None): ...",
        "make = 1",
        ["vllm.fake.make: cannot be looked into (1 is not a callable object)"],
    ),
    "another order": (
        "prefix, metadata",
        "metadata, prefix",
        ["vllm.fake.Base.build: the order of its parameters is now self, metadata, prefix, fast"],
    ),
    "a call that lacks an argument": (
        "third=None",
        "third=None, fourth",
        ["vllm.fake.make: takes a new required parameter 'fourth'"],
    ),
    "a call whose argument is another": (
        "first, second",
        "second, first",
        [
            "vllm.fake.make: argument 1 is 'second', not 'first'",
            "vllm.fake.make: argument 2 is 'first', not 'second'",
        ],
    ),
    "a missing field": ('    name: str = ""\n', "", ["vllm.fake.Options: has no 'name' any more"]),
    "a new field": (
        '    name: str = ""\n',
        '    name: str = ""\n    other: int = 0\n',
        ["vllm.fake.Options: has a new field 'other'"],
    ),
    "an attribute that is no more set": (
        "self.kept =",
        "self.held =",
        ["vllm.fake.Base: has no 'kept' any more"],
    ),
    "a hook that nobody calls": (
        "self._hook(1)",
        "pass",
        ["vllm.fake.Base.run: does not use '_hook' any more (it calls ours)"],
    ),
    "a missing key": ('"two"', '"three"', ["vllm.fake.KINDS: has no 'two' any more"]),
    "a missing value": ('"fast"', '"quick"', ["vllm.fake.Mode: does not admit 'fast' any more"]),
}


def test_a_vllm_as_expected_changes_nothing(load: Load) -> None:
    load("vllm.fake", FAKE_VLLM)
    assert vllm_contract.all_changes(EXPECTED, "1.0") == []


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_said_in_one_line(load: Load, change: str) -> None:
    old, new, lines = CHANGES[change]
    assert old in FAKE_VLLM
    load("vllm.fake", FAKE_VLLM.replace(old, new))
    assert vllm_contract.all_changes(EXPECTED, "1.0") == [f"{line} [fake.py]" for line in lines]


def test_what_newer_versions_have_is_expected_of_them(load: Load) -> None:
    load("vllm.fake", FAKE_VLLM)
    assert vllm_contract.all_changes(EXPECTED, "2.0+cpu") == ["vllm.fake.later: is gone [fake.py]"]


def test_files_that_rely_on_a_name_share_its_line(load: Load) -> None:
    load("vllm.fake", FAKE_VLLM)
    entries = {"vllm.fake.Base": {"has": "held"}}
    lines = vllm_contract.all_changes({"one.py": entries, "two.py": entries}, "1.0")
    assert lines == ["vllm.fake.Base: has no 'held' any more [one.py, two.py]"]


def test_a_module_that_lacks_a_library_is_not_gone(load: Load) -> None:
    with pytest.raises(vllm_contract.Gone, match="^is gone$"):
        vllm_contract.resolve("no_such_package.module.name")
    with pytest.raises(ModuleNotFoundError):
        load("vllm.fake", "import no_such_library")


def test_every_override_needs_an_entry_with_its_signature(load: Load) -> None:
    load("vllm.fake", FAKE_VLLM)
    overrides = vllm_contract.all_overrides([load("vllm_hybrid.fake", OURS)])
    assert vllm_contract.undeclared_overrides(EXPECTED, overrides) == []
    entries = {name: expected for name, expected in EXPECTED["fake.py"].items() if not name.endswith("limit")}
    entries["vllm.fake.Base._hook"] = {}
    ours = "vllm_hybrid.fake.Ours overrides it, and the contract has no"
    assert vllm_contract.undeclared_overrides({"fake.py": entries}, overrides) == [
        f"vllm.fake.Base._hook: {ours} signature",
        f"vllm.fake.Base.limit: {ours} entry",
    ]


def test_a_new_abstract_method_is_named(load: Load) -> None:
    new = "    @abstractmethod\n    def describe(self): ...\n\n    def run(self):"
    load("vllm.fake", FAKE_VLLM.replace("    def run(self):", new))
    line = "vllm.fake.Base.describe: is abstract, and vllm_hybrid.fake.Ours does not have it"
    assert vllm_contract.missing_methods([load("vllm_hybrid.fake", OURS)]) == [line]


def test_an_entry_says_only_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "contract.json"
    file.write_text('{"fake.py": {"vllm.fake": {"hass": "name"}}}')
    monkeypatch.setattr(vllm_contract, "CONTRACT_FILE", file)
    with pytest.raises(ValueError, match=r"contract.json: fake.py, vllm.fake: unknown \['hass'\]"):
        vllm_contract.read_contract()
