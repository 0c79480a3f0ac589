"""What an override makes of a section: keys change, null takes one away, and what changed is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vllm_hybrid.config import KNOWN_KEYS
from vllm_hybrid.startup.overrides import differences, merged

LEVELS = {"low": [0.7, 0.7, 0.7], "high": [0.9, None, 0.9]}
STORED: dict[str, Any] = {
    "thresholds": LEVELS,
    "default_level": "high",
    "fastv_layer": 3,
    "fastv_ratio": 0.5,
}
VALUES = [0.8, 0.85, 0.9]


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ({"fastv_ratio": 0}, STORED | {"fastv_ratio": 0}),
        ({"level": "low"}, STORED | {"level": "low"}),
        ({"fastv_layer": None}, {key: value for key, value in STORED.items() if key != "fastv_layer"}),
        ({"level": None}, STORED),
        ({}, STORED),
        # Names of levels go with the levels.
        ({"thresholds": None}, {"fastv_layer": 3, "fastv_ratio": 0.5}),
        ({"thresholds": VALUES}, {"thresholds": VALUES, "fastv_layer": 3, "fastv_ratio": 0.5}),
        ({"thresholds": {"high": VALUES}}, STORED | {"thresholds": {"high": VALUES}}),
        (
            {"thresholds": None, "level": "low"},
            {"fastv_layer": 3, "fastv_ratio": 0.5, "level": "low"},
        ),
        (dict.fromkeys(KNOWN_KEYS), {}),
        (dict.fromkeys(KNOWN_KEYS) | {"fastv_ratio": 0.25}, {"fastv_ratio": 0.25}),
        (None, None),
        # What is no section is left for validation to refuse.
        ([0.9], [0.9]),
    ],
)
def test_merged(override: Any, section: Any) -> None:
    stored, given = copy.deepcopy(STORED), copy.deepcopy(override)
    assert merged(stored, given) == section
    # A second time gives the same, and neither is changed.
    assert merged(stored, given) == section
    assert (stored, given) == (STORED, override)


@pytest.mark.parametrize("stored", [None, {}])
def test_merged_with_nothing(stored: Any) -> None:
    assert merged(stored, STORED) == STORED
    assert merged(stored, {"fastv_ratio": None}) == {}
    assert merged(stored, None) is None


def test_a_whole_section_takes_its_own_place() -> None:
    assert merged(STORED, STORED | {"level": "low"}) == STORED | {"level": "low"}


@pytest.mark.parametrize("value", [None, 0.5])
def test_an_unknown_key_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="hybrid.ratio is not a known key; use one of thresholds, "):
        merged(STORED, {"ratio": value})
    # Unless the checkpoint has it, from a later release.
    assert merged(STORED | {"later": 1}, {"later": None}) == STORED


def test_a_stored_section_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"hybrid in config\.json is \[0\.9\]; make it an object"):
        merged([0.9], {"fastv_ratio": 0})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (STORED, []),
        (STORED | {"fastv_ratio": 0}, ["fastv_ratio: 0.5 -> 0"]),
        (STORED | {"level": "low"}, ["level: unset -> low"]),
        (
            {"thresholds": VALUES, "fastv_layer": 3},
            [
                "thresholds: levels low, high -> 3 values, 0.8 to 0.9",
                "default_level: high -> unset",
                "fastv_ratio: 0.5 -> unset",
            ],
        ),
        (STORED | {"thresholds": LEVELS | {"low": VALUES}}, ["thresholds: levels low, high -> others"]),
        (None, ["hybrid: thresholds, default_level, fastv_layer, fastv_ratio -> null"]),
    ],
)
def test_differences(section: Any, said: list[str]) -> None:
    assert differences(STORED, section) == said


@pytest.mark.parametrize("stored", [None, {}])
def test_differences_from_nothing(stored: Any) -> None:
    assert differences(stored, None) == []
    assert differences(stored, {"thresholds": [None, None]}) == ["thresholds: unset -> 2 values"]
