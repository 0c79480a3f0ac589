"""Levels: the forms in which a section gives them, what is refused, and what a request's words mean."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

import pytest

from vllm_hybrid.levels import MOST_LEVELS, Level, Levels, parse_levels

LAYERS = 3
LOW: dict[str, Any] = {"thresholds": [0.7, 0.7, None], "fastv_ratio": 0.75}
HIGH: dict[str, Any] = {"thresholds": [0.9, None, math.inf], "fastv_ratio": 0.25}
LEVELS: dict[str, Any] = {"low": LOW, "high": HIGH}
BOTH: dict[str, Any] = {"levels": LEVELS, "default_level": "high"}
NAMED: dict[str, Any] = {"low": [0.7, 0.7, 0.7], "high": [0.9, None, 0.9]}


def parse(section: dict[str, Any]) -> Levels:
    return parse_levels(section, LAYERS)


def settings(levels: Levels) -> dict[str, tuple[Any, float]]:
    return {level.name: (level.thresholds, level.fastv_ratio) for level in levels}


# ---- forms ----------------------------------------------------------------------------------------


def test_whole_settings() -> None:
    levels = parse(BOTH)
    assert settings(levels) == {
        "low": ((0.7, 0.7, None), 0.75),
        "high": ((0.9, None, None), 0.25),
        "full": (None, 0.0),
    }
    assert levels.default.name == "high"


@pytest.mark.parametrize("setting", [{}, {"thresholds": None}, {"fastv_ratio": None}, {"fastv_ratio": 0}])
def test_what_a_level_leaves_out_is_off(setting: dict[str, Any]) -> None:
    level = parse({"levels": {"all": setting}}).named("all")
    assert (level.thresholds, level.fastv_ratio) == (None, 0.0)
    assert not level.merges and not level.prunes


def test_one_list_is_a_level_named_default() -> None:
    levels = parse({"thresholds": [0.9, None, 0.9], "fastv_ratio": 0.5})
    assert settings(levels) == {"default": ((0.9, None, 0.9), 0.5), "full": (None, 0.0)}
    assert levels.default.name == "default"


@pytest.mark.parametrize("section", [{"thresholds": [0.9] * 3}, {"fastv_ratio": 0.5}])
def test_merging_or_pruning_alone_is_a_level_too(section: dict[str, Any]) -> None:
    assert parse(section).names == ("default", "full")


def test_named_lists_share_their_ratio() -> None:
    levels = parse({"thresholds": NAMED, "default_level": "low", "fastv_ratio": 0.5})
    assert settings(levels) == {
        "low": ((0.7, 0.7, 0.7), 0.5),
        "high": ((0.9, None, 0.9), 0.5),
        "full": (None, 0.0),
    }
    assert levels.default.name == "low"


@pytest.mark.parametrize(
    "section", [{}, {"levels": None}, {"thresholds": [None] * 3}, {"fastv_ratio": 0}, {"thresholds": None}]
)
def test_a_section_that_reduces_nothing_has_the_full_level_alone(section: dict[str, Any]) -> None:
    for levels in (parse(section), Levels()):
        assert list(levels) == [Level("full")] and levels.default == Level("full")


@pytest.mark.parametrize("full", [{}, {"thresholds": [None] * 3, "fastv_ratio": 0}])
def test_the_full_level_may_be_given_as_it_is(full: dict[str, Any]) -> None:
    levels = parse({"levels": {"full": full, "low": LOW}})
    assert levels.names == ("full", "low")
    assert not levels.named("full").merges and not levels.named("full").prunes
    # It is not one to choose from, so that the other needs no default_level.
    assert levels.default.name == "low"


def test_levels_without_a_value_stand_beside_the_other_form() -> None:
    assert parse({"levels": None, "thresholds": [0.9] * 3}).names == ("default", "full")
    assert parse({"levels": {"low": LOW}, "thresholds": None, "fastv_ratio": None}).names == ("low", "full")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"default_level": "low"}, "low"),
        ({"default_level": "full"}, "full"),
        ({"default_level": "high", "level": "low"}, "low"),
        ({"default_level": "high", "level": "full"}, "full"),
        ({"default_level": "high", "level": None}, "high"),
    ],
)
@pytest.mark.parametrize("form", [{"levels": LEVELS}, {"thresholds": NAMED}], ids=["levels", "thresholds"])
def test_the_default_may_be_any_level(form: dict[str, Any], keys: dict[str, Any], name: str) -> None:
    assert parse(form | keys).default.name == name


@pytest.mark.parametrize("name", ["default", "full"])
def test_the_default_of_a_single_setting_may_be_named(name: str) -> None:
    assert parse({"fastv_ratio": 0.5, "level": name}).default.name == name


def test_a_number_is_a_level_s_place(draw: random.Random) -> None:
    names = [f"level-{number}" for number in range(draw.randrange(1, MOST_LEVELS))]
    draw.shuffle(names)
    levels = parse({"levels": {name: LOW for name in names}, "default_level": names[0]})
    assert levels.names == (*names, "full")
    for number, level in enumerate(levels):
        assert levels.number(level.name) == number and levels.all[number] is levels.named(level.name)
    with pytest.raises(KeyError):
        levels.number("level")


def test_levels_compare_and_hash() -> None:
    again = json.loads(json.dumps(BOTH))
    assert parse(BOTH) == parse(again) and hash(parse(BOTH)) == hash(parse(again))
    assert len({parse(BOTH), parse(BOTH | {"level": "low"}), Levels()}) == 3


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"levels": []}, ["hybrid.levels is []", "thresholds and fastv_ratio"]),
        ({"levels": {}}, ["hybrid.levels is {}", "give an object of named levels"]),
        ({"levels": "low"}, ["hybrid.levels is 'low'"]),
        ({"levels": {"low": [0.7] * 3}}, ["hybrid.levels.low is [0.7, 0.7, 0.7]", "give an object"]),
        ({"levels": {"low": None}}, ["hybrid.levels.low is None"]),
        ({"levels": {"low": {"ratio": 0.5}}}, ["hybrid.levels.low.ratio", "use thresholds or fastv_ratio"]),
        ({"levels": {"low": {"fastv_layer": 2}}}, ["hybrid.levels.low.fastv_layer is not a known key"]),
        ({"levels": {"low": {"thresholds": [0.9]}}}, ["hybrid.levels.low.thresholds has 1 entries"]),
        ({"levels": {"low": {"thresholds": 0.9}}}, ["hybrid.levels.low.thresholds is 0.9"]),
        ({"levels": {"low": {"thresholds": [0, "x", 0]}}}, ["hybrid.levels.low.thresholds[1] is 'x'"]),
        ({"levels": {"low": {"fastv_ratio": 1}}}, ["hybrid.levels.low.fastv_ratio is 1"]),
        ({"levels": {"low": {"fastv_ratio": True}}}, ["hybrid.levels.low.fastv_ratio is True"]),
        # A level that is not in use.
        (BOTH | {"levels": LEVELS | {"low": {"fastv_ratio": -1}}}, ["hybrid.levels.low.fastv_ratio is -1"]),
        (BOTH | {"thresholds": [0.9] * 3}, ["hybrid.thresholds stands beside hybrid.levels"]),
        (BOTH | {"thresholds": NAMED}, ["hybrid.thresholds stands beside hybrid.levels"]),
        (BOTH | {"fastv_ratio": 0.5}, ["hybrid.fastv_ratio stands beside hybrid.levels"]),
        (BOTH | {"fastv_ratio": 0}, ["hybrid.fastv_ratio stands beside hybrid.levels"]),
        ({"levels": {"full": LOW}}, ["hybrid.levels.full merges or drops tokens", "rename"]),
        ({"levels": {"full": {"fastv_ratio": 0.1}}}, ["hybrid.levels.full merges or drops tokens"]),
        ({"levels": {"full": {"thresholds": [None, 1, None]}}}, ["hybrid.levels.full merges or drops"]),
        ({"thresholds": {"full": [0.9] * 3}}, ["hybrid.thresholds.full merges or drops tokens"]),
        # One ratio for all named levels is one for this one too.
        (
            {"thresholds": {"low": [0.9] * 3, "full": None}, "fastv_ratio": 0.5},
            ["hybrid.thresholds.full merges or drops tokens"],
        ),
        ({"levels": {"auto": LOW}}, ["hybrid.levels has a level auto", "rename"]),
        ({"thresholds": {"auto": [0.9] * 3}}, ["hybrid.thresholds has a level auto"]),
        ({"levels": {"": LOW}}, ["hybrid.levels has a level ''", "letters"]),
        ({"levels": {"a level": LOW}}, ["hybrid.levels has a level 'a level'"]),
        ({"levels": {"cat@low": LOW}}, ["hybrid.levels has a level 'cat@low'"]),
        ({"levels": {"a:b": LOW}}, ["hybrid.levels has a level 'a:b'"]),
        ({"levels": {"low\n": LOW}}, ["hybrid.levels has a level 'low\\n'"]),
        ({"levels": {3: LOW}}, ["hybrid.levels has a level 3"]),
        ({"levels": LEVELS}, ["hybrid.default_level is missing", "low, high, full"]),
        ({"levels": LEVELS, "level": "low"}, ["hybrid.default_level is missing"]),
        (BOTH | {"default_level": "mid"}, ["hybrid.default_level is 'mid'", "use low, high or full"]),
        (BOTH | {"level": "auto"}, ["hybrid.level is 'auto'", "use low, high or full"]),
        (BOTH | {"level": 0}, ["hybrid.level is 0"]),
        ({"fastv_ratio": 0.5, "level": "low"}, ["hybrid.level is 'low'", "use default or full"]),
        (BOTH | {"detail": []}, ["hybrid.detail is []", '{"low": "low"}']),
        (BOTH | {"detail": "low"}, ["hybrid.detail is 'low'"]),
        (BOTH | {"detail": {"auto": "low"}}, ["hybrid.detail.auto", "hybrid.default_level"]),
        (BOTH | {"detail": {"low": "mid"}}, ["hybrid.detail.low is 'mid'", "use low, high or full"]),
        (BOTH | {"detail": {"low": None}}, ["hybrid.detail.low is None"]),
        (BOTH | {"detail": {"low": ["low"]}}, ["hybrid.detail.low is ['low']"]),
    ],
)
def test_refusals_name_key_and_value(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".") as refusal:
        parse(section)
    message = str(refusal.value)
    assert "\n" not in message and re.search(r"; (give|use|set|name|rename)", message)
    for word in words:
        assert word in message


def test_there_are_no_more_levels_than_numbers() -> None:
    levels = {f"level-{number}": LOW for number in range(MOST_LEVELS)}
    section = {"levels": levels, "default_level": "level-0"}
    with pytest.raises(ValueError, match=f"hybrid.levels has {MOST_LEVELS + 1} levels with full; give at"):
        parse(section)
    del levels["level-7"]
    assert len(parse(section).all) == MOST_LEVELS


def test_long_values_are_cut_short() -> None:
    with pytest.raises(ValueError, match="hybrid.levels is ") as refusal:
        parse({"levels": ["many words"] * 1000})
    assert len(str(refusal.value)) < 200


# ---- details --------------------------------------------------------------------------------------


def meant(levels: Levels, *details: object) -> list[str]:
    return [levels.of_detail(detail).name for detail in details]


def test_auto_and_nothing_mean_the_default() -> None:
    for section, name in (
        (BOTH, "high"),
        (BOTH | {"level": "full"}, "full"),
        ({"fastv_ratio": 0.5}, "default"),
    ):
        assert meant(parse(section), None, "auto") == [name, name]


def test_a_level_s_name_and_original_are_details() -> None:
    levels = parse({"levels": {"small": LOW, "large": HIGH}, "default_level": "large"})
    assert meant(levels, "small", "large", "full", "original") == ["small", "large", "full", "full"]


@pytest.mark.parametrize(
    "section", [{"fastv_ratio": 0.5}, {"thresholds": [0.9] * 3}, {"fastv_ratio": 0.5, "level": "full"}]
)
def test_where_no_level_is_named_low_and_high_mean_the_only_one(section: dict[str, Any]) -> None:
    assert meant(parse(section), "low", "high", "original") == ["default", "default", "full"]


def test_where_nothing_is_reduced_every_detail_means_the_full_level() -> None:
    assert meant(Levels(), None, "auto", "full") == ["full"] * 3
    assert meant(parse({}), "low", "high", "original", "full") == ["full"] * 4


def test_a_section_says_what_details_mean() -> None:
    details = {"low": "small", "high": "full", "original": "large", "thumbnail": "small"}
    levels = {"small": LOW, "large": HIGH}
    parsed = parse({"levels": levels, "default_level": "large", "detail": details})
    assert meant(parsed, *details) == list(details.values())
    assert meant(parsed, "small", "large", "full", "auto") == ["small", "large", "full", "large"]


def test_named_lists_have_details_too() -> None:
    section = {"thresholds": {"small": NAMED["low"]}, "detail": {"low": "small", "high": "full"}}
    assert meant(parse(section), "low", "high", "auto") == ["small", "full", "small"]


@pytest.mark.parametrize("detail", ["mid", "LOW", "", 3, ["low"], {"low": 1}, True, math.nan])
def test_what_means_no_level_is_refused_with_all_that_do(detail: object) -> None:
    levels = parse(BOTH | {"detail": {"thumbnail": "low"}})
    with pytest.raises(ValueError, match="detail is .*, which means no level; use ") as refusal:
        levels.of_detail(detail)
    message = str(refusal.value)
    assert message.startswith(f"detail is {detail!r}, ")
    offered = re.split(", | or ", message.rpartition("use ")[2])
    assert sorted(offered) == sorted(["auto", "low", "high", "full", "original", "thumbnail"])
    for said in offered:
        levels.of_detail(said)


def test_where_a_detail_was_given_may_be_said() -> None:
    with pytest.raises(ValueError, match=r"^messages\[0\] is 'mid'"):
        parse(BOTH).of_detail("mid", "messages[0]")


def test_low_and_high_mean_nothing_where_levels_have_other_names() -> None:
    levels = parse({"levels": {"small": LOW}})
    for detail in ("low", "high"):
        with pytest.raises(ValueError, match="; use auto, original, small or full"):
            levels.of_detail(detail)


# ---- names ----------------------------------------------------------------------------------------


def test_a_request_names_any_level() -> None:
    levels = parse(BOTH)
    assert [levels.asked(name, "hybrid_level") for name in levels.names] == list(levels)


@pytest.mark.parametrize("name", ["mid", "auto", "original", "", 0, None, ["low"]])
def test_an_unknown_name_is_refused_with_all_levels(name: object) -> None:
    with pytest.raises(ValueError, match="which is no level") as refusal:
        parse(BOTH).asked(name, "hybrid_level")
    assert str(refusal.value) == f"hybrid_level is {name!r}, which is no level; use low, high or full"


def test_a_long_name_is_cut_short_and_stays_one_line() -> None:
    with pytest.raises(ValueError, match="which is no level") as refusal:
        parse(BOTH).asked("low\n" * 10**5, "hybrid_level")
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)
