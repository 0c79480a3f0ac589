"""Levels: what a picture may cost, and the names by which a request says which.

A level is a whole setting: how far an image's tokens are merged, and which share of the rest is dropped.
OpenAI's ``detail`` of a picture, or ``hybrid_level`` of a request, names one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_hybrid.errors import abbreviated

# The level at which nothing is merged and nothing dropped; it always exists.
FULL = "full"
# What a section's only setting is called where it names none.
UNNAMED = "default"
# The ``detail`` that leaves the choice to the server.
AUTO = "auto"
# OpenAI's others: fewest tokens, more of them, the picture as it is.
LOW, HIGH, ORIGINAL = "low", "high", "original"
# The extra argument of a request that names the level of all its pictures, in ``vllm_xargs``.
REQUEST_LEVEL = "hybrid_level"
# A level's number travels in bfloat16, which holds whole numbers exactly up to 256.
MOST_LEVELS = 256
LEVEL_KEYS = ("thresholds", "fastv_ratio")
_NAME = re.compile(r"[A-Za-z0-9._-]+")

Thresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class Level:
    """One setting.

    Attributes:
        name: what a request calls it.
        thresholds: one merge threshold per executed vision layer, None where nothing merges; None when
            merging is off.
        fastv_ratio: R, the share of an image's live tokens to drop; 0 drops none.

    """

    name: str
    thresholds: Thresholds | None = None
    fastv_ratio: float = 0.0

    @property
    def merges(self) -> bool:
        """Whether any layer has a finite threshold."""
        return any(t is not None for t in self.thresholds or ())

    @property
    def prunes(self) -> bool:
        """Whether FastV drops tokens."""
        return self.fastv_ratio > 0


@dataclass(frozen=True)
class Levels:
    """The levels of a model.

    Attributes:
        all: every level, :data:`FULL` among them; a level's *number* is its place here.
        default: the level of pictures for which nothing was asked.
        details: pairs of a ``detail`` and the name of the level it means, every level's own name among them.

    """

    all: tuple[Level, ...] = (Level(FULL),)
    default: Level = all[0]
    details: tuple[tuple[str, str], ...] = ((FULL, FULL),)

    def __iter__(self) -> Iterator[Level]:
        return iter(self.all)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all levels, in the order of their numbers."""
        return tuple(level.name for level in self.all)

    def named(self, name: str) -> Level:
        """The level of a name.

        Raises:
            KeyError: there is none.

        """
        return self.all[self.number(name)]

    def number(self, name: str) -> int:
        """The number of the level of a name.

        Raises:
            KeyError: there is none.

        """
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(name) from None

    def asked(self, name: object, parameter: str) -> Level:
        """The level that a request names.

        Args:
            name: what the request says.
            parameter: where it says so, for the sentence.

        Raises:
            ValueError: there is no such level; the sentence lists all.

        """
        if not isinstance(name, str) or name not in self.names:
            raise ValueError(
                f"{parameter} is {shortened(name)}, which is no level; use {_listed(self.names)}"
            )
        return self.named(name)

    def of_detail(self, detail: object, parameter: str = "detail") -> Level:
        """The level that OpenAI's ``detail`` of a picture means; None and "auto" leave it to the server.

        Args:
            detail: what the picture's part of a message says.
            parameter: where it says so, for the sentence.

        Raises:
            ValueError: it means no level; the sentence lists what may be said.

        """
        if detail is None or detail == AUTO:
            return self.default
        for said, name in self.details:
            if said == detail:
                return self.named(name)
        known = _listed([AUTO, *(said for said, _ in self.details)])
        raise ValueError(f"{parameter} is {shortened(detail)}, which means no level; use {known}")


def parse_levels(section: Mapping[str, Any], layers: int) -> Levels:
    """The levels of a ``hybrid`` section.

    Args:
        section: with ``levels``, or else with ``thresholds`` (one list, or named ones) and ``fastv_ratio``;
            ``default_level``, ``level`` and ``detail`` go with either.
        layers: executed layers of the vision tower.

    Raises:
        ValueError: a value is wrong; one sentence says which and why.

    """
    where, levels = _named_levels(section, layers)
    own = [level.name for level in levels if level.name != FULL]
    if FULL not in (level.name for level in levels):
        levels.append(Level(FULL))
    for level in levels:
        _check_name(level, where)
    if len(levels) > MOST_LEVELS:
        raise ValueError(f"{where} has {len(levels)} levels with {FULL}; give at most {MOST_LEVELS}")
    names = [level.name for level in levels]
    choices = {key: section[key] for key in ("default_level", "level") if section.get(key) is not None}
    if len(own) > 1 and "default_level" not in choices:
        raise ValueError(f"hybrid.default_level is missing; set it to one of the levels {', '.join(names)}")
    for key, name in choices.items():
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"hybrid.{key} is {name!r}, which is no level; use {_listed(names)}")
    default = choices.get("level", choices.get("default_level", own[0] if own else FULL))
    details = _parse_details(section.get("detail"), names, own)
    return Levels(tuple(levels), levels[names.index(default)], details)


def _named_levels(section: Mapping[str, Any], layers: int) -> tuple[str, list[Level]]:
    """Where a section gives its levels, and all that it gives; a mistake in any shows at once."""
    levels, thresholds = section.get("levels"), section.get("thresholds")
    if levels is not None:
        return "hybrid.levels", _whole_settings(section, layers)
    ratio = _parse_ratio(section.get("fastv_ratio", 0), "hybrid.fastv_ratio")
    if not isinstance(thresholds, dict):
        only = Level(UNNAMED, _parse_thresholds(thresholds, "hybrid.thresholds", layers), ratio)
        return "hybrid", [only] if only.merges or only.prunes else []
    if not thresholds:
        raise ValueError("hybrid.thresholds is an empty object; give named levels, one list, or null")
    return "hybrid.thresholds", [
        Level(name, _parse_thresholds(value, f"hybrid.thresholds.{name}", layers), ratio)
        for name, value in thresholds.items()
    ]


def _whole_settings(section: Mapping[str, Any], layers: int) -> list[Level]:
    """The levels of ``hybrid.levels``."""
    levels = section["levels"]
    for key in LEVEL_KEYS:
        if section.get(key) is not None:
            raise ValueError(
                f"hybrid.{key} stands beside hybrid.levels, where each level has its own; give hybrid.levels "
                f"or hybrid.{key}"
            )
    if not isinstance(levels, dict) or not levels:
        raise ValueError(
            f"hybrid.levels is {shortened(levels)}; give an object of named levels, each with "
            f"{' and '.join(LEVEL_KEYS)}"
        )
    return [_whole_setting(name, value, layers) for name, value in levels.items()]


def _whole_setting(name: str, value: Any, layers: int) -> Level:
    where = f"hybrid.levels.{name}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shortened(value)}; give an object with {' and '.join(LEVEL_KEYS)}")
    for key in value:
        if key not in LEVEL_KEYS:
            raise ValueError(f"{where}.{key} is not a known key; use {_listed(LEVEL_KEYS)}")
    ratio = value.get("fastv_ratio")
    return Level(
        name,
        _parse_thresholds(value.get("thresholds"), f"{where}.thresholds", layers),
        0.0 if ratio is None else _parse_ratio(ratio, f"{where}.fastv_ratio"),
    )


def _check_name(level: Level, where: str) -> None:
    if not isinstance(level.name, str) or not _NAME.fullmatch(level.name):
        raise ValueError(
            f"{where} has a level {level.name!r}; name levels with letters, digits, '.', '-' and '_'"
        )
    if level.name == AUTO:
        raise ValueError(f"{where} has a level {AUTO}, but that detail means the default level; rename it")
    if level.name == FULL and (level.merges or level.prunes):
        raise ValueError(
            f"{where}.{FULL} merges or drops tokens, but {FULL} is the level at which none are; rename yours"
        )


def _parse_details(value: Any, names: list[str], own: list[str]) -> tuple[tuple[str, str], ...]:
    """What each ``detail`` means: what the section says, and otherwise the level of that name.

    The picture as it is, is the full level. Where a section names no levels there is one budget for all.
    """
    meanings = {ORIGINAL: FULL}
    if own in ([UNNAMED], []):
        meanings |= dict.fromkeys((LOW, HIGH), own[0] if own else FULL)
    meanings |= {name: name for name in names}
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f'hybrid.detail is {shortened(value)}; give an object such as {{"low": "{names[0]}"}}'
        )
    for detail, name in (value or {}).items():
        if detail == AUTO:
            raise ValueError(f"hybrid.detail.{AUTO} always means the default level; set hybrid.default_level")
        if not isinstance(name, str) or name not in names:
            raise ValueError(
                f"hybrid.detail.{detail} is {shortened(name)}, which is no level; use {_listed(names)}"
            )
        meanings[detail] = name
    return tuple(meanings.items())


def _parse_thresholds(value: Any, name: str, layers: int) -> Thresholds | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; give a list of {layers} numbers, or null for no merging")
    if len(value) != layers:
        raise ValueError(
            f"{name} has {len(value)} entries, but the vision tower executes {layers} layers; "
            "give one entry per layer"
        )
    return tuple(_parse_threshold(t, f"{name}[{i}]") for i, t in enumerate(value))


def _parse_threshold(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}; give a number, or null for no merging in that layer")
    return None if value == math.inf else float(value)


def _parse_ratio(value: Any, name: str) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; give a number from 0 up to but not including 1")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether value is a number that a float can hold; JSON's true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _listed(names: Any) -> str:
    """Names as a sentence offers them."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def shortened(value: Any) -> str:
    """A value as a sentence shows it: it may come from a request, and be long or deep."""
    try:
        return abbreviated(repr(value))
    except RecursionError:
        return type(value).__name__
