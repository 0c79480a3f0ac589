"""The ``hybrid`` section of a checkpoint's configuration: what is switched on and how far."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

KNOWN_KEYS = ("thresholds", "default_level", "level", "fastv_layer", "fastv_ratio")
DEFAULT_FASTV_LAYER = 2


@dataclass(frozen=True)
class HybridConfig:
    """A validated ``hybrid`` section.

    Attributes:
        thresholds: one merge threshold per executed vision layer, None where nothing merges; None when
            merging is off.
        fastv_layer: K, the decoder layer before which image tokens are dropped.
        fastv_ratio: R, the share of an image's live tokens to drop; 0 drops none.
        level: name of the threshold level in use, where the section has named levels.

    """

    thresholds: tuple[float | None, ...] | None = None
    fastv_layer: int = DEFAULT_FASTV_LAYER
    fastv_ratio: float = 0.0
    level: str | None = None

    @property
    def merges(self) -> bool:
        """Whether any layer has a finite threshold."""
        return any(t is not None for t in self.thresholds or ())

    @property
    def prunes(self) -> bool:
        """Whether FastV drops tokens."""
        return self.fastv_ratio > 0

    @property
    def active(self) -> bool:
        """Whether anything is reduced at all."""
        return self.merges or self.prunes

    @classmethod
    def parse(cls, section: object, *, vision_layers: int, decoder_layers: int) -> HybridConfig:
        """Validate a section.

        Args:
            section: the value of ``hybrid``; None switches everything off.
            vision_layers: executed layers of the vision tower.
            decoder_layers: layers of the language model.

        Returns:
            The configuration.

        Raises:
            ValueError: a key is unknown or a value is wrong; one sentence says which and why.

        """
        if section is None:
            return cls()
        if not isinstance(section, dict):
            raise ValueError(f"hybrid must be an object or null, not {section!r}; see the configuration table")
        for key in section:
            if key not in KNOWN_KEYS:
                raise ValueError(f"hybrid.{key} is not a known key; use one of {', '.join(KNOWN_KEYS)}")
        thresholds, level = _pick_level(section)
        return cls(
            thresholds=_parse_thresholds(thresholds, level, vision_layers),
            fastv_layer=_parse_layer(section.get("fastv_layer", DEFAULT_FASTV_LAYER), decoder_layers),
            fastv_ratio=_parse_ratio(section.get("fastv_ratio", 0)),
            level=level,
        )


def _pick_level(section: dict[str, Any]) -> tuple[Any, str | None]:
    thresholds = section.get("thresholds")
    wanted = section.get("level") or section.get("default_level")
    if not isinstance(thresholds, dict):
        if wanted is not None:
            raise ValueError(
                f"hybrid.level or default_level is {wanted!r}, but hybrid.thresholds has no named levels; remove it"
            )
        return thresholds, None
    if not thresholds:
        raise ValueError("hybrid.thresholds is an empty object; give levels or null")
    if wanted is None:
        if len(thresholds) > 1:
            raise ValueError(
                f"hybrid.default_level is missing; set it to one of {', '.join(map(str, thresholds))}"
            )
        wanted = next(iter(thresholds))
    if wanted not in thresholds:
        raise ValueError(
            f"hybrid level {wanted!r} is not among hybrid.thresholds' {', '.join(map(str, thresholds))}; pick one"
        )
    return thresholds[wanted], wanted


def _parse_thresholds(value: Any, level: str | None, layers: int) -> tuple[float | None, ...] | None:
    name = "hybrid.thresholds" + (f".{level}" if level else "")
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of {layers} numbers, levels of such lists, or null, not {value!r}")
    if len(value) != layers:
        raise ValueError(
            f"{name} has {len(value)} entries, but the vision tower executes {layers} layers; give one per layer"
        )
    return tuple(_parse_threshold(t, f"{name}[{i}]") for i, t in enumerate(value))


def _parse_threshold(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name} is {value!r}; give a number, or null for no merging in that layer")
    return None if value == math.inf else float(value)


def _parse_layer(value: Any, layers: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < layers:
        raise ValueError(
            f"hybrid.fastv_layer is {value!r}; give a whole number from 1 to {layers - 1}, inside the "
            f"{layers} decoder layers"
        )
    return value


def _parse_ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"hybrid.fastv_ratio is {value!r}; give a number from 0 up to but not including 1")
    return float(value)


@functools.lru_cache(maxsize=1 << 16)
def live_to_kept(live: int, ratio: float) -> int:
    """Image tokens FastV keeps of ``live``: ceil((1 - ratio) * live), at least 1 (FastV, section 4.1).

    The ratio counts as the decimal it was written as, so that 0.9 of 10 leaves 1, not 2.
    """
    return max(1, math.ceil((1 - Fraction(repr(ratio))) * live))
