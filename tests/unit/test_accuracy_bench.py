"""The accuracy benchmark's settings, counting, random dropping and table, beside servers that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from benchmarks.accuracy import run, served
from benchmarks.accuracy.cases import FULL, OFFLINE, SERVER, Case, Setup
from benchmarks.accuracy.offline import Shown, at_random, fewer_after_the_choice, reading_order
from benchmarks.accuracy.questions import CUT, Asked, counts, difference, held_out, shares
from benchmarks.accuracy.report import insert, plot, result, summary, table, tokens_per_layer
from benchmarks.accuracy.settings import Setting, compared, offering
from benchmarks.vllm_server import reduced
from tools.demo_training.prompts import Prompts
from vllm_hybrid.config import KNOWN_KEYS, HybridConfig
from vllm_hybrid.method.token_merging import LiveTokens
from vllm_hybrid.startup.overrides import merged
from vllm_hybrid.tools.journal import Journal


def _asked(picture: int, task: str, answer: str) -> Asked:
    return Asked(picture, task, f"{task}?", answer, (1,), (2,), 3)


ASKED = [
    _asked(0, "colour", "red"),
    _asked(0, "count", "two"),
    _asked(1, "colour", "blue"),
    _asked(1, "glyph", "A"),
]
RIGHT = ["red", "two", "blue", "A"]


# ---- questions ------------------------------------------------------------------------------------


def test_prompts_are_those_of_training(tmp_path: Path) -> None:
    prompts = Prompts(tmp_path)
    images, asked = held_out(tmp_path, 2)
    assert [image.size for image in images] == [(336, 336)] * 2
    assert {question.picture for question in asked} == {0, 1}
    assert asked == held_out(tmp_path, 2)[1]
    for question in asked:
        block = prompts.block(question.text, question.answer)
        assert list(question.before) == prompts.head and prompts.head[0] == 1
        assert list(question.after) == block.ids[: block.answer]
        # Room for the right answer and its end, and nothing more.
        assert question.longest == len(block.ids) - block.answer


def test_answers_count_when_they_are_exact_and_ended() -> None:
    found = shares(ASKED, ["red", "two", f"blue{CUT}", " A "])
    assert found == pytest.approx({"headline": 2 / 3, "colour": 1 / 2, "count": 1, "glyph": 1})
    assert counts(ASKED) == {"headline": 3, "colour": 2, "glyph": 1, "count": 1}


def test_difference_is_of_the_headline_and_its_interval_is_over_pictures() -> None:
    assert difference(ASKED, RIGHT, RIGHT) == (0, 0)
    # The count that is wrong does not matter; picture 0 loses 1 of 1, picture 1 loses 0 of 2.
    mean, half = difference(ASKED, ["green", "one", "blue", "A"], RIGHT)
    assert mean == pytest.approx(-1 / 3)
    assert half == pytest.approx(1.96 * math.sqrt(2 * ((2 / 3) ** 2 + (2 / 3) ** 2)) / 3)
    assert difference([_asked(0, "count", "one")], ["one"], ["two"]) == (0, math.inf)


# ---- settings as levels ---------------------------------------------------------------------------

STORED = {
    "levels": {
        "low": {"thresholds": [0.5, None], "fastv_ratio": 0.5},
        "mid": {"thresholds": [0.7, 0.8], "fastv_ratio": 0.25},
        "few": {"fastv_ratio": 0.6},
    },
    "default_level": "mid",
    "detail": {"high": "few"},
    "fastv_layer": 3,
    "assistant_header": [4, 5],
}
SETTINGS = compared(STORED, ["low", "mid", "few"], [0.5, 0.9], [0.5])


def test_settings_have_levels_of_their_own_and_the_checkpoint_s_come_once() -> None:
    assert [setting.level for setting in SETTINGS] == [
        "full",
        "merged-low",
        "merged-mid",
        "pruned-R-0.5",
        "pruned-R-0.9",
        "both-R-0.5-low",
        "both-R-0.5-mid",
        # The level low is merging to low with R = 0.5, which is there already.
        "level-mid",
        "level-few",
    ]
    assert SETTINGS[5:] == [
        Setting("both, R = 0.5", "low", (0.5, None), 0.5),
        Setting("both, R = 0.5", "mid", (0.7, 0.8), 0.5),
        Setting("level", "mid", (0.7, 0.8), 0.25),
        Setting("level", "few", None, 0.6),
    ]


def test_a_server_offers_every_setting_and_nothing_of_the_checkpoint_s() -> None:
    override = offering(SETTINGS, STORED)
    assert set(override) == set(KNOWN_KEYS)
    # As the server gets it.
    config = HybridConfig.parse(
        merged(STORED, json.loads(json.dumps(override))), vision_layers=2, decoder_layers=8
    )
    assert set(config.levels.names) == {setting.level for setting in SETTINGS}
    assert config.levels.default.name == "full" and config.fastv_layer == 3
    assert config.fastv_rank == "prompt_end" and config.assistant_header == ()
    for setting in SETTINGS:
        level = config.levels.of_detail(setting.level)
        assert (level.thresholds, level.fastv_ratio) == (setting.thresholds, setting.ratio)
    ranked = offering(SETTINGS, STORED, {"fastv_rank": "turn_end", "assistant_header": [9]})
    config = HybridConfig.parse(merged(STORED, ranked), vision_layers=2, decoder_layers=8)
    assert config.ranking_header == (9,)


METRICS = """\
# TYPE vllm_hybrid:images_total counter
vllm_hybrid:images_total{level="full"} 3.0
vllm_hybrid:images_total{level="merged-low"} 4.0
# TYPE vllm_hybrid:live_tokens_total counter
vllm_hybrid:live_tokens_total{level="merged-low"} 400.0
# TYPE vllm_hybrid:kept_tokens_total counter
vllm_hybrid:kept_tokens_total{level="merged-low"} 200.0
"""


class _Server:
    """A server that was started."""

    started: list[dict[str, Any]] = []
    ended = 0
    url = "http://nowhere"

    def __init__(self, checkpoint: Path, log: Path, overrides: dict[str, Any], options: list[str]) -> None:
        _Server.started.append(overrides["hybrid"])

    def reduced(self, level: str) -> dict[str, float]:
        return reduced(METRICS, level)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _Server.ended += 1


class _Client:
    """Asks nobody."""

    def __init__(self, *_: object) -> None: ...

    def answer(self, question: Asked, level: str) -> str:
        return f"{level} {question.answer}"


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Two settings beside the full one, with servers that are none."""
    monkeypatch.setattr(served, "VllmServer", _Server)
    monkeypatch.setattr(served, "_Client", _Client)
    monkeypatch.setattr(_Server, "started", [])
    monkeypatch.setattr(_Server, "ended", 0)
    (tmp_path / "config.json").write_text(json.dumps({"hybrid": STORED}))
    return Setup(tmp_path, [], ASKED, "float32", tmp_path / "log", ["low"], [0.9], [])


def test_a_server_starts_when_it_is_asked_and_counts_by_level(setup: Setup) -> None:
    with setup.server():
        pass
    assert _Server.started == []
    with setup.server() as server:
        answers, live, kept = server.answers("merged-low", ASKED)
        assert answers == [f"merged-low {question.answer}" for question in ASKED] and (live, kept) == (
            100,
            50,
        )
        server.answers("merged-low", ASKED[:1])
        assert len(_Server.started) == 1 and _Server.ended == 0
    assert _Server.ended == 1


def test_a_run_that_was_cut_off_goes_on_with_one_server(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    cut: list[bool] = []

    class Cut(Exception):
        pass

    def answers(self: object, level: str, questions: list[Asked]) -> tuple[list[str], float, float]:
        if level == "pruned-R-0.9" and not cut:
            cut.append(True)
            raise Cut
        asked.append(level)
        return RIGHT, 576.0, 576.0

    monkeypatch.setattr(served.LevelServer, "answers", answers)
    monkeypatch.setattr(run, "offline", lambda _: [Case(FULL, "all", OFFLINE, lambda: (RIGHT, 576, 576))])
    file = tmp_path / "journal"
    with pytest.raises(Cut):
        run.measure(setup, Journal(file, "work"))
    assert asked == ["full", "merged-low"]
    results = run.measure(setup, Journal(file, "work"))
    # What was known is not asked again.
    assert asked == ["full", "merged-low", "pruned-R-0.9", "level-low"]
    assert [each["where"] for each in results] == [SERVER] * 4 + [OFFLINE]


# ---- what is shown --------------------------------------------------------------------------------


def test_random_patches_are_seeded_and_nested() -> None:
    few, many = at_random(576, 90, 7), at_random(576, 195, 7)
    assert few.tolist() == sorted(set(few.tolist())) and len(few) == 90
    assert torch.equal(few, at_random(576, 90, 7)) and not torch.equal(few, at_random(576, 90, 8))
    assert set(few.tolist()) < set(many.tolist()) <= set(range(576))
    assert torch.equal(at_random(576, 576, 1), torch.arange(576))


def test_random_patches_take_the_place_of_pruned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Shown(torch.zeros(10, 2), torch.arange(10), 10)
    monkeypatch.setattr("benchmarks.accuracy.offline.everything", lambda *_: whole)
    for ratio, count in ((0.0, 10), (0.25, 8), (0.9, 1), (0.99, 1)):
        shown = fewer_after_the_choice(ratio)(None, torch.zeros(1), 3)
        assert shown.kept is not None and len(shown.kept) == count
        assert shown.places is whole.places and shown.span == 10


def test_reading_order_is_that_of_the_first_patches() -> None:
    # Token 0 holds patches 2 and 5, token 1 patches 0 and 4, token 2 patches 1 and 3.
    owner, index = torch.tensor([[1, 2, 0, 2, 1, 0]]), torch.arange(3)
    live = LiveTokens(torch.zeros(3, 2), torch.zeros_like(index), index, owner, [3])
    assert reading_order(live).tolist() == [1, 2, 0]


# ---- report ---------------------------------------------------------------------------------------


def _results() -> list[dict[str, Any]]:
    wrong = ["green", "two", "blue", "A"]
    made = [(FULL, SERVER, RIGHT, 576.0, 576.0), (FULL, OFFLINE, wrong, 576.0, 576.0)]
    made += [("pruned", SERVER, wrong, 576.0, 144.0), ("blank picture", OFFLINE, wrong, 576.0, 576.0)]
    return [
        {"family": family, "name": "here", "where": where, "live": live, "kept": kept}
        | result(ASKED, answers, RIGHT)
        for family, where, answers, live, kept in made
    ]


def test_table_has_what_is_served_first_and_says_how_far_it_is_from_the_full_model() -> None:
    lines = table(_results(), ASKED).splitlines()
    heads = lines[0].strip("| ").split(" | ")
    assert heads[2:] == [
        "live",
        "kept",
        "headline (3)",
        "colour (2)",
        "glyph (1)",
        "count (1)",
        "against full",
    ]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| full | here | 576 | 576 | 100.0 | 100.0 | 100.0 | 100.0 | +0.0 ± 0.0 |"
    assert lines[3].startswith("| pruned | here | 576 | 144 | 66.7 | 50.0 | 100.0 | 100.0 | -33.3 ± ")
    assert [line.split(" | ")[1] for line in lines[4:]] == ["here, offline"] * 2
    assert "2 pictures, 4 questions, served in float32." in summary(_results(), ASKED, "float32")
    assert "75.0%" in summary(_results(), ASKED, "float32")


def test_plot_is_drawn(tmp_path: Path) -> None:
    assert tokens_per_layer({"live": 576.0, "kept": 144.0}, 2, 8) == 252
    plot(_results(), 2, 8, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_table_goes_between_the_marks_of_the_page() -> None:
    page = "before <!-- table -->old<!-- end of table --> after"
    once = insert(page, "new")
    assert once == "before <!-- table -->\n\nnew\n\n<!-- end of table --> after"
    assert insert(once, "newer") == once.replace("new", "newer")
    for wrong in ("nothing", "<!-- table -->", "<!-- end of table --> <!-- table -->"):
        with pytest.raises(ValueError, match="lacks"):
            insert(wrong, "new")
