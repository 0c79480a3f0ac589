"""What an override makes of a section: keys change, null takes one away, and what changed is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vllm_hybrid.config import KNOWN_KEYS
from vllm_hybrid.levels import parse_levels
from vllm_hybrid.startup.overrides import differences, merged

LEVELS = {"low": [0.7, 0.7, 0.7], "high": [0.9, None, 0.9]}
STORED: dict[str, Any] = {
    "thresholds": LEVELS,
    "default_level": "high",
    "fastv_layer": 3,
    "fastv_ratio": 0.5,
}
VALUES = [0.8, 0.85, 0.9]
LOW = {"thresholds": [0.7, 0.7, 0.7], "fastv_ratio": 0.75}
HIGH = {"thresholds": [0.9, None, 0.9]}
SETTINGS: dict[str, Any] = {
    "levels": {"low": LOW, "high": HIGH},
    "default_level": "high",
    "detail": {"high": "full"},
    "fastv_layer": 3,
}


def without(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def with_levels(**levels: Any) -> dict[str, Any]:
    return SETTINGS | {"levels": levels}


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ({"fastv_ratio": 0}, STORED | {"fastv_ratio": 0}),
        ({"level": "low"}, STORED | {"level": "low"}),
        ({"fastv_layer": None}, without(STORED, "fastv_layer")),
        ({"level": None}, STORED),
        ({}, STORED),
        ({"levels": None}, STORED),
        ({"detail": {"low": "high"}}, STORED | {"detail": {"low": "high"}}),
        # Names of levels go with the levels.
        ({"thresholds": None}, {"fastv_layer": 3, "fastv_ratio": 0.5}),
        ({"thresholds": VALUES}, {"thresholds": VALUES, "fastv_layer": 3, "fastv_ratio": 0.5}),
        ({"thresholds": {"high": VALUES}}, STORED | {"thresholds": {"high": VALUES}}),
        (
            {"thresholds": None, "level": "low"},
            {"fastv_layer": 3, "fastv_ratio": 0.5, "level": "low"},
        ),
        # Whole settings take the place of one for all, with the names of what they replace.
        ({"levels": {"low": LOW}}, {"fastv_layer": 3, "levels": {"low": LOW}}),
        (
            {"levels": {"low": LOW, "high": HIGH}, "default_level": "low", "fastv_layer": None},
            {"levels": {"low": LOW, "high": HIGH}, "default_level": "low"},
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


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ({"level": "low"}, SETTINGS | {"level": "low"}),
        ({"detail": {"low": "high"}}, SETTINGS | {"detail": {"low": "high"}}),
        ({"detail": None}, without(SETTINGS, "detail")),
        ({"fastv_layer": 1}, SETTINGS | {"fastv_layer": 1}),
        ({"levels": {}}, SETTINGS),
        # Level by level, and key by key in each.
        ({"levels": {"low": {"fastv_ratio": 0}}}, with_levels(low=LOW | {"fastv_ratio": 0}, high=HIGH)),
        ({"levels": {"low": {"fastv_ratio": None}}}, with_levels(low=without(LOW, "fastv_ratio"), high=HIGH)),
        (
            {"levels": {"low": {"thresholds": VALUES}, "high": {"fastv_ratio": 0.5}}},
            with_levels(low=LOW | {"thresholds": VALUES}, high=HIGH | {"fastv_ratio": 0.5}),
        ),
        (
            {"levels": {"mid": {"fastv_ratio": 0.1}}},
            with_levels(low=LOW, high=HIGH, mid={"fastv_ratio": 0.1}),
        ),
        ({"levels": {"low": None}}, with_levels(high=HIGH)),
        ({"levels": {"mid": None}}, SETTINGS),
        (
            {"levels": {"high": None}, "default_level": "low"},
            SETTINGS | {"levels": {"low": LOW}, "default_level": "low"},
        ),
        # One setting for all takes the place of whole ones, whose names go with them.
        ({"levels": None}, {"fastv_layer": 3}),
        ({"levels": None, "fastv_ratio": 0.5}, {"fastv_layer": 3, "fastv_ratio": 0.5}),
        (
            {"levels": None, "thresholds": LEVELS, "default_level": "low"},
            {"fastv_layer": 3, "thresholds": LEVELS, "default_level": "low"},
        ),
        (dict.fromkeys(KNOWN_KEYS), {}),
        (None, None),
    ],
)
def test_merged_with_levels(override: Any, section: Any) -> None:
    stored, given = copy.deepcopy(SETTINGS), copy.deepcopy(override)
    assert merged(stored, given) == section
    assert merged(stored, given) == section
    assert (stored, given) == (SETTINGS, override)


def test_levels_stay_in_their_order() -> None:
    section = merged(SETTINGS, {"levels": {"mid": {"fastv_ratio": 0.1}, "low": {"fastv_ratio": 0}}})
    assert list(section["levels"]) == ["low", "high", "mid"]


@pytest.mark.parametrize("override", [{"levels": {"low": LOW}}, {"levels": None}, {"level": "low"}])
def test_a_key_that_is_stored_without_a_value_is_not_there(override: Any) -> None:
    stored = STORED | {"levels": None}
    assert without(merged(stored, override), "levels") == without(merged(STORED, override), "levels")


@pytest.mark.parametrize("key", ["thresholds", "fastv_ratio"])
@pytest.mark.parametrize("value", [None, 0.5, LEVELS])
def test_what_each_level_has_is_not_overridden_for_all(key: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"hybrid\.{key} is overridden, but .* override hybrid\.levels\.NAME"
    ):
        merged(SETTINGS, {key: value, "level": "low"})


def test_what_is_no_level_is_left_for_validation_to_refuse() -> None:
    for value in ([0.9], "low", {"low": [0.7] * 3}):
        with pytest.raises(ValueError, match="hybrid.levels"):
            parse_levels(merged(SETTINGS, {"levels": value}), 3)
        with pytest.raises(ValueError, match="hybrid.levels"):
            parse_levels(merged(STORED, {"levels": value}), 3)


@pytest.mark.parametrize("stored", [STORED, SETTINGS], ids=["thresholds", "levels"])
def test_both_forms_in_one_override_are_left_for_validation_to_refuse(stored: Any) -> None:
    section = merged(stored, {"levels": {"low": LOW}, "fastv_ratio": 0.5})
    with pytest.raises(ValueError, match="hybrid.fastv_ratio stands beside hybrid.levels"):
        parse_levels(section, 3)


def test_a_level_that_an_override_takes_away_leaves_no_name_behind_unnoticed() -> None:
    with pytest.raises(
        ValueError, match="hybrid.default_level is 'high', which is no level; use low or full"
    ):
        parse_levels(merged(SETTINGS, {"levels": {"high": None}}), 3)


@pytest.mark.parametrize("stored", [None, {}])
def test_merged_with_nothing(stored: Any) -> None:
    assert merged(stored, STORED) == STORED
    assert merged(stored, SETTINGS) == SETTINGS
    assert merged(stored, {"fastv_ratio": None}) == {}
    assert merged(stored, None) is None


def test_a_whole_section_takes_its_own_place() -> None:
    assert merged(STORED, STORED | {"level": "low"}) == STORED | {"level": "low"}
    assert merged(SETTINGS, SETTINGS | {"level": "low"}) == SETTINGS | {"level": "low"}
    assert merged(STORED, SETTINGS) == SETTINGS


@pytest.mark.parametrize("value", [None, 0.5])
def test_an_unknown_key_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="hybrid.ratio is not a known key; use one of levels, thresholds, "):
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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"levels": {"low": {"fastv_ratio": 0.5}}}, ["levels: levels low, high -> others"]),
        ({"levels": {"mid": LOW}}, ["levels: levels low, high -> levels low, high, mid"]),
        ({"level": "full"}, ["level: unset -> full"]),
        ({"detail": {"low": "high"}}, ["detail: high is full -> low is high"]),
        ({"detail": {"low": "high", "high": "full"}}, ["detail: high is full -> low is high, high is full"]),
        ({"detail": None}, ["detail: high is full -> unset"]),
        (
            {"levels": None, "fastv_ratio": 0.5},
            [
                "levels: levels low, high -> unset",
                "default_level: high -> unset",
                "detail: high is full -> unset",
                "fastv_ratio: unset -> 0.5",
            ],
        ),
    ],
)
def test_differences_of_levels(override: Any, said: list[str]) -> None:
    assert differences(SETTINGS, merged(SETTINGS, override)) == said


@pytest.mark.parametrize("stored", [None, {}])
def test_differences_from_nothing(stored: Any) -> None:
    assert differences(stored, None) == []
    assert differences(stored, {"thresholds": [None, None]}) == ["thresholds: unset -> 2 values"]
