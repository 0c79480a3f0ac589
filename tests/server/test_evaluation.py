"""``vllm-hybrid eval`` on small files made here, against a server without a model."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.resources.chat.completions import AsyncCompletions
from PIL import Image

from tests.support.openai_server import FakeServer, fake_server
from tests.support.paths import ROOT
from vllm_hybrid import cli
from vllm_hybrid.evaluation.left_out import (
    BAD_PICTURE,
    NO_ANSWER,
    NO_INDEX,
    NO_OWNER,
    NO_PICTURE,
    NO_QUESTION,
    NOT_A_TABLE,
    NOT_TEXT,
    OTHER_CELLS,
    SAME_INDEX,
    UNCLOSED,
)
from vllm_hybrid.evaluation.predictions import Prediction, Predictions
from vllm_hybrid.evaluation.prompts import CAPTION, SHORT_CAPTION
from vllm_hybrid.evaluation.scoring import exact_match, score, vqa_score
from vllm_hybrid.evaluation.tsv import find_data, read_data
from vllm_hybrid.evaluation.vqa_text import plain

COLOURS = {"1": "red", "2": "green", "3": "blue", "5": "white"}
CAPTIONS = {
    "1": ["a red square", "it is all red"],
    "2": ["a green square", "nothing but green here"],
    "3": ['blue "water"\tor so', "a blue square"],
    "5": ["snow", "a white square"],
}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def picture(colour: str, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return file


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """COCO_VAL.tsv where VLMEvalKit keeps it."""
    folder = tmp_path / "LMUData"
    folder.mkdir()
    monkeypatch.setenv("LMUData", str(folder))
    rows = [
        {"index": index, "image": picture(colour), "answer": repr(CAPTIONS[index])}
        for index, colour in COLOURS.items()
    ]
    return write_tsv(folder / "COCO_VAL.tsv", rows)


def questions(file: Path, answers: dict[str, list[str]], **more: str) -> Path:
    rows = [
        {
            "index": index,
            "image": picture("red"),
            "question": f"What is {index}?",
            "answer": repr(texts),
            **more,
        }
        for index, texts in answers.items()
    ]
    return write_tsv(file, rows)


def asked(text: str) -> str:
    """The index of the row that a question of `questions` belongs to."""
    return text.partition("What is ")[2].partition("?")[0]


def colour_of(url: str) -> str:
    pixel = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB").getpixel((0, 0))
    return next(name for name in COLOURS.values() if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == pixel)


def describe(pictures: list[str], text: str) -> str:
    return f" a {colour_of(pictures[0])} square\n"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server(describe) as running:
        yield running


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vllm-hybrid", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> str:
    """The one sentence that the command ends with."""
    capsys.readouterr()
    assert evaluate(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    sentence = error[error.index("vllm-hybrid: error: ") :]
    assert sentence.count("\n") == 1 and "Traceback" not in error
    return sentence.removeprefix("vllm-hybrid: error: ").strip()


def written(file: Path) -> int:
    return file.read_text().count("\n")


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- data files -----------------------------------------------------------------------------------


def test_a_data_file_is_found_by_name_or_path(
    captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_data("COCO_VAL") == captions
    assert find_data(str(captions)) == captions
    monkeypatch.delenv("LMUData")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_data("COCO_VAL") == captions


def test_rows_have_pictures_references_and_questions(tmp_path: Path) -> None:
    red, green = picture("red", "JPEG"), picture("green")
    rows = [
        {"index": "7", "image": "9", "question": "one\nline more?", "answer": "['a', \"it's\"]"},
        {"index": "8", "image": "", "question": "no picture?", "answer": "c"},
        {"index": "9", "image": red, "question": "ünï\tcode", "answer": "[no list"},
        {"index": "10", "image": repr([red, green]), "question": "two", "answer": "4"},
    ]
    data = read_data(write_tsv(tmp_path / "Toy.tsv", rows))
    assert (data.name, data.asks, data.left_out) == ("Toy", True, {NO_PICTURE: ["row 8"]})
    assert [row.index for row in data.rows] == ["7", "9", "10"]
    assert [row.references for row in data.rows] == [["a", "it's"], ["[no list"], ["4"]]
    assert [row.cells["question"] for row in data.rows] == ["one\nline more?", "ünï\tcode", "two"]
    urls = [data.pictures(row) for row in data.rows]
    jpeg, png = f"data:image/jpeg;base64,{red}", f"data:image/png;base64,{green}"
    assert urls == [[jpeg], [jpeg], [jpeg, png]]


def test_pictures_may_be_files(tmp_path: Path) -> None:
    rows = [{"index": str(n), "image_path": f"{n}.png", "answer": "a"} for n in range(3)]
    data = read_data(write_tsv(tmp_path / "Toy.tsv", rows))
    (tmp_path / "images" / "Toy").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "0.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "images" / "Toy" / "1.png")
    assert [colour_of(data.pictures(row)[0]) for row in data.rows[:2]] == ["red", "blue"]
    with pytest.raises(ValueError, match="the picture 2.png is in neither"):
        data.pictures(data.rows[2])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": "1", "answer": "a"}], "has no column image or image_path; it has index, answer"),
        ([{"index": "1", "image": "x"}], "has no column answer or answers"),
        ([{"id": "1", "image": "x", "answer": "a"}], "has no column index"),
        (
            [{"index": str(n), "image": picture("red"), "answer": ""} for n in range(2)],
            "has no row that can be asked and scored; left out: 2 rows without an answer",
        ),
        ([{"index": "1", "image": "", "answer": "a"}], "left out: 1 row without a picture, which is row 1"),
        ([{"index": "1", "image": "4", "answer": "a"}], "1 row with the picture of a row that has none"),
    ],
)
def test_what_is_wrong_with_a_data_file(rows: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_data(write_tsv(tmp_path / "Toy.tsv", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "cannot be read as a table with tabs"),
        (b"", "is empty"),
        (b"\n", "has no column index"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-LFS pointer"),
    ],
)
def test_no_table_at_all(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "a.tsv")


def test_one_bad_row_costs_no_other(tmp_path: Path) -> None:
    red = picture("red")
    good = {"index": "", "image": red, "question": "what?", "A": "", "B": "", "answer": "['a']"}
    rows: list[dict[str, str]] = [
        good | {"index": "first"},
        good | {"index": "unanswered", "answer": ""},
        good | {"index": "blank", "answer": " "},
        good | {"index": "none", "answer": "[]"},
        good | {"index": "unseen", "image": ""},
        good | {"index": "borrows", "image": "unanswered"},
        good | {"index": "orphan", "image": "nowhere"},
        good | {"index": "first", "answer": "b"},
        good,
        good | {"index": "silent", "question": ""},
        good | {"index": "choice", "question": "", "A": "a cat", "B": "a dog"},
        good | {"index": "last"},
    ]
    file = write_tsv(tmp_path / "Toy.tsv", rows)
    lines = file.read_bytes().splitlines(keepends=True)
    odd, long = lines[-1].replace(b"last", b"odd\xff"), lines[-1][:-1] + b"\tmore\n"
    bad = [b"short\ta\n", b"x\ry\n", b"\n", odd, long]
    file.write_bytes(b"".join([*lines[:-1], *bad, lines[-1]]))
    data = read_data(file)
    assert [row.index for row in data.rows] == ["first", "borrows", "choice", "last"]
    assert all(row.references == ["a"] for row in data.rows)
    assert data.left_out == {
        NO_ANSWER: ["row unanswered", "row blank", "row none"],
        NO_PICTURE: ["row unseen"],
        SAME_INDEX: ["line 9"],
        NO_INDEX: ["line 10"],
        NO_QUESTION: ["row silent"],
        OTHER_CELLS: ["line 13", "line 17"],
        NOT_A_TABLE: ["line 14"],
        NOT_TEXT: ["line 16"],
        NO_OWNER: ["row orphan"],
    }
    # A row that is left out may still have another's picture.
    assert {colour_of(url) for row in data.rows for url in data.pictures(row)} == {"red"}


def table(file: Path, *rows: str) -> Path:
    """A table of one's own: columns index, image, question, answer; PIC stands for a picture."""
    text = "\n".join(["index\timage\tquestion\tanswer", *rows, ""])
    file.write_text(text.replace("PIC", picture("red")), encoding="utf-8")
    return file


@pytest.mark.parametrize("mark", ['{}\tPIC\t"what?\ta', '{}\tPIC\twhat?\t"a', '"{}\tPIC\twhat?\ta'])
@pytest.mark.parametrize("bad", [{3}, {3, 4}, {3, 7}, {9}, {3, 9}, {8, 9}, set(range(9))])
def test_an_unclosed_quotation_mark_costs_its_own_row(mark: str, bad: set[int], tmp_path: Path) -> None:
    rows = [(mark if n in bad else "{}\tPIC\twhat?\ta").format(n) for n in range(10)]
    data = read_data(table(tmp_path / "Toy.tsv", *rows))
    assert [row.index for row in data.rows] == [str(n) for n in range(10) if n not in bad]
    assert data.left_out == {UNCLOSED: [f"line {n + 2}" for n in sorted(bad)]}
    assert all(colour_of(data.pictures(row)[0]) == "red" for row in data.rows)
    assert data.digest == hashlib.sha256(data.file.read_bytes()).hexdigest()


def test_an_unclosed_quotation_mark_in_a_long_table(tmp_path: Path) -> None:
    """Nothing closes the quotation, and the table is longer than what is read in search of its end."""
    rows = [f"{n}\tPIC\t{'' if n != 100 else chr(34)}what?\ta" for n in range(1000)]
    data = read_data(table(tmp_path / "Toy.tsv", *rows))
    assert [int(row.index) for row in data.rows] == [n for n in range(1000) if n != 100]
    assert data.left_out == {UNCLOSED: ["line 102"]}


def test_a_table_that_ends_in_a_quotation_loses_its_last_row(tmp_path: Path) -> None:
    file = table(tmp_path / "Toy.tsv", "0\tPIC\twhat?\ta", '1\tPIC\twhat?\t"an answer\nof two lines"')
    assert [row.index for row in read_data(file).rows] == ["0", "1"]
    for cut in (2, 8, 5):  # Each off what the one before left.
        file.write_bytes(file.read_bytes()[:-cut])
        data = read_data(file)
        assert [row.index for row in data.rows] == ["0"]
        assert data.left_out[UNCLOSED] == ["line 3"]


def test_a_header_that_takes_in_rows_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "Toy.tsv", "0\tPIC\twhat?\ta", '1\tPIC\t"what?"\ta')
    file.write_bytes(file.read_bytes().replace(b"\tanswer", b'\t"answer'))
    with pytest.raises(ValueError, match="its first line does not name columns"):
        read_data(file)


def test_quoted_cells_go_on_over_lines(tmp_path: Path) -> None:
    """Marks inside may be doubled, as programs write them, or not, as people do."""
    held = ['"', "a\tb\tc\td\n1\t2\t3\t4\n", 'two\n\n"lines"\n', '\n"', 'un"quoted', "\r\n"]
    held.append("x\ty\tz\tw\n" * 50)
    good = {"index": "", "image": picture("red"), "question": "", "answer": "a"}
    written = [good | {"index": str(n), "question": f"q{text}q"} for n, text in enumerate(held)]
    data = read_data(write_tsv(tmp_path / "Toy.tsv", written))
    assert [row.cells["question"] for row in data.rows] == [f"q{text}q" for text in held]
    assert not data.left_out and all(colour_of(data.pictures(row)[0]) == "red" for row in data.rows)
    rows = ['0\tPIC\t"one\nsays "no" to it"\ta', '1\tPIC\t"What" is it?\ta', "2\tPIC\twhat?\ta"]
    data = read_data(table(tmp_path / "Own.tsv", *rows))
    assert [row.index for row in data.rows] == ["0", "1", "2"] and not data.left_out


def test_either_column_of_answers_will_do(tmp_path: Path) -> None:
    good = {"index": "", "image": picture("red"), "answer": "", "answers": ""}
    filled = [("a", "['b']"), ("", "['b']"), ("[]", "b"), ("a", ""), ("", "")]
    rows = [good | {"index": str(n), "answer": one, "answers": two} for n, (one, two) in enumerate(filled)]
    data = read_data(write_tsv(tmp_path / "Toy.tsv", rows))
    assert [row.references for row in data.rows] == [["a"], ["b"], ["b"], ["a"]]
    assert data.left_out == {NO_ANSWER: ["row 4"]} and not any(row.cells for row in data.rows)


def test_base64_may_be_broken_into_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    red = picture("red")
    broken = base64.encodebytes(base64.b64decode(red)).decode()
    assert "\n" in broken.strip()
    cells = [broken, f" {red}\r\n", repr([broken, red]), f"['{broken}',\n '{red}']"]
    rows = [{"index": str(n), "image": cell, "answer": "a red square"} for n, cell in enumerate(cells)]
    data = read_data(write_tsv(tmp_path / "Toy.tsv", rows))
    url = f"data:image/png;base64,{red}"
    assert [data.pictures(row) for row in data.rows] == [[url], [url], [url, url], [url, url]]
    with fake_server(describe) as server:
        options = ("--data", data.file, "--url", server.url, "--out", tmp_path, "--metrics", "exact")
        assert evaluate(monkeypatch, *options) == 0
        assert len(server.requests) == 4
    assert "left out" not in capsys.readouterr().out


# ---- scores ---------------------------------------------------------------------------------------


def bleu(answers: list[str], references: list[list[str]], n: int) -> float:
    """Bleu-n of Papineni et al. with the closest reference length, over a corpus."""
    given = [answer.split() for answer in answers]
    right = [[text.split() for text in texts] for texts in references]
    product = 1.0
    for k in range(1, n + 1):
        hits = total = 0
        for words, texts in zip(given, right, strict=True):
            own = ngrams(words, k)
            allowed = [ngrams(text, k) for text in texts]
            hits += sum(min(count, max(a[gram] for a in allowed)) for gram, count in own.items())
            total += sum(own.values())
        product *= hits / total
    length = sum(map(len, given))
    closest = sum(
        min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for words, texts in zip(given, right, strict=True)
    )
    return 100 * product ** (1 / n) * (1 if length >= closest else math.exp(1 - closest / length))


def ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def test_bleu_is_the_corpus_score() -> None:
    answers = ["a red square on a wall", "the green door of a house"]
    references = [
        ["a red square on the wall", "one red thing"],
        ["the green door", "a green door of the house"],
    ]
    scores = score(["bleu"], answers, references)
    for n in (1, 2, 3):
        assert scores[f"Bleu-{n}"] == pytest.approx(bleu(answers, references, n), abs=1e-6)


def test_caption_scores_of_perfect_and_empty_answers() -> None:
    references = [["a red square", "red"], ["the green door opens"], ["some blue water below a bridge"]]
    perfect = score(["bleu", "rouge", "cider"], [texts[0] for texts in references], references)
    assert list(perfect) == ["Bleu-1", "Bleu-2", "Bleu-3", "Bleu-4", "ROUGE-L", "CIDEr"]
    assert perfect["Bleu-1"] == pytest.approx(100) and perfect["ROUGE-L"] == pytest.approx(100)
    assert perfect["CIDEr"] > 500
    empty = score(["bleu", "rouge", "cider"], ["", "", ""], references)
    assert all(value == pytest.approx(0, abs=1e-6) for value in empty.values())


def test_a_long_answer_scores_next_to_no_cider() -> None:
    references = [["a red square on a wall"], ["the green door of a house"], ["blue water below a bridge"]]
    long = [
        f"In this picture one can see {texts[0]} , " + "and much more is said about it " * 8
        for texts in references
    ]
    short = score(["cider"], [texts[0] for texts in references], references)["CIDEr"]
    assert score(["cider"], long, references)["CIDEr"] < short / 100


def test_scores_do_not_print(capsys: pytest.CaptureFixture[str]) -> None:
    score(["bleu", "rouge", "cider"], ["a b"], [["a b"]])
    assert capsys.readouterr().out == ""


def test_the_vqa_score_is_that_of_rows_with_several_answers() -> None:
    references = [["yes"] * 10, ["no"], ["no"] * 10]
    scores = score(["exact", "vqa"], ["yes", "no", "yes"], references)
    assert scores == {"Exact match": pytest.approx(200 / 3), "VQA score": 50}
    assert score(["vqa"], ["no"], [["no"]]) == {}


def test_exact_match() -> None:
    assert exact_match(" Yes\n", ["no", "yes"]) == 1
    assert exact_match("yes.", ["no", "yes"]) == 0


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_score(agree: int, expected: float) -> None:
    assert vqa_score("Two", ["2"] * agree + ["three"] * (10 - agree)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("The two  cats.", "2 cats"),
        ("An apple, a pear", "apple pear"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("None", "0"),
        ("yes\nno", "yes no"),
        ("?", ""),
    ],
)
def test_how_the_vqa_score_reads_an_answer(answer: str, read: str) -> None:
    assert plain(answer) == read


# ---- answers on disk ------------------------------------------------------------------------------


def test_answers_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    store = Predictions(tmp_path)
    with store.writing({"model": "m"}) as add:
        add(Prediction("1", "one\nline", "stop"))
        add(Prediction("2", "zwölf", "length"))
    whole = store.file.read_bytes()
    for size in range(len(whole)):
        store.file.write_bytes(whole[:size])
        again = Predictions(tmp_path)
        complete = whole[:size].count(b"\n")
        assert list(again.answered) == ["1", "2"][:complete]
    with again.writing({"model": "m"}) as add:
        add(Prediction("3", "three"))
    assert [line["index"] for line in lines(store.file)] == ["1", "3"]


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    with Predictions(tmp_path).writing({"model": "m", "root": "/a"}) as add:
        add(Prediction("1", "one"))
    Predictions(tmp_path).check({"model": "m"})
    with (
        pytest.raises(ValueError, match="has answers with root '/a', not '/b'"),
        Predictions(tmp_path).writing({"model": "m", "root": "/b"}),
    ):
        pass
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json is missing"):
        Predictions(tmp_path).check({"model": "m"})


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    with (
        Predictions(tmp_path).writing({}),
        pytest.raises(ValueError, match="another run is writing"),
        Predictions(tmp_path).writing({}),
    ):
        pass


def test_a_damaged_line_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"index": "1", "prediction": "a"}\nhello\n{"index"')
    with pytest.raises(ValueError, match="line 2 of .* is no answer of this command"):
        Predictions(tmp_path)


# ---- the command ----------------------------------------------------------------------------------


def test_captions(
    captions: Path,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(monkeypatch, "--data", "COCO_VAL", "--url", server.url) == 0
    shown = capsys.readouterr()
    assert "CIDEr" in shown.out and f"4 of 4 rows of {captions} are scored" in shown.out
    assert "asking tiny" in shown.err and "4/4" in shown.err
    answers = {
        line["index"]: line["prediction"]
        for line in lines(Path("evaluation/COCO_VAL/tiny/predictions.jsonl"))
    }
    assert answers == {index: f"a {colour} square" for index, colour in COLOURS.items()}
    assert set(server.texts()) == {CAPTION}
    assert all((request["temperature"], request["max_tokens"]) == (0, 512) for request in server.requests)
    (model,) = json.loads(Path("evaluation/COCO_VAL/tiny.json").read_text())["models"]
    expected = score(
        ["bleu", "rouge", "cider"], [answers[i] for i in COLOURS], [CAPTIONS[i] for i in COLOURS]
    )
    assert model["scores"] == expected and model["scores"]["Bleu-1"] == pytest.approx(100)
    settings = json.loads(Path("evaluation/COCO_VAL/tiny/settings.json").read_text())
    assert settings["prompt"] == CAPTION and settings["root"] == "/checkpoints/a"


def test_short_captions_and_limits(
    captions: Path, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", captions, "--url", server.url, "--out", tmp_path / "out", "--max-tokens", "40")
    assert evaluate(monkeypatch, *options, "--short-caption", "--limit", "2") == 0
    assert server.texts() == [SHORT_CAPTION] * 2
    assert {request["max_tokens"] for request in server.requests} == {40}
    # A larger limit asks what is new.
    assert evaluate(monkeypatch, *options, "--short-caption", "--limit", "3") == 0
    assert len(server.requests) == 3


def test_nothing_is_asked_twice_and_no_server_is_needed_then(
    captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", captions, "--out", tmp_path / "out")
    with fake_server(describe) as server:
        assert evaluate(monkeypatch, *options, "--url", server.url) == 0
        first = capsys.readouterr().out
        assert evaluate(monkeypatch, *options, "--url", server.url) == 0
        assert len(server.requests) == 4
    assert evaluate(monkeypatch, *options, "--url", server.url, "--model", "tiny") == 0
    assert capsys.readouterr().out == 2 * first
    message = refused(monkeypatch, capsys, *options, "--url", server.url)
    assert message.startswith(f"no server answers at {server.url}")
    message = refused(monkeypatch, capsys, *options, "--model", "tiny", "--max-tokens", "9")
    assert "has answers with max_tokens 512, not 9" in message


def test_a_row_that_fails_is_reported_and_asked_again(
    captions: Path,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = lambda pictures, text: (
        400 if colour_of(pictures[0]) == "green" else describe(pictures, text)
    )
    options = ("--data", captions, "--url", server.url, "--out", tmp_path)
    assert evaluate(monkeypatch, *options) == 1
    shown = capsys.readouterr().out
    assert (
        "3 of 4 rows" in shown and "without an answer from tiny: 1, such as row 2 (Error code: 400" in shown
    )
    report = json.loads((tmp_path / "COCO_VAL" / "tiny.json").read_text())
    assert list(report["models"][0]["failed"]) == ["2"]
    server.answer, server.requests = describe, []
    assert evaluate(monkeypatch, *options) == 0
    assert len(server.requests) == 1
    assert len(lines(tmp_path / "COCO_VAL" / "tiny" / "predictions.jsonl")) == 4


def test_rows_that_are_left_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a row without an answer nor one whose picture is broken is asked, or costs the others."""
    good = {
        "index": "1",
        "image": picture("red", "JPEG"),
        "question": "What is 1?",
        "answer": "['yes', 'no']",
    }
    rows = [good, good | {"index": "2", "answer": ""}, good | {"index": "5", "answer": "yes"}]
    rows += [good | {"index": "3", "image": good["image"][:-120]}, good | {"index": "4", "image": "%" * 99}]
    rows += [good | {"index": str(n)} for n in (6, 7)]
    file = write_tsv(tmp_path / "Toy.tsv", rows)
    with fake_server(lambda *_: "yes") as server:
        options = ("--data", file, "--url", server.url, "--out", tmp_path)
        assert evaluate(monkeypatch, *options) == 0
        assert len(server.requests) == 4
    shown = capsys.readouterr().out
    assert f"4 of 4 rows of {file} are scored" in shown
    assert "left out: 1 row without an answer to compare with, which is row 2\n" in shown
    assert "left out: 2 rows with a picture that cannot be read, such as row 3 (" in shown
    assert "the VQA score leaves out rows with a single right answer: 1\n" in shown
    report = json.loads((tmp_path / "Toy" / "tiny.json").read_text())
    assert report["rows"] == report["scored"] == 4
    assert {why: len(names) for why, names in report["left_out"].items()} == {NO_ANSWER: 1, BAD_PICTURE: 2}
    # What was answered needs no server, although two rows have no answer.
    assert evaluate(monkeypatch, *options, "--model", "tiny") == 0
    assert capsys.readouterr().out == shown


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each picture that is opened."""
    found: list[object] = []
    real = Image.open

    def count(file: Any, *arguments: Any, **options: Any) -> Image.Image:
        found.append(file)
        return real(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    return found


def test_the_server_is_looked_for_before_all_pictures_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    opened: list[object],
) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(9)})
    with fake_server(lambda *_: "yes") as server:
        options = ("--data", file, "--url", server.url, "--out", tmp_path, "--model")
        assert "serves tiny, not other" in refused(monkeypatch, capsys, *options, "other")
        assert len(opened) <= 1
    opened.clear()
    assert "no server answers at" in refused(monkeypatch, capsys, *options, "tiny")
    assert len(opened) <= 1


def test_pictures_are_read_once_for_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[object]
) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(9)})
    with fake_server(lambda *_: "yes", "a", "b") as server:
        options = ("--data", file, "--url", server.url, "--out", tmp_path)
        assert evaluate(monkeypatch, *options, "--model", "a", "--compare-model", "b") == 0
        assert len(server.requests) == 18
    assert len(opened) == 9


def test_a_missing_picture_file_costs_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"index": str(n), "image_path": f"{n}.png", "answer": "a"} for n in range(3)]
    rows.append({"index": "3", "image_path": "x" * 300, "answer": "a"})
    file = write_tsv(tmp_path / "Toy.tsv", rows)
    with fake_server(lambda *_: "a") as server:
        options = ("--data", file, "--url", server.url, "--out", tmp_path, "--metrics", "exact")
        message = refused(monkeypatch, capsys, *options)
        assert "none of the 0 rows got an answer; left out: 4 rows with a picture that cannot be" in message
        Image.new("RGB", (4, 4), "red").save(tmp_path / "0.png")
        assert evaluate(monkeypatch, *options) == 0
        assert len(server.requests) == 1
    shown = capsys.readouterr().out
    assert "1 of 1 rows" in shown and "left out: 3 rows with a picture that cannot be read" in shown


def test_a_reply_without_an_answer_costs_no_other_row(
    captions: Path, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = AsyncCompletions.create

    async def emptied(self: AsyncCompletions, **request: Any) -> Any:
        reply = await create(self, **request)
        if colour_of(request["messages"][0]["content"][0]["image_url"]["url"]) == "green":
            reply.choices = []
        return reply

    monkeypatch.setattr(AsyncCompletions, "create", emptied)
    assert evaluate(monkeypatch, "--data", captions, "--url", server.url, "--out", tmp_path) == 1
    (model,) = json.loads((tmp_path / "COCO_VAL" / "tiny.json").read_text())["models"]
    assert model["failed"] == {"2": "the server's reply holds no answer"}


def test_a_server_that_goes_away_costs_no_answer(
    captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with fake_server(describe) as server:

        def leave(pictures: list[str], text: str) -> str:
            if len(server.requests) > 2:
                raise ConnectionAbortedError
            return describe(pictures, text)

        server.answer = leave
        options = ("--data", captions, "--url", server.url, "--out", tmp_path, "--concurrency", "1")
        message = refused(monkeypatch, capsys, *options)
        assert message == f"the server at {server.url} no longer answers; run again to go on where it stopped"
        assert len(lines(tmp_path / "COCO_VAL" / "tiny" / "predictions.jsonl")) == 2
        server.answer = describe
        assert evaluate(monkeypatch, *options) == 0


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_ends_the_run(
    status: int,
    captions: Path,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = lambda *_: status
    message = refused(monkeypatch, capsys, "--data", captions, "--url", server.url, "--out", tmp_path)
    assert f"refuses: Error code: {status}" in message and len(server.requests) <= 4


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"index": str(n), "image": picture("red"), "answer": "['a red square', 'red']"} for n in range(12)
    ]
    file = write_tsv(tmp_path / "Toy.tsv", rows)
    killed = threading.Event()
    held = []
    server: FakeServer

    def slowly(pictures: list[str], text: str) -> str:
        if len(server.requests) > 5:
            held.append(text)
            killed.wait()
        return describe(pictures, text)

    with fake_server(slowly) as server:
        options = [
            "--data",
            str(file),
            "--url",
            server.url,
            "--out",
            str(tmp_path / "out"),
            "--concurrency",
            "2",
        ]
        call = [sys.executable, "-m", "vllm_hybrid.cli", "eval", *options]
        run = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        predictions = tmp_path / "out" / "Toy" / "tiny" / "predictions.jsonl"
        # All it may have on the way waits, so that nothing more comes in once it is dead.
        while len(held) < 2 or not predictions.exists() or written(predictions) < len(server.requests) - 2:
            assert run.poll() is None
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        killed.set()
        answered = len(lines(predictions))
        assert answered >= 4
        server.answer, server.requests = describe, []
        assert evaluate(monkeypatch, *options) == 0
        assert len(server.requests) == 12 - answered
    assert {line["index"] for line in lines(tmp_path / "out" / "Toy" / "tiny" / "predictions.jsonl")} == {
        str(n) for n in range(12)
    }


def test_no_more_rows_are_in_flight_than_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(12)})
    server: FakeServer

    def wait(*_: object) -> str:
        while server.most_at_once < 3:
            time.sleep(0.01)
        # Time for one too many.
        time.sleep(0.05)
        return "yes"

    with fake_server(wait) as server:
        options = ("--data", file, "--url", server.url, "--out", tmp_path, "--concurrency", "3")
        assert evaluate(monkeypatch, *options) == 0
        assert server.most_at_once == 3


def test_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = questions(
        tmp_path / "Toy.tsv", {"1": ["a cat"] * 10, "2": ["dog"] * 2 + ["wolf"] * 8, "3": ["no"] * 10}
    )
    said = {"1": "Cat.", "2": "dog", "3": "No"}
    with fake_server(lambda pictures, text: said[asked(text)]) as server:
        assert evaluate(monkeypatch, "--data", file, "--url", server.url, "--out", tmp_path) == 0
        assert sorted(server.texts())[0] == "What is 1?\nAnswer the question using a single word or phrase."
        options = ("--data", file, "--url", server.url, "--out", tmp_path / "own")
        assert evaluate(monkeypatch, *options, "--prompt", "Q: {question} A:", "--metrics", "vqa") == 0
        assert server.texts()[-1].startswith("Q: What is ") and server.texts()[-1].endswith("? A:")
    (model,) = json.loads((tmp_path / "Toy" / "tiny.json").read_text())["models"]
    assert model["scores"] == {"Exact match": pytest.approx(200 / 3), "VQA score": pytest.approx(260 / 3)}
    (model,) = json.loads((tmp_path / "own" / "Toy" / "tiny.json").read_text())["models"]
    assert list(model["scores"]) == ["VQA score"]


def test_options_of_a_choice_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = questions(tmp_path / "Toy.tsv", {"1": ["B"]}, hint="Look.", A="a cat", B="a dog", C="")
    with fake_server(lambda *_: "B") as server:
        assert evaluate(monkeypatch, "--data", file, "--url", server.url, "--out", tmp_path) == 0
        (text,) = server.texts()
    assert text == (
        "Look.\nWhat is 1?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert "Exact match  100.00" in capsys.readouterr().out


def test_two_servers_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(4)})
    hybrid = {"0": "yes", "1": "no", "2": "yes", "3": "maybe..."}
    with (
        fake_server(lambda *_: "yes", "full") as first,
        fake_server(
            lambda pictures, text: 500 if asked(text) == "2" else hybrid[asked(text)], "hybrid"
        ) as second,
    ):
        monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
        options = ("--data", file, "--out", tmp_path, "--url", first.url, "--compare-url", second.url)
        assert evaluate(monkeypatch, *options) == 1
        assert "3 of 4 rows" in capsys.readouterr().out
        second.answer = lambda pictures, text: hybrid[asked(text)]
        assert evaluate(monkeypatch, *options) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[:3] == [
        "                full  hybrid  difference",
        "Exact match   100.00   50.00      -50.00",
        "same answers           50.0%",
    ]
    assert "answers of hybrid cut at 512 tokens: 1" in shown
    report = json.loads((tmp_path / "Toy" / "full-and-hybrid.json").read_text())
    assert report["difference"] == {"Exact match": -50} and report["same_answers"] == 50
    # Servers may also run one after the other: what was answered needs none.
    names = ("--data", file, "--out", tmp_path, "--model", "full", "--compare-model", "hybrid")
    assert evaluate(monkeypatch, *names) == 0
    assert capsys.readouterr().out == shown


def test_two_servers_may_serve_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = questions(tmp_path / "Toy.tsv", {"1": ["yes"]})
    with fake_server(lambda *_: "yes") as first, fake_server(lambda *_: "no") as second:
        options = ("--data", file, "--out", tmp_path, "--url", first.url, "--compare-url", second.url)
        assert evaluate(monkeypatch, *options) == 0
    report = json.loads((tmp_path / "Toy" / "tiny-and-tiny-compared.json").read_text())
    assert [model["scores"]["Exact match"] for model in report["models"]] == [100, 0]


# ---- details --------------------------------------------------------------------------------------


def details_of(request: dict[str, Any]) -> list[str | None]:
    """The details of a request's pictures."""
    *pictures, _ = request["messages"][0]["content"]
    return [part["image_url"].get("detail") for part in pictures]


@pytest.fixture
def by_detail(monkeypatch: pytest.MonkeyPatch) -> dict[str | None, str]:
    """What a server answers at each detail; any other it refuses as ours does."""
    said: dict[str | None, str] = {None: "yes"}
    create = AsyncCompletions.create

    async def answer(self: AsyncCompletions, **request: Any) -> Any:
        (detail,) = set(details_of(request))
        if detail not in said:
            error = {"message": f"detail is {detail!r}, which means no level", "param": "detail"}
            refusal: Any = httpx.Response(400, request=httpx.Request("POST", "http://server/v1"))
            raise openai.BadRequestError("Error code: 400", response=refusal, body=error)
        reply = await create(self, **request)
        reply.choices[0].message.content = said[detail]
        return reply

    monkeypatch.setattr(AsyncCompletions, "create", answer)
    return said


def test_without_a_detail_none_is_sent(
    captions: Path, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(monkeypatch, "--data", captions, "--url", server.url, "--out", tmp_path) == 0
    assert [details_of(request) for request in server.requests] == [[None]] * 4
    assert "detail" not in json.loads((tmp_path / "COCO_VAL" / "tiny" / "settings.json").read_text())


def test_details_are_asked_of_one_server_and_reported_side_by_side(
    tmp_path: Path,
    server: FakeServer,
    by_detail: dict[str | None, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(4)})
    by_detail |= {"low": "no", "mid": "yes", "original": "yes"}
    options = ("--data", file, "--url", server.url, "--out", tmp_path)
    assert evaluate(monkeypatch, *options, "--detail", "low") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "             tiny-at-low",
        "Exact match         0.00",
    ]
    # Two are compared as two servers are.
    assert evaluate(monkeypatch, *options, "--detail", "low", "--detail", "mid") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[:3] == [
        "              tiny-at-low  tiny-at-mid  difference",
        "Exact match          0.00       100.00     +100.00",
        "same answers                      0.0%",
    ]
    assert "asking tiny at mid" in shown.err
    more = ("--detail", "low", "--detail", "mid", "--detail", "original")
    assert evaluate(monkeypatch, *options, *more) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "                             tiny-at-low  tiny-at-mid  tiny-at-original",
        "Exact match                         0.00       100.00            100.00",
        "same answers as tiny-at-low       100.0%         0.0%              0.0%",
    ]
    # Every detail was asked once about every row, whichever runs it was in.
    assert Counter(detail for request in server.requests for detail in details_of(request)) == {
        "low": 4,
        "mid": 4,
        "original": 4,
    }
    folder = tmp_path / "Toy"
    assert sorted(f.name for f in folder.iterdir() if f.suffix == ".json") == [
        "tiny-at-low-and-mid-and-original.json",
        "tiny-at-low-and-mid.json",
        "tiny-at-low.json",
    ]
    for detail in ("low", "mid", "original"):
        answers = lines(folder / f"tiny-at-{detail}" / "predictions.jsonl")
        assert {line["prediction"] for line in answers} == {by_detail[detail]}
        assert json.loads((folder / f"tiny-at-{detail}" / "settings.json").read_text())["detail"] == detail
    models = json.loads((folder / "tiny-at-low-and-mid-and-original.json").read_text())["models"]
    assert [(model["settings"]["detail"], model["same_answers"]) for model in models] == [
        ("low", 100),
        ("mid", 0),
        ("original", 0),
    ]


def test_a_stopped_run_goes_on_at_each_detail(
    tmp_path: Path, server: FakeServer, by_detail: dict[str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(5)})
    by_detail |= {"low": "no", "mid": "yes"}
    options = ("--data", file, "--url", server.url, "--out", tmp_path)
    assert evaluate(monkeypatch, *options, "--limit", "3", "--detail", "mid") == 0
    assert evaluate(monkeypatch, *options, "--limit", "2") == 0
    assert evaluate(monkeypatch, *options, "--detail", "low", "--detail", "mid") == 0
    asked = [
        (details_of(request)[0], text) for request, text in zip(server.requests, server.texts(), strict=True)
    ]
    assert len(asked) == len(set(asked)) == 3 + 2 + 5 + 2
    for name, count, said in (("tiny", 2, "yes"), ("tiny-at-low", 5, "no"), ("tiny-at-mid", 5, "yes")):
        answers = lines(tmp_path / "Toy" / name / "predictions.jsonl")
        assert [line["prediction"] for line in answers] == [said] * count


def test_answers_at_one_detail_are_not_taken_for_anothers(
    tmp_path: Path,
    server: FakeServer,
    by_detail: dict[str | None, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two details may make one name of a folder."""
    file = questions(tmp_path / "Toy.tsv", {"1": ["yes"]})
    by_detail |= {"a b": "yes", "a/b": "no"}
    options = ("--data", file, "--url", server.url, "--out", tmp_path)
    assert evaluate(monkeypatch, *options, "--detail", "a b") == 0
    message = refused(monkeypatch, capsys, *options, "--detail", "a/b")
    assert "has answers with detail 'a b', not 'a/b'; give another --out" in message


def test_two_models_are_compared_at_every_detail(
    tmp_path: Path,
    by_detail: dict[str | None, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = questions(tmp_path / "Toy.tsv", {"1": ["yes"], "2": ["no"]})
    by_detail |= {"low": "no", "mid": "yes"}
    with fake_server(lambda *_: "", "a", "b") as server:
        options = ("--data", file, "--url", server.url, "--out", tmp_path)
        names = ("--model", "a", "--compare-model", "b")
        assert evaluate(monkeypatch, *options, *names, "--detail", "low", "--detail", "mid") == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].split() == ["a-at-low", "a-at-mid", "b-at-low", "b-at-mid"]
        assert table[2].split()[-4:] == ["100.0%", "0.0%", "100.0%", "0.0%"]
        pairs = [(request["model"], details_of(request)[0]) for request in server.requests]
        assert Counter(pairs) == dict.fromkeys([("a", "low"), ("a", "mid"), ("b", "low"), ("b", "mid")], 2)
        assert (tmp_path / "Toy" / "a-and-b-at-low-and-mid.json").is_file()
        # The same name at two servers, which at one detail stand side by side as without.
        again = ("--model", "a", "--compare-url", server.url, "--compare-model", "a", "--detail", "low")
        assert evaluate(monkeypatch, *options, *again) == 0
    assert capsys.readouterr().out.split()[:3] == ["a-at-low", "a-compared-at-low", "difference"]
    assert (tmp_path / "Toy" / "a-and-a-compared-at-low.json").is_file()


@pytest.mark.parametrize(
    ("details", "message"),
    [
        (["low", "lwo"], "refuses --detail lwo: detail is 'lwo', which means no level"),
        (["lwo"], "refuses --detail lwo: detail is 'lwo', which means no level"),
        (["low", "mid", "low"], "--detail low is given 2 times; give it once"),
        ([" "], "--detail is empty; give the name of a level"),
    ],
)
def test_a_wrong_detail_ends_the_run_before_the_long_part(
    details: list[str],
    message: str,
    tmp_path: Path,
    server: FakeServer,
    by_detail: dict[str | None, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = questions(tmp_path / "Toy.tsv", {str(n): ["yes"] for n in range(20)})
    by_detail |= {"low": "no", "mid": "yes"}
    options = [part for detail in details for part in ("--detail", detail)]
    more = ("--out", tmp_path, "--concurrency", "1")
    assert message in refused(monkeypatch, capsys, "--data", file, "--url", server.url, *more, *options)
    assert len(server.requests) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "NOTHING"], "has no NOTHING.tsv; put VLMEvalKit's file there, set LMUData to its folder"),
        (["--data", "no/where.tsv"], "no/where.tsv is no file"),
        (
            ["--data", "COCO_VAL", "--model", "other"],
            "serves tiny, not other; start it with --served-model-name",
        ),
        (
            ["--data", "COCO_VAL", "--metrics", "bleu,fame"],
            "there is no metric fame; choose from bleu, rouge",
        ),
        (["--data", "COCO_VAL", "--prompt", "a", "--short-caption"], "exclude each other"),
        (["--data", "COCO_VAL", "--prompt", "Why {question}"], "has no column question"),
        (["--data", "toy.tsv", "--short-caption"], "asks questions of its own"),
        (["--data", "toy.tsv", "--prompt", "hello"], "put {question} where they go"),
        (["--data", "toy.tsv", "--metrics", "vqa"], "the VQA score compares answers of several people"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    captions: Path,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    questions(tmp_path / "toy.tsv", {"1": ["yes"]})
    assert message in refused(monkeypatch, capsys, *arguments, "--url", server.url)
    assert not server.requests and not (tmp_path / "evaluation").exists()


def test_a_server_of_several_models_needs_a_choice(
    captions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(describe, "a", "b") as server:
        message = refused(monkeypatch, capsys, "--data", captions, "--url", server.url)
    assert message.endswith("serves a, b; choose with --model")


def test_a_missing_library_is_named_before_anything_is_asked(
    captions: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    message = refused(monkeypatch, capsys, "--data", captions, "--url", server.url)
    assert message.startswith("this needs pycocoevalcap; install") and not server.requests


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv[1:] = ['eval', '--help']\n"
        "from vllm_hybrid import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'openai', 'pycocoevalcap', 'filelock', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
