"""Levels as the options of a command give them: a number for all of them, or one for each name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vllm_hybrid.levels import FULL

# What stands in the place of a name where none was given; the setting is then the only one.
NAMELESS = ""

Number = TypeVar("Number", int, float)
# A level's setting, by the keys that ``hybrid.levels`` has.
Setting = dict[str, Any]


def parse_tokens(texts: Sequence[str]) -> int | dict[str, int] | None:
    """Numbers of live tokens as a user wrote them.

    Args:
        texts: one NUMBER, or several NAME=NUMBER.

    Returns:
        The number, or numbers by name in the order written; None where nothing was.

    Raises:
        ValueError: something else was written; one sentence says what.

    """
    return _parse(texts, _whole_number, "number of tokens", "195")


def parse_ratios(texts: Sequence[str]) -> float | dict[str, float] | None:
    """Shares of live tokens to drop as a user wrote them; whether they are shares is not looked at.

    Args:
        texts: one RATIO, or several NAME=RATIO.

    Returns:
        The ratio, or ratios by name in the order written; None where nothing was.

    Raises:
        ValueError: something else was written; one sentence says what.

    """
    return _parse(texts, float, "ratio", "0.5")


def _parse(
    texts: Sequence[str], number: Callable[[str], Number], kind: str, example: str
) -> Number | dict[str, Number] | None:
    found: dict[str, Number] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        name = name.strip()
        try:
            if equals and not name:
                raise ValueError
            parsed = number(value)
        except ValueError:
            raise ValueError(f"{text!r} is no {kind}; write {example}, or mid={example}") from None
        if name in found or (len(texts) > 1 and not name):
            raise ValueError(f"{text!r} needs a name of its own among several levels; write mid={example}")
        found[name] = parsed
    return found.get(NAMELESS, found or None)


def _whole_number(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError
    return int(text)


def settings_of(section: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings of a part of a ``hybrid`` section, by the name of their level.

    Args:
        section: with ``levels``, an object of objects; or with ``thresholds``, one list or named ones, and
            ``fastv_ratio``, which is then every level's; or with neither.

    Returns:
        One setting a level; under NAMELESS the only one where no level has a name.

    """
    if section.get("levels") is not None:
        return {name: dict(setting) for name, setting in section["levels"].items()}
    for_all = {key: section[key] for key in ("thresholds", "fastv_ratio") if key in section}
    thresholds = section.get("thresholds")
    if isinstance(thresholds, Mapping):
        return {name: for_all | {"thresholds": values} for name, values in thresholds.items()}
    return {NAMELESS: for_all}


def with_options(given: Mapping[str, Setting], options: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings with what options say put into them.

    Args:
        given: settings by level, such as a file's. Where they have no name, every level starts with them.
        options: by the key of a setting what an option says: a value for all levels but the full one, values
            by name, or None where it was not given. A name that ``given`` lacks is a further level.

    Returns:
        New settings by level, under NAMELESS alone where neither has a name.

    Raises:
        ValueError: an option is for all levels, and the full one is the only one.

    """
    for_all = given.get(NAMELESS, {})
    levels = {name: dict(setting) for name, setting in given.items() if name != NAMELESS}
    for values in options.values():
        for name in values if isinstance(values, Mapping) else ():
            levels.setdefault(name, {} if name == FULL else dict(for_all))
    levels = levels or {NAMELESS: dict(for_all)}
    for key, values in options.items():
        if values is None:
            continue
        if not isinstance(values, Mapping):
            values = {name: values for name in levels if name != FULL}
        if not values:
            raise ValueError(
                f"there is no level but {FULL}, at which nothing is merged or dropped; name another"
            )
        for name, value in values.items():
            levels[name][key] = value
    return levels


def section_of(levels: Mapping[str, Setting], default: str | None = None) -> dict[str, Any]:
    """The part of a ``hybrid`` section that has these settings: whole levels where they have names.

    Args:
        levels: settings by level.
        default: name of the default level; left out: the first.

    """
    if list(levels) == [NAMELESS]:
        chosen = {} if default is None else {"default_level": default}
        return {"thresholds": None} | levels[NAMELESS] | chosen
    first = next(iter(levels))
    named = {name: dict(setting) for name, setting in levels.items()}
    return {"levels": named, "default_level": first if default is None else default}
