"""The ``hybrid`` section of a checkpoint's configuration: what is switched on and how far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_hybrid.levels import FULL, UNNAMED, Levels, parse_levels

KNOWN_KEYS = (
    "levels",
    "thresholds",
    "default_level",
    "level",
    "detail",
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


@dataclass(frozen=True)
class HybridConfig:
    """A validated ``hybrid`` section.

    Attributes:
        levels: what a picture may cost, and which names mean what; see :class:`Levels`.
        fastv_layer: K, the decoder layer before which image tokens are dropped.
        fastv_rank: which position ranks an image's tokens, PROMPT_END or TURN_END.
        assistant_header: token ids that begin an assistant's turn; empty where the section has none.

    """

    levels: Levels = Levels()
    fastv_layer: int = DEFAULT_FASTV_LAYER
    fastv_rank: str = DEFAULT_FASTV_RANK
    assistant_header: tuple[int, ...] = ()

    @property
    def merges(self) -> bool:
        """Whether any level merges tokens."""
        return any(level.merges for level in self.levels)

    @property
    def prunes(self) -> bool:
        """Whether FastV drops tokens at any level."""
        return any(level.prunes for level in self.levels)

    @property
    def ranking_header(self) -> tuple[int, ...]:
        """Token ids of the header whose last position ranks; empty where the prompt's end does."""
        return self.assistant_header if self.prunes and self.fastv_rank == TURN_END else ()

    @property
    def active(self) -> bool:
        """Whether anything is reduced at any level."""
        return self.merges or self.prunes

    def in_words(self) -> str:
        """What is served: the levels and the default one, or the only setting."""
        levels, after = self.levels, f" after layer {self.fastv_layer}"
        if set(levels.names) <= {UNNAMED, FULL}:
            merging = "on" if levels.default.merges else "off"
            pruning = f"{levels.default.fastv_ratio:g}{after}" if self.prunes else "off"
            return f"merging {merging}, FastV {pruning}"
        settings = []
        for level in levels:
            parts = ["merging"] * level.merges + [f"FastV {level.fastv_ratio:g}"] * level.prunes
            settings.append(f"{level.name} ({', '.join(parts) or 'all tokens'})")
        return f"levels {', '.join(settings)}; default {levels.default.name}{f'; FastV{after}' * self.prunes}"

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
        levels = parse_levels(section, vision_layers)
        prunes = any(level.prunes for level in levels)
        layer = section.get("fastv_layer", DEFAULT_FASTV_LAYER)
        if prunes or "fastv_layer" in section:
            layer = _parse_layer(layer, decoder_layers)
        rank = _parse_rank(section.get("fastv_rank", DEFAULT_FASTV_RANK))
        header = _parse_header(section.get("assistant_header"))
        if prunes and rank == TURN_END and not header:
            raise ValueError(
                f"hybrid.fastv_rank is {rank!r}, but hybrid.assistant_header is missing; give its token ids, "
                f"which `vllm-hybrid prepare` finds, or set hybrid.fastv_rank to {PROMPT_END!r}"
            )
        return cls(levels, layer, rank, header)


def check_keys(keys: Iterable[object]) -> None:
    """Refuse a key that no section has.

    Raises:
        ValueError: the first one.

    """
    for key in keys:
        if key not in KNOWN_KEYS:
            raise ValueError(f"hybrid.{key} is not a known key; use one of {', '.join(KNOWN_KEYS)}")


def _parse_layer(value: Any, layers: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < layers:
        range_ = f"give a whole number from 1 to {layers - 1}"
        advice = range_ if layers > 1 else "leave fastv_layer and fastv_ratio out"
        raise ValueError(f"hybrid.fastv_layer is {value!r}, but the decoder has {layers} layers; {advice}")
    return value


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
