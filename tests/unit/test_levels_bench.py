"""The levels benchmark's requests, ratios and tables; no engine is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_process import EngineProcess, Served
from benchmarks.levels import (
    COMPARED,
    FULL_ONLY,
    LEVEL_FULL,
    LEVEL_LOW,
    LEVELS,
    LOW_ONLY,
    ONLY_FULL,
    ONLY_LOW,
    STEPS,
    TOGETHER,
    Step,
    compare,
    cost,
    costs_table,
    kv_bytes_of_stock,
    seeds_of,
    servers_table,
    take_times,
    with_levels,
    write_report,
)
from vllm_hybrid.config import HybridConfig

# ---- what is asked --------------------------------------------------------------------------------


def test_one_setting_becomes_a_level() -> None:
    section = {"thresholds": [0.5, 0.6], "fastv_ratio": 0.5, "fastv_layer": 3}
    config = HybridConfig.parse(with_levels(section), vision_layers=2, decoder_layers=8)
    alone = HybridConfig.parse(section, vision_layers=2, decoder_layers=8)
    assert config.levels.names == ("low", "full") and config.fastv_layer == alone.fastv_layer == 3
    low, own = config.levels.named("low"), alone.levels.default
    assert (low.thresholds, low.fastv_ratio) == (own.thresholds, own.fastv_ratio)


def test_requests_of_both_levels_take_turns_with_the_same_pictures() -> None:
    assert TOGETHER.asks([7, 8]) == [(7, "full"), (7, "low"), (8, "full"), (8, "low")]
    assert ONLY_FULL.asks([7, 8]) == [(7, None), (8, None)]
    assert {step.engine for step in STEPS} == {LEVELS, FULL_ONLY, LOW_ONLY}
    # A comparison asks the same on both of its sides.
    for step, others in COMPARED.values():
        assert len(step.levels) == sum(len(other.levels) for other in others)
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_repeats_have_new_pictures_and_go_there_and_back() -> None:
    asked: list[tuple[Step, tuple[int, ...]]] = []

    def seconds(step: Step, seeds: Sequence[int]) -> float:
        asked.append((step, tuple(seeds)))
        return float(len(asked))

    times = take_times([LEVEL_FULL, ONLY_FULL], seconds, 2, 3, first=10)
    assert [step for step, _ in asked] == [
        LEVEL_FULL,
        ONLY_FULL,
        ONLY_FULL,
        LEVEL_FULL,
        LEVEL_FULL,
        ONLY_FULL,
    ]
    assert [seeds for _, seeds in asked[::2]] == [(30, 31, 32), (33, 34, 35), (36, 37, 38)]
    assert asked[0][1] == asked[1][1] == tuple(seeds_of(10, 3))
    # The first repeat warms up.
    assert times == {LEVEL_FULL: [4.0, 5.0], ONLY_FULL: [3.0, 6.0]}


# ---- figures --------------------------------------------------------------------------------------

TIMES = {
    TOGETHER: [5.0, 6.0, 6.3],
    ONLY_FULL: [4.0, 4.0, 5.0],
    LEVEL_FULL: [4.0, 4.4, 4.0],
    ONLY_LOW: [1.0, 1.0, 1.0],
    LEVEL_LOW: [1.0, 0.5, 2.0],
}


def test_ratios_are_of_single_repeats() -> None:
    found = compare(TIMES)
    assert found["full and low together"]["ratios"] == pytest.approx([1.0, 1.2, 1.05])
    medians = [found["full and low together"][key] for key in ("seconds", "seconds_beside", "ratio")]
    assert medians == pytest.approx([6.0, 5.0, 1.05])
    assert found["full"]["ratios"] == pytest.approx([1.0, 1.1, 0.8]) and found["full"]["ratio"] == 1.0
    assert found["low"]["ratios"] == [1.0, 0.5, 2.0]


def test_stock_s_blocks_are_taken_as_small_as_ours() -> None:
    config = {"text_config": {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 64}}
    assert kv_bytes_of_stock(config, 16) == 16 * 2 * 8 * 256 * 2
    assert kv_bytes_of_stock(config, 17) == 2 * kv_bytes_of_stock(config, 16)


def test_speed_of_a_level_is_over_the_full_one_s_and_stock_s_in_the_same_repeats() -> None:
    found = cost([1.0, 2.0, 4.0], [2.0, 2.0, 8.0], [4.0, 4.0, 4.0], 8)
    assert found == {
        "requests_per_s": 4.0,
        "over_full": 2.0,
        "over_stock": 2.0,
        "all_requests_per_s": [8.0, 4.0, 2.0],
    }


# ---- report ---------------------------------------------------------------------------------------


def _costs() -> dict[str, Any]:
    about = {"live": 94.4, "kept": 47.0, "kv_bytes": 1.25e6}
    low = about | cost([1.0], [2.5], [2.0], 8)
    return {"requests": 8, "kv_bytes_of_stock": 5_000_000, "levels": {"low": low}}


def test_tables() -> None:
    lines = servers_table({"most": 1.03, "loads": {"prefill": {"compared": compare(TIMES)}}}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| prefill | full and low together | 6.00 | 5.00 | 1.050 | 1.000 to 1.200 | <= 1.03 |",
        "| prefill | full | 4.00 | 4.00 | 1.000 | 0.800 to 1.100 | <= 1.03 |",
        "| prefill | low | 1.00 | 1.00 | 1.000 | 0.500 to 2.000 |  |",
    ]
    lines = costs_table(_costs()).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "less than stock's 5.00 MB" in lines[0]
    assert lines[2:] == ["| low | 94 | 47 | 1.25 | 4.00x | 8.00 | 2.50x | 2.00x |"]


def test_each_part_has_files_of_its_own_with_its_circumstances(tmp_path: Path) -> None:
    text = write_report("costs", _costs(), tmp_path)
    report = json.loads((tmp_path / "levels-costs.json").read_text())
    assert report["levels"] == _costs()["levels"]
    assert {"command", "date", "machine", "versions"} < report.keys()
    page = (tmp_path / "levels-costs.md").read_text()
    assert page.endswith(f"`:\n\n{text}\n") and report["command"] in page


def test_an_engine_that_fails_ends_and_says_where_to_look(tmp_path: Path) -> None:
    missing = Served(tmp_path / "missing", {})
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match=f"the engine ended; see {log}"), EngineProcess(missing, log):
        pytest.fail("it is not up")
