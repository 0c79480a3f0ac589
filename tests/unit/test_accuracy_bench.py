"""The accuracy benchmark's counting, random dropping and table; what it asks a server is not tested here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.cases import FULL, OFFLINE, SERVER
from benchmarks.accuracy.offline import Shown, at_random, fewer_after_the_choice, reading_order
from benchmarks.accuracy.questions import CUT, Asked, counts, difference, held_out, shares
from benchmarks.accuracy.report import insert, plot, result, summary, table, tokens_per_layer
from tools.demo_training.prompts import Prompts
from vllm_hybrid.method.token_merging import LiveTokens


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
