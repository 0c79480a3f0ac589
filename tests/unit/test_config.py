"""The ``hybrid`` section: what is accepted, what is refused and with which words."""

import json
import math
import random
import re
from fractions import Fraction

import pytest

from vllm_hybrid.config import DEFAULT_FASTV_RANK, KNOWN_KEYS, HybridConfig
from vllm_hybrid.method.fastv import live_to_kept

VISION_LAYERS, DECODER_LAYERS = 3, 8
LEVELS: dict[str, list[float | None]] = {"low": [0.7, 0.7, 0.7], "high": [0.9, None, 0.9]}


def parse(section: object, decoder_layers: int = DECODER_LAYERS) -> HybridConfig:
    return HybridConfig.parse(section, vision_layers=VISION_LAYERS, decoder_layers=decoder_layers)


@pytest.mark.parametrize(
    "section",
    [
        None,
        {},
        {"thresholds": None},
        {"thresholds": [None, None, None]},
        {"thresholds": [math.inf] * 3, "fastv_ratio": 0},
        {"thresholds": None, "fastv_layer": 1, "fastv_ratio": 0.0},
        {"thresholds": {"off": None}},
        {"levels": {"off": {}}},
        {"levels": {"off": {"thresholds": [None] * 3, "fastv_ratio": 0}}, "fastv_layer": 1},
    ],
)
def test_off(section: object) -> None:
    config = parse(section)
    assert not config.merges and not config.prunes and not config.active


def test_merging() -> None:
    config = parse({"thresholds": [0.9, None, math.inf]})
    assert config.levels.default.thresholds == (0.9, None, None)
    assert config.merges and not config.prunes and config.active


def test_pruning() -> None:
    config = parse({"fastv_layer": 7, "fastv_ratio": 0.5})
    assert config.fastv_layer == 7
    assert (config.levels.default.fastv_ratio, config.levels.default.thresholds) == (0.5, None)
    assert not config.merges and config.prunes and config.active


@pytest.mark.parametrize("level", ["merging", "pruning", "full"])
def test_a_model_does_what_any_of_its_levels_does(level: str) -> None:
    """Whichever is the default: a request may choose another."""
    levels = {"merging": {"thresholds": [0.9] * 3}, "pruning": {"fastv_ratio": 0.5}}
    config = parse({"levels": levels, "default_level": level})
    assert config.merges and config.prunes and config.active
    merging = parse({"levels": {"merging": levels["merging"]}, "level": "full"})
    assert merging.merges and not merging.prunes and merging.active
    pruning = parse({"levels": {"pruning": levels["pruning"]}, "level": "full"})
    assert not pruning.merges and pruning.prunes and pruning.active


def test_defaults() -> None:
    assert parse({"fastv_ratio": 0.5}).fastv_layer == 2


def test_thresholds_outside_the_cosines() -> None:
    """Below -1 everything merges, above 1 nothing does; both are thresholds."""
    config = parse({"thresholds": [-2, 1.5, -math.inf]})
    assert config.levels.default.thresholds == (-2.0, 1.5, -math.inf)


def test_ranking() -> None:
    assert (parse(None).fastv_rank, parse(None).assistant_header) == (DEFAULT_FASTV_RANK, ())
    by_end = {"fastv_ratio": 0.5, "fastv_rank": "prompt_end", "assistant_header": [319, 0]}
    config = parse(by_end)
    assert (config.fastv_rank, config.assistant_header) == ("prompt_end", (319, 0))
    assert config.ranking_header == ()
    config = parse(by_end | {"fastv_rank": "turn_end"})
    assert config.fastv_rank == "turn_end" and config.ranking_header == (319, 0)


def test_ranks_that_nothing_is_ranked_by_need_no_header() -> None:
    for section in ({"fastv_rank": "turn_end"}, {"fastv_rank": "turn_end", "fastv_ratio": 0}):
        assert not parse(section).active and parse(section).ranking_header == ()
    assert parse({"fastv_ratio": 0.5, "fastv_rank": "prompt_end", "assistant_header": None}).prunes


def test_as_read_from_json() -> None:
    text = '{"thresholds": [0.93, null, 1], "fastv_layer": 2, "fastv_ratio": 0.9}'
    assert parse(json.loads(text)).levels.default.thresholds == (0.93, None, 1.0)


def test_levels_that_prune_need_what_pruning_needs() -> None:
    """Also where the default level does not."""
    levels = {"levels": {"low": {"fastv_ratio": 0.5}}, "level": "full"}
    assert parse(levels).fastv_layer == 2
    with pytest.raises(ValueError, match="fastv_layer is 2, but the decoder has 2 layers"):
        parse(levels, decoder_layers=2)
    by_turn = levels | {"fastv_rank": "turn_end"}
    with pytest.raises(ValueError, match="hybrid.assistant_header is missing"):
        parse(by_turn)
    assert parse(by_turn | {"assistant_header": [319]}).ranking_header == (319,)


def test_configurations_compare_and_hash() -> None:
    section = {"thresholds": LEVELS, "default_level": "low", "fastv_ratio": 0.25}
    assert parse(section) == parse(json.loads(json.dumps(section)))
    assert len({parse(section), parse(section), parse(None)}) == 2


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ([], ["hybrid", "[]", "null"]),
        ("dymu", ["hybrid", "'dymu'"]),
        (True, ["hybrid", "True"]),
        ({"threshold": [0.9] * 3}, ["hybrid.threshold ", *KNOWN_KEYS]),
        ({"thresholds": 0.9}, ["hybrid.thresholds is 0.9", "3 numbers"]),
        ({"thresholds": "0.9"}, ["hybrid.thresholds is '0.9'"]),
        ({"thresholds": [0.9] * 2}, ["hybrid.thresholds has 2 entries", "3 layers"]),
        ({"thresholds": []}, ["hybrid.thresholds has 0 entries"]),
        ({"thresholds": [0.9, "Infinity", 0.9]}, ["hybrid.thresholds[1] is 'Infinity'", "null"]),
        ({"thresholds": [0.9, 0.9, math.nan]}, ["hybrid.thresholds[2] is nan"]),
        ({"thresholds": [True, 0.9, 0.9]}, ["hybrid.thresholds[0] is True"]),
        ({"thresholds": [0.9, [0.9], 0.9]}, ["hybrid.thresholds[1] is [0.9]"]),
        ({"thresholds": [10**400, 0.9, 0.9]}, ["hybrid.thresholds[0] is 1000"]),
        ({"thresholds": {}}, ["hybrid.thresholds is an empty object"]),
        ({"thresholds": LEVELS}, ["hybrid.default_level is missing", "low, high"]),
        ({"thresholds": LEVELS, "level": "low"}, ["hybrid.default_level is missing"]),
        (
            {"thresholds": LEVELS, "default_level": "mid"},
            ["hybrid.default_level is 'mid'", "low, high or full"],
        ),
        ({"thresholds": LEVELS, "default_level": 0}, ["hybrid.default_level is 0"]),
        ({"thresholds": LEVELS, "default_level": ["low"]}, ["hybrid.default_level is ['low']"]),
        ({"thresholds": LEVELS, "default_level": "low", "level": "mid"}, ["hybrid.level is 'mid'"]),
        ({"thresholds": LEVELS, "default_level": "mid", "level": "low"}, ["hybrid.default_level is 'mid'"]),
        (
            {"thresholds": [0.9] * 3, "default_level": "low"},
            ["hybrid.default_level is 'low'", "use default or full"],
        ),
        ({"level": "low"}, ["hybrid.level is 'low'", "which is no level; use full"]),
        (
            {"thresholds": {"low": [0.9] * 3, "high": [0.9]}, "default_level": "low"},
            ["hybrid.thresholds.high has 1 entries"],
        ),
        ({"thresholds": {"low": [0.9, None, "x"]}}, ["hybrid.thresholds.low[2] is 'x'"]),
        ({"thresholds": {"low": {"a": 1}}}, ["hybrid.thresholds.low is {'a': 1}"]),
        ({"levels": {"low": [0.9] * 3}}, ["hybrid.levels.low is [0.9"]),
        ({"levels": {"low": {}}, "fastv_ratio": 0.5}, ["hybrid.fastv_ratio stands beside hybrid.levels"]),
        ({"detail": {"low": "mid"}}, ["hybrid.detail.low is 'mid'"]),
        ({"fastv_layer": 0}, ["hybrid.fastv_layer is 0", "8 layers", "1 to 7"]),
        ({"fastv_layer": 8}, ["hybrid.fastv_layer is 8", "1 to 7"]),
        ({"fastv_layer": -1}, ["hybrid.fastv_layer is -1"]),
        ({"fastv_layer": True}, ["hybrid.fastv_layer is True"]),
        ({"fastv_layer": 2.0}, ["hybrid.fastv_layer is 2.0"]),
        ({"fastv_layer": "2"}, ["hybrid.fastv_layer is '2'"]),
        ({"fastv_layer": None}, ["hybrid.fastv_layer is None"]),
        ({"fastv_ratio": 1}, ["hybrid.fastv_ratio is 1", "not including 1"]),
        ({"fastv_ratio": -0.1}, ["hybrid.fastv_ratio is -0.1"]),
        ({"fastv_ratio": math.nan}, ["hybrid.fastv_ratio is nan"]),
        ({"fastv_ratio": "0.5"}, ["hybrid.fastv_ratio is '0.5'"]),
        ({"fastv_ratio": False}, ["hybrid.fastv_ratio is False"]),
        ({"fastv_ratio": None}, ["hybrid.fastv_ratio is None"]),
        ({"fastv_ratio": 10**400}, ["hybrid.fastv_ratio is 1000"]),
        ({"fastv_rank": "turn"}, ["hybrid.fastv_rank is 'turn'", "prompt_end, turn_end"]),
        ({"fastv_rank": None}, ["hybrid.fastv_rank is None"]),
        ({"fastv_rank": ["turn_end"]}, ["hybrid.fastv_rank is ['turn_end']"]),
        ({"assistant_header": []}, ["hybrid.assistant_header is []", "null"]),
        ({"assistant_header": "ASSISTANT:"}, ["hybrid.assistant_header is 'ASSISTANT:'"]),
        ({"assistant_header": 319}, ["hybrid.assistant_header is 319"]),
        ({"assistant_header": [319, True]}, ["hybrid.assistant_header[1] is True"]),
        ({"assistant_header": [-1]}, ["hybrid.assistant_header[0] is -1"]),
        ({"assistant_header": [319.0]}, ["hybrid.assistant_header[0] is 319.0"]),
        ({"assistant_header": [319, None]}, ["hybrid.assistant_header[1] is None"]),
        (
            {"fastv_ratio": 0.5, "fastv_rank": "turn_end"},
            ["hybrid.fastv_rank is 'turn_end'", "hybrid.assistant_header", "prepare", "'prompt_end'"],
        ),
        (
            {"fastv_ratio": 0.5, "fastv_rank": "turn_end", "assistant_header": None},
            ["hybrid.assistant_header is missing"],
        ),
    ],
)
def test_refusals_name_key_and_value(section: object, words: list[str]) -> None:
    with pytest.raises(ValueError, match=".") as refusal:
        parse(section)
    message = str(refusal.value)
    assert "\n" not in message and re.search(r"; (give|use|set|remove|leave)", message)
    for word in words:
        assert word in message


def test_pruning_needs_a_layer_below_and_above() -> None:
    with pytest.raises(ValueError, match="fastv_layer is 2, but the decoder has 2 layers; give .* 1 to 1"):
        parse({"fastv_ratio": 0.5}, decoder_layers=2)
    with pytest.raises(ValueError, match="leave fastv_layer and fastv_ratio out"):
        parse({"fastv_ratio": 0.5}, decoder_layers=1)


def test_an_unused_default_layer_is_not_checked() -> None:
    assert parse({"thresholds": [0.9] * 3}, decoder_layers=2).merges


@pytest.mark.parametrize(
    ("live", "ratio", "kept"),
    [(10, 0.9, 1), (10, 0.7, 3), (576, 0.5, 288), (577, 0.5, 289), (1, 0.5, 1), (3, 0.999, 1), (90, 0.0, 90)],
)
def test_kept_by_hand(live: int, ratio: float, kept: int) -> None:
    assert live_to_kept(live, ratio) == kept


def test_kept_is_exact_for_decimals(draw: random.Random) -> None:
    """Integers only: with R = d / 1000, the smallest k with 1000 k >= (1000 - d) n."""
    for _ in range(3000):
        live, thousandths = draw.randrange(1, 577), draw.randrange(1000)
        kept = next(k for k in range(1, 578) if 1000 * k >= (1000 - thousandths) * live)
        assert live_to_kept(live, thousandths / 1000) == kept, (live, thousandths)


def test_kept_of_no_short_decimal() -> None:
    ratio = 1 / 3
    assert live_to_kept(3, ratio) == math.ceil((1 - Fraction(repr(ratio))) * 3) == 3
