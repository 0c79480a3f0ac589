"""The settings that are compared, and the `hybrid` section of a server that offers all of them as levels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_hybrid.config import KNOWN_KEYS
from vllm_hybrid.levels import FULL

MERGED, PRUNED, OWN = "merged", "pruned", "level"


@dataclass(frozen=True)
class Setting:
    """How much is reduced.

    Attributes:
        family: what is done; a line of the plot.
        name: how far.
        thresholds: of merging; None merges nothing.
        ratio: R of FastV; 0 drops nothing.

    """

    family: str
    name: str
    thresholds: tuple[float | None, ...] | None = None
    ratio: float = 0.0

    @property
    def level(self) -> str:
        """What the server calls it."""
        if self.family == FULL:
            return FULL
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.family} {self.name}")


def compared(
    stored: Mapping[str, Any],
    levels: Sequence[str],
    ratios: Sequence[float],
    both_ratios: Sequence[float],
) -> list[Setting]:
    """All settings, the full model first.

    Args:
        stored: the checkpoint's `hybrid` section.
        levels: those of its levels whose thresholds merge. As they are, with ratios of their own, they come
            last, where they are not among the others.
        ratios: R of pruning alone.
        both_ratios: R of pruning after merging.

    """
    thresholds = merging(stored, levels)
    found = [
        Setting(FULL, "all patches"),
        *(Setting(MERGED, level, values) for level, values in thresholds.items()),
        *(Setting(PRUNED, f"R = {ratio:g}", None, ratio) for ratio in ratios),
        *(
            Setting(f"both, R = {ratio:g}", level, values, ratio)
            for ratio in both_ratios
            for level, values in thresholds.items()
        ),
    ]
    known = {(setting.thresholds, setting.ratio) for setting in found}
    own = [
        Setting(OWN, level, thresholds.get(level), stored["levels"][level].get("fastv_ratio") or 0.0)
        for level in levels
    ]
    return found + [setting for setting in own if (setting.thresholds, setting.ratio) not in known]


def merging(stored: Mapping[str, Any], levels: Sequence[str]) -> dict[str, tuple[float | None, ...]]:
    """The thresholds of those of a section's levels that have any."""
    found = {level: stored["levels"][level].get("thresholds") for level in levels}
    return {level: tuple(values) for level, values in found.items() if values is not None}


def offering(
    settings: Sequence[Setting], stored: Mapping[str, Any], ranking: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The override of a checkpoint's `hybrid` section that offers settings, and nothing else, as levels.

    Args:
        settings: what to offer; the full level always is.
        stored: the checkpoint's section; its K is kept.
        ranking: keys that say what ranks an image's tokens; None for the library's defaults.

    """
    own = {
        setting.level: {"thresholds": setting.thresholds, "fastv_ratio": setting.ratio}
        for setting in settings
        if setting.family != FULL
    }
    # An override changes the keys and levels that it names, so the checkpoint's own are taken away by name.
    section = {
        "levels": dict.fromkeys(stored["levels"]) | own,
        "default_level": FULL,
        "fastv_layer": stored["fastv_layer"],
    }
    return dict.fromkeys(KNOWN_KEYS) | section | dict(ranking or {})
