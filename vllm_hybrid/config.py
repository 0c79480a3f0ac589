"""The ``hybrid`` section of a checkpoint's configuration: what is switched on and how far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

KNOWN_KEYS = (
    "thresholds",
    "default_level",
    "level",
    "fastv_layer",
    "fastv_ratio",
    "fastv_rank",
    "assistant_header",
)
DEFAULT_FASTV_LAYER = 2

# What may rank an image's tokens: the prompt's last position, or the last one of the first assistant header
# behind the image.
PROMPT_END, TURN_END = "prompt_end", "turn_end"
FASTV_RANKS = (PROMPT_END, TURN_END)
DEFAULT_FASTV_RANK = PROMPT_END

Thresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class HybridConfig:
    """A validated ``hybrid`` section.

    Attributes:
        thresholds: one merge threshold per executed vision layer, None where nothing merges; None when
            merging is off.
        fastv_layer: K, the decoder layer before which image tokens are dropped.
        fastv_ratio: R, the share of an image's live tokens to drop; 0 drops none.
        level: name of the threshold level in use, where the section has named levels.
        levels: all named levels of the section, in its order.
        fastv_rank: which position ranks an image's tokens, PROMPT_END or TURN_END.
        assistant_header: token ids that begin an assistant's turn; empty where the section has none.

    """

    thresholds: Thresholds | None = None
    fastv_layer: int = DEFAULT_FASTV_LAYER
    fastv_ratio: float = 0.0
    level: str | None = None
    levels: tuple[str, ...] = ()
    fastv_rank: str = DEFAULT_FASTV_RANK
    assistant_header: tuple[int, ...] = ()

    @property
    def merges(self) -> bool:
        """Whether any layer has a finite threshold."""
        return any(t is not None for t in self.thresholds or ())

    @property
    def prunes(self) -> bool:
        """Whether FastV drops tokens."""
        return self.fastv_ratio > 0

    @property
    def ranking_header(self) -> tuple[int, ...]:
        """Token ids of the header whose last position ranks; empty where the prompt's end does."""
        return self.assistant_header if self.prunes and self.fastv_rank == TURN_END else ()

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
            The configuration. A ``fastv_layer`` that is left out is not checked while nothing is pruned.

        Raises:
            ValueError: a key is unknown or a value is wrong; one sentence says which and why.

        """
        if section is None:
            return cls()
        if not isinstance(section, dict):
            known = ", ".join(KNOWN_KEYS)
            raise ValueError(f"hybrid is {section!r}; give an object with keys from {known}, or null")
        check_keys(section)
        thresholds, level, levels = _parse_levels(section, vision_layers)
        ratio = _parse_ratio(section.get("fastv_ratio", 0))
        layer = section.get("fastv_layer", DEFAULT_FASTV_LAYER)
        if ratio > 0 or "fastv_layer" in section:
            layer = _parse_layer(layer, decoder_layers)
        rank = _parse_rank(section.get("fastv_rank", DEFAULT_FASTV_RANK))
        header = _parse_header(section.get("assistant_header"))
        if ratio > 0 and rank == TURN_END and not header:
            raise ValueError(
                f"hybrid.fastv_rank is {rank!r}, but hybrid.assistant_header is missing; give its token ids, "
                f"which `vllm-hybrid prepare` finds, or set hybrid.fastv_rank to {PROMPT_END!r}"
            )
        return cls(thresholds, layer, ratio, level, levels, rank, header)


def check_keys(keys: Iterable[object]) -> None:
    """Refuse a key that no section has.

    Raises:
        ValueError: the first one.

    """
    for key in keys:
        if key not in KNOWN_KEYS:
            raise ValueError(f"hybrid.{key} is not a known key; use one of {', '.join(KNOWN_KEYS)}")


def _parse_levels(
    section: dict[str, Any], layers: int
) -> tuple[Thresholds | None, str | None, tuple[str, ...]]:
    """The thresholds in use, the name of their level and the names of all levels."""
    value = section.get("thresholds")
    choices = {key: section[key] for key in ("default_level", "level") if section.get(key) is not None}
    if not isinstance(value, dict):
        for key, name in choices.items():
            raise ValueError(f"hybrid.{key} is {name!r}, but hybrid.thresholds has no levels; remove it")
        return _parse_thresholds(value, "hybrid.thresholds", layers), None, ()
    names = ", ".join(map(str, value))
    if not value:
        raise ValueError("hybrid.thresholds is an empty object; give named levels, one list, or null")
    if len(value) > 1 and "default_level" not in choices:
        raise ValueError(f"hybrid.default_level is missing; set it to one of the levels {names}")
    for key, name in choices.items():
        if not isinstance(name, str) or name not in value:
            raise ValueError(f"hybrid.{key} is {name!r}, which is no level of hybrid.thresholds; use {names}")
    # All levels are read, so that a mistake in one that is not in use shows at once.
    parsed = {name: _parse_thresholds(v, f"hybrid.thresholds.{name}", layers) for name, v in value.items()}
    level = choices.get("level", choices.get("default_level", next(iter(value))))
    return parsed[level], level, tuple(parsed)


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


def _parse_layer(value: Any, layers: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < layers:
        range_ = f"give a whole number from 1 to {layers - 1}"
        advice = range_ if layers > 1 else "leave fastv_layer and fastv_ratio out"
        raise ValueError(f"hybrid.fastv_layer is {value!r}, but the decoder has {layers} layers; {advice}")
    return value


def _parse_ratio(value: Any) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"hybrid.fastv_ratio is {value!r}; give a number from 0 up to but not including 1")
    return float(value)


def _parse_rank(value: Any) -> str:
    if value not in FASTV_RANKS:
        raise ValueError(f"hybrid.fastv_rank is {value!r}; use one of {', '.join(FASTV_RANKS)}")
    return str(value)


def _parse_header(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"hybrid.assistant_header is {value!r}; give a list of token ids, or null")
    for i, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(
                f"hybrid.assistant_header[{i}] is {token!r}; give a token id, a whole number from 0 up"
            )
    return tuple(value)


def _is_number(value: Any) -> bool:
    """Whether value is a number that a float can hold; JSON's true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
