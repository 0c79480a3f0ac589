"""What this package takes for granted of vLLM, and a check of the installed vLLM against it.

`vllm_contract.json` has, for each of our files, every name of vLLM's that the file imports, overrides, calls,
reads or sets, and what is expected of it:

    has      attributes, fields, members or keys that it has; a class also those that its methods set
    only     the fields that it has and no others: a new one may ask for what this package has to refuse
    takes    its signature, of a method that we override; several where our code is made for each of them.
             ``=...`` stands for a default, ``, ...`` at the end for whatever our method passes on unseen
    called   names of the parameters that we fill: by position, and behind ``*`` by name, without ``self``
    uses     names and strings that its own code has: a hook that nobody calls any more is still there
    admits   values that a type lists
    since    the first vLLM of which all this is expected
    until    the first vLLM of which it is expected no longer
    why      of "uses", what depends on it

An entry without any of these expects that the name is there. `python -m tests.support.vllm_contract` prints a
line for whatever the installed vLLM has otherwise, and ends with 1 if there are any; `docs/vllm_versions.md`
says how to read them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args

from packaging.version import Version

from tests.support.paths import ROOT

# What is expected of one name, by the words above, and of all names by our file and vLLM's name.
Expected = Mapping[str, Any]
Contract = Mapping[str, Mapping[str, Expected]]

CONTRACT_FILE = Path(__file__).with_suffix(".json")


def read_contract() -> Contract:
    """The contract of this package.

    Raises:
        ValueError: an entry has a word that means nothing.

    """
    contract: Contract = json.loads(CONTRACT_FILE.read_text())
    for file, entries in contract.items():
        for name, expected in entries.items():
            if unknown := expected.keys() - CHECKS.keys() - {"since", "until", "why"}:
                raise ValueError(f"{CONTRACT_FILE.name}: {file}, {name}: unknown {sorted(unknown)}")
    return contract


# How a parameter may be given.
POSITION, EITHER, KEYWORD = "position", "either", "keyword"
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: POSITION,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: EITHER,
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.KEYWORD_ONLY: KEYWORD,
    inspect.Parameter.VAR_KEYWORD: "**",
}
_KIND_SENTENCES = {POSITION: "positional-only", EITHER: "positional or by name", KEYWORD: "keyword-only"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function.

    Attributes:
        name: its name.
        kind: how it may be given; ``*`` and ``**`` are those that take all others.
        required: whether it has no default.

    """

    name: str
    kind: str
    required: bool


class Gone(Exception):
    """vLLM does not have a name; the text says what is missing."""


# Modules that import only with files compiled for CUDA, and where their functions are written.
TEXT_ONLY = {"vllm.vllm_flash_attn": "vllm_flash_attn/flash_attn_interface.py"}


def _from_text(module: str, name: str) -> Any:
    """A function that has the parameters of one in the text of a module, and nothing inside.

    Raises:
        Gone: the text has no such function.

    """
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / TEXT_ONLY[module]
    for node in ast.parse(file.read_text()).body if file.exists() else []:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            own: ast.arguments = node.args
            for argument in (*own.posonlyargs, *own.args, *own.kwonlyargs):
                argument.annotation = None
            own.defaults = [ast.Constant(None) for _ in own.defaults]
            own.kw_defaults = [default and ast.Constant(None) for default in own.kw_defaults]
            node.body, node.decorator_list, node.returns = [ast.Pass()], [], None
            made: dict[str, Any] = {}
            exec(compile(ast.fix_missing_locations(ast.Module([node], [])), str(file), "exec"), made)
            return made[name]
    raise Gone("is gone")


def resolve(name: str) -> Any:
    """The object of a full name, whatever part of the name is a module.

    Raises:
        Gone: there is none.

    """
    module, _, last = name.rpartition(".")
    if module in TEXT_ONLY:
        return _from_text(module, last)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # The module, or a folder that it is in; anything else is a library that vLLM does not find.
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                continue
            raise Gone(f"cannot be imported ({error})") from error
        except Exception as error:
            raise Gone(f"cannot be imported ({type(error).__name__}: {error})") from error
        for place, part in enumerate(parts[count:], start=count):
            if not hasattr(found, part):
                raise Gone("is gone" if place == len(parts) - 1 else f"is gone with '{part}'")
            found = getattr(found, part)
        return found
    raise Gone("is gone")


def parameters_of(function: Any) -> list[Parameter]:
    """The parameters of a function or of a class's constructor."""
    return [
        Parameter(
            p.name, _KINDS[p.kind], p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        )
        for p in inspect.signature(function).parameters.values()
    ]


def parameters_in(text: str) -> tuple[list[Parameter], bool]:
    """The parameters that a declared signature has, and whether more may follow them."""
    text = text.strip()
    is_open = text.endswith("...") and not text.endswith("=...")
    if is_open:
        text = text.removesuffix("...")
    scope: dict[str, Any] = {}
    exec(f"def function({text}): ...", scope)
    return parameters_of(scope["function"]), is_open


def _differences(text: str, found: list[Parameter]) -> list[str]:
    """What a signature has otherwise than a declared one.

    Args:
        text: the declared one.
        found: the parameters that there are.

    """
    expected, is_open = parameters_in(text)
    if is_open:
        found = found[: len(expected)]
    return [*_gone_and_new(expected, found), *_altered(expected, found)]


def _gone_and_new(expected: list[Parameter], found: list[Parameter]) -> Iterator[str]:
    names = [p.name for p in found]
    added = [p for p in found if p.name not in {e.name for e in expected}]
    for place, parameter in enumerate(expected):
        if parameter.name in names:
            continue
        there = found[place] if place < len(found) else None
        if there in added and there.kind == parameter.kind:
            added.remove(there)
            yield f"parameter '{parameter.name}' is now called '{there.name}'"
        else:
            yield f"parameter '{_shown(parameter)}' is gone"
    for parameter in added:
        place = names.index(parameter.name)
        where = f"after '{_shown(found[place - 1])}'" if place else "in the first place"
        need = "required" if parameter.required else "optional"
        yield f"takes a new {need} parameter '{_shown(parameter)}' {where}"


def _altered(expected: list[Parameter], found: list[Parameter]) -> Iterator[str]:
    now = {p.name: p for p in found}
    common = [p for p in expected if p.name in now]
    for parameter in common:
        there = now[parameter.name]
        if there.kind != parameter.kind:
            yield f"parameter '{parameter.name}' is now {_KIND_SENTENCES.get(there.kind, there.kind)}"
        elif there.required != parameter.required:
            now_is = "is now required" if there.required else "now has a default"
            yield f"parameter '{parameter.name}' {now_is}"
    ordered = [p.name for p in found if p.name in {e.name for e in common} and p.kind != KEYWORD]
    if ordered != [p.name for p in common if now[p.name].kind != KEYWORD]:
        yield f"the order of its parameters is now {', '.join(ordered)}"


def _shown(parameter: Parameter) -> str:
    return f"{parameter.kind if parameter.kind in ('*', '**') else ''}{parameter.name}"


def names_of(found: Any) -> set[str]:
    """Names that an object has: its attributes, a mapping's keys; of a class also what its methods set."""
    names = set(dir(found)) | (set(found) if isinstance(found, Mapping) else set())
    for cls in (found if isinstance(found, type) else type(found)).__mro__:
        names |= {*vars(cls), *inspect.get_annotations(cls)}
        if _is_vllms(cls):
            names |= assigned_in(cls)
    return names


def fields_of(cls: type) -> list[str]:
    """The fields of a dataclass or of a message's class, in their order."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "__struct_fields__", ()))


def _is_vllms(cls: type) -> bool:
    return cls.__module__ == "vllm" or cls.__module__.startswith("vllm.")


@functools.cache
def assigned_in(cls: type) -> frozenset[str]:
    """Names that the methods of a class assign to ``self``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def names_in(source: str) -> set[str]:
    """Names and quoted keys that a piece of source has."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def lacking(found: Any, names: str) -> Iterator[str]:
    """Names that an object does not have."""
    known = names_of(found)
    return (f"has no '{name}' any more" for name in names.split() if name not in known)


def new_fields(found: Any, names: str) -> Iterator[str]:
    """Fields that a class has beside those named; an older vLLM need not have all of these."""
    known = set(names.split())
    return (f"has a new field '{name}'" for name in fields_of(found) if name not in known)


def unused(found: Any, names: str) -> Iterator[str]:
    """Names that the source of an object does not have."""
    known = names_in(inspect.getsource(inspect.unwrap(found)))
    return (f"does not use '{name}' any more" for name in names.split() if name not in known)


def not_admitted(found: Any, values: str) -> Iterator[str]:
    """Values that a type does not list."""
    admitted = {value for part in (found, *get_args(found)) for value in get_args(part)}
    return (f"does not admit '{value}' any more" for value in values.split() if value not in admitted)


def signature_changes(found: Any, *signatures: str) -> list[str]:
    """What the signature of a function has otherwise than the declared one that is nearest to it."""
    parameters = parameters_of(found)
    return min((_differences(text, parameters) for text in signatures), key=len)


def call_changes(found: Any, arguments: str) -> Iterator[str]:
    """Why a function, or a class, cannot be called with the declared arguments."""
    given, _ = parameters_in(arguments)
    parameters = [p for p in parameters_of(found) if p.name != "self"]
    yield from _misplaced(parameters, [p.name for p in given if p.kind != KEYWORD])
    yield from _unknown(parameters, [p.name for p in given if p.kind == KEYWORD])
    filled = {p.name for p in given}
    for parameter in parameters:
        if parameter.required and parameter.name not in filled:
            yield f"takes a new required parameter '{parameter.name}'"


def _misplaced(parameters: list[Parameter], by_position: list[str]) -> Iterator[str]:
    if any(p.kind == "*" for p in parameters):
        return
    places = [p.name for p in parameters if p.kind in (POSITION, EITHER)]
    for place, name in enumerate(by_position):
        if place >= len(places):
            yield f"takes no argument {place + 1} ('{name}') by position any more"
        elif places[place] != name:
            yield f"argument {place + 1} is '{places[place]}', not '{name}'"


def _unknown(parameters: list[Parameter], by_name: list[str]) -> Iterator[str]:
    known = {p.name for p in parameters if p.kind in (EITHER, KEYWORD)}
    if not any(p.kind == "**" for p in parameters):
        yield from (f"parameter '{name}' is gone" for name in by_name if name not in known)


# Each is called with vLLM's object and what an entry says of it, and yields phrases that go on from its name.
CHECKS: dict[str, Callable[..., Iterable[str]]] = {
    "has": lacking,
    "only": new_fields,
    "takes": signature_changes,
    "called": call_changes,
    "uses": unused,
    "admits": not_admitted,
}


def changes(found: Any, expected: Expected) -> list[str]:
    """What one of vLLM's objects has otherwise than expected, a phrase each."""
    lines = []
    for word, check in CHECKS.items():
        if word not in expected:
            continue
        said = expected[word] if isinstance(expected[word], list) else [expected[word]]
        arguments = said if word == "takes" else [" ".join(said)]
        why = f" ({expected['why']})" if word == "uses" and "why" in expected else ""
        lines += [f"{change}{why}" for change in check(found, *arguments)]
    return lines


def all_changes(contract: Contract, version: str) -> list[str]:
    """What the installed vLLM has otherwise than a contract, a line for each change.

    Args:
        contract: what is expected.
        version: of the vLLM that is installed.

    Returns:
        ``vLLM's name: what changed [our files that rely on it]``.

    """
    files: dict[str, list[str]] = {}
    for file, entries in contract.items():
        for name, expected in entries.items():
            for change in changes_of(name, expected, version):
                files.setdefault(f"{name}: {change}", []).append(file)
    return [f"{change} [{', '.join(users)}]" for change, users in files.items()]


def changes_of(name: str, expected: Expected, version: str) -> list[str]:
    """What vLLM has otherwise of one name, a phrase each.

    Args:
        name: vLLM's, in full.
        expected: the name's entry.
        version: of the vLLM that is installed.

    """
    installed = Version(Version(version).base_version)
    if installed < Version(expected.get("since", "0")):
        return []
    if "until" in expected and installed >= Version(expected["until"]):
        return []
    try:
        return changes(resolve(name), expected)
    except Gone as error:
        return [str(error)]
    except (OSError, TypeError, ValueError) as error:
        # It is there, and no function or class written in Python any more.
        return [f"cannot be looked into ({error})"]


@dataclass(frozen=True)
class Override:
    """A name of one of our classes that vLLM's base has too.

    Attributes:
        name: vLLM's, in full.
        ours: our class's, in full.
        is_method: whether ours is a function.

    """

    name: str
    ours: str
    is_method: bool


def all_overrides(modules: Iterable[ModuleType]) -> dict[str, list[Override]]:
    """What our classes override of vLLM's, by the module that the overriding class is in."""
    found: dict[str, list[Override]] = {}
    for cls in _classes(modules):
        for ours in cls.__mro__[:-1]:
            if ours.__module__.startswith("vllm_hybrid."):
                for override in _overrides_in(cls, ours):
                    entries = found.setdefault(ours.__module__, [])
                    if override not in entries:
                        entries.append(override)
    return found


def _classes(modules: Iterable[ModuleType]) -> Iterator[type]:
    """Classes of ours that have one of vLLM's among their bases."""
    for module in modules:
        for cls in vars(module).values():
            if (
                isinstance(cls, type)
                and cls.__module__ == module.__name__
                and any(map(_is_vllms, cls.__mro__))
            ):
                yield cls


def _overrides_in(cls: type, ours: type) -> Iterator[Override]:
    """What one class overrides in the line of bases of another, which may be itself."""
    behind = cls.__mro__[cls.__mro__.index(ours) + 1 :]
    for name in sorted(written_in(ours)):
        value = vars(ours)[name]
        base = next((other for other in behind if name in vars(other)), None)
        if base is None or not _is_vllms(base):
            continue
        plain = inspect.unwrap(getattr(value, "__func__", value))
        full_name = f"{base.__module__}.{base.__qualname__}.{name}"
        yield Override(full_name, f"{ours.__module__}.{ours.__qualname__}", isinstance(plain, FunctionType))


@functools.cache
def written_in(cls: type) -> frozenset[str]:
    """Names that the body of a class defines, without what decorators and Python add."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: set[str] = set()
    for node in body.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found.add(node.target.id)
    return frozenset(found)


def undeclared_overrides(contract: Contract, overrides: Mapping[str, Iterable[Override]]) -> list[str]:
    """Overrides without an entry in the group of their file, a line each; a method's has a signature."""
    lines = []
    for module, found in overrides.items():
        entries = contract.get(file_of(module), {})
        for override in found:
            entry = entries.get(override.name)
            if entry is None or (override.is_method and "takes" not in entry):
                what = "signature" if override.is_method else "entry"
                lines.append(f"{override.name}: {override.ours} overrides it, and the contract has no {what}")
    return lines


def missing_methods(modules: Iterable[ModuleType]) -> list[str]:
    """Abstract methods of vLLM's that a class of ours does not have, a line each."""
    lines = []
    for cls in _classes(modules):
        for name in sorted(getattr(cls, "__abstractmethods__", ())):
            base = next(b for b in cls.__mro__ if name in vars(b))
            lines.append(
                f"{base.__module__}.{base.__qualname__}.{name}: is abstract, and "
                f"{cls.__module__}.{cls.__qualname__} does not have it"
            )
    return lines


def file_of(module: str) -> str:
    """Path of one of our modules inside the package, e.g. ``engine/scheduler.py``."""
    return f"{module.removeprefix('vllm_hybrid.').replace('.', '/')}.py"


def our_modules(contract: Contract) -> tuple[list[ModuleType], list[str]]:
    """Our modules that a contract is about, and a line for each that cannot be imported."""
    modules, lines = [], []
    for file in contract:
        name = f"vllm_hybrid.{file.removesuffix('.py').replace('/', '.')}"
        try:
            modules.append(importlib.import_module(name))
        except Exception as error:
            lines.append(f"{name}: cannot be imported ({type(error).__name__}: {error})")
    return modules, lines


def vllm_imports(source: str) -> set[str]:
    """Full names that a piece of source imports from vLLM, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vllm"}


def undeclared_imports(contract: Contract) -> list[str]:
    """Names that our files import from vLLM without an entry in their group, a line each."""
    lines = []
    for folder in ("vllm_hybrid", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT / "vllm_hybrid" if folder == "vllm_hybrid" else ROOT).as_posix()
            for name in sorted(vllm_imports(path.read_text())):
                if not any(f"{entry}.".startswith(f"{name}.") for entry in contract.get(file, {})):
                    lines.append(f"{name}: {file} imports it, and the contract has no entry")
    return lines


def check(contract: Contract) -> list[str]:
    """All that is to be said about a contract and the installed vLLM, a line each."""
    from vllm_hybrid.startup.versions import installed_vllm

    installed = installed_vllm()
    if installed is None:
        return ["vllm: is not installed"]
    lines = [*undeclared_imports(contract), *all_changes(contract, installed[1])]
    modules, failures = our_modules(contract)
    return [
        *lines,
        *failures,
        *undeclared_overrides(contract, all_overrides(modules)),
        *missing_methods(modules),
    ]


def main() -> int:
    """Print the lines; 1 where there are any."""
    lines = check(read_contract())
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
