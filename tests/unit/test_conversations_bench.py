"""The benchmark of ranking in conversations: what is asked, what is shown, the tables; no server is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.accuracy.cases import Found, Setup
from benchmarks.accuracy.conversations import (
    Answers,
    Questions,
    asks_for_other,
    offline_table,
    ranks,
    results,
    served_table,
    speak,
    summary,
    talks,
)
from benchmarks.accuracy.offline import OfflineModel, Shown, answer_ranked, mean_over_copies, unmerged
from benchmarks.accuracy.questions import Asked, after, held_out
from benchmarks.accuracy.settings import MERGED, PRUNED, Setting
from tests.support.reference import Reference
from tests.support.tiny_checkpoints import conversation, decided_images, make_images, pick_thresholds, prompt
from vllm_hybrid.config import PROMPT_END, TURN_END
from vllm_hybrid.demo.tokenizer import IMAGE_ID, write_tokenizer
from vllm_hybrid.levels import FULL
from vllm_hybrid.tools.journal import Journal


def _asked(picture: int, task: str, text: str, cells: tuple[int, ...] = ()) -> Asked:
    return Asked(picture, task, text, f"{text}!", (1,), (2,), 3, cells)


COLOUR, PLACE = _asked(0, "colour", "a", (4,)), _asked(0, "place", "b", (2,))
SAME, COUNT, ABSENT = (
    _asked(0, "shape", "c", (4,)),
    _asked(0, "count", "d", (2, 4)),
    _asked(0, "presence", "e"),
)
LONE = _asked(1, "colour", "f", (0,))
ALL = [COUNT, COLOUR, PLACE, SAME, ABSENT, LONE]


class _Tokenizer:
    """Three tokens to a message, as far as counting goes."""

    def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
        return " ".join(["m"] * len(messages))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, IMAGE_ID, *[2] * (3 * text.count("m"))]}


# ---- questions ------------------------------------------------------------------------------------


def test_others_speak_of_what_the_first_question_did_not() -> None:
    assert [each for each in ALL[:5] if asks_for_other(COLOUR, each)] == [COUNT, PLACE, ABSENT]
    held = talks(ALL)
    # A count is no first question, nor is one on an absent thing; picture 1 has nothing else to ask for.
    assert [talk.first for talk in held] == [COLOUR, PLACE, SAME]
    assert held[1].others == (COUNT, COLOUR, SAME, ABSENT)


def test_later_turns_are_of_other_tasks_where_there_are_such() -> None:
    (talk, *_) = talks([COLOUR, _asked(0, "colour", "g", (1,)), _asked(0, "colour", "h", (3,)), COUNT])
    assert [turn.text for turn in talk.turns(_Tokenizer())] == ["a", "d", "g"]
    (talk, *_) = talks([COLOUR, COUNT])
    assert [turn.text for turn in talk.turns(_Tokenizer())] == ["a", "d"]


def test_turns_are_the_chat_so_far(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    first, second, third = held_out(tmp_path, 1)[1][:3]
    assert after(first, [], tokenizer) == first
    turn = after(third, [first, second], tokenizer)
    text = (
        f"USER: <image>\n{first.text} ASSISTANT: {first.answer}</s>"
        f"USER: {second.text} ASSISTANT: {second.answer}</s>USER: {third.text} ASSISTANT:"
    )
    assert [*turn.before, IMAGE_ID, *turn.after] == tokenizer(text)["input_ids"]
    whole = tokenizer(f"{text} {third.answer}</s>")["input_ids"]
    assert len(whole) - len(turn.before) - 1 - len(turn.after) == turn.longest
    roles = [message["role"] for message in turn.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    parts = [[part["type"] for part in message["content"]] for message in turn.messages[::2]]
    assert parts == [["image", "text"], ["text"], ["text"]]


def test_who_ranks() -> None:
    questions = Questions.of(talks(ALL), _Tokenizer())
    firsts, count = [COLOUR, PLACE, SAME], len(questions.later)
    assert questions.first == firsts and count == 3 + 4 + 3
    assert questions.pairs(PROMPT_END) == [(each, each) for each in [*firsts, *questions.later]]
    ranked = questions.pairs(TURN_END)
    assert ranked[:3] == [(each, each) for each in firsts]
    assert [ranker for ranker, _ in ranked[3:]] == [COLOUR] * 3 + [PLACE] * 4 + [SAME] * 3
    assert [asked for _, asked in ranked[3:]] == questions.later


# ---- what is served -------------------------------------------------------------------------------


class _Servers:
    """What stands in for a setup: two settings, and servers that answer with what they are asked for."""

    section = {"assistant_header": [7]}
    settings = [
        Setting(FULL, "all patches"),
        Setting(MERGED, "low", (0.5,)),
        Setting(PRUNED, "R = 0.5", None, 0.5),
        Setting(PRUNED, "R = 0.9", None, 0.9),
    ]

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.ranking: dict[str, Any] = {}

    def server(self, ranking: dict[str, Any]) -> Self:
        self.ranking = ranking
        return self

    def answers(self, level: str, asked: list[Asked]) -> Found:
        self.asked.append((self.ranking["fastv_rank"], level))
        return [f"{level} {question.text}" for question in asked], 576.0, 288.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ranking = {}


def test_what_is_served_is_asked_of_one_server_for_each_rank(tmp_path: Path) -> None:
    servers: Any = _Servers()
    setup: Setup = servers
    full, merged, _, pruned = setup.settings
    assert ranks(full) == ranks(merged) == ("",) and ranks(pruned) == (PROMPT_END, TURN_END)
    questions = Questions.of(talks(ALL), _Tokenizer())
    file = tmp_path / "journal"
    found = speak(setup, questions, [0.9], Journal(file, "work"))
    assert servers.asked == [(PROMPT_END, FULL), (PROMPT_END, pruned.level), (TURN_END, pruned.level)]
    assert list(found) == [(full, ""), (pruned, PROMPT_END), (pruned, TURN_END)]
    assert found[full, ""] == [f"full {turn.text}" for turn in questions.spoken]
    # Cut off and begun again, nothing is asked twice.
    servers.asked.clear()
    assert speak(setup, questions, [0.9], Journal(file, "work")) == found and servers.asked == []


# ---- what is shown --------------------------------------------------------------------------------


def test_copies_of_a_token_share_their_mean_and_stay_together() -> None:
    rows = torch.tensor([[[0.0], [2.0], [5.0], [4.0]]])
    assert mean_over_copies(rows, torch.tensor([3, 0, 1, 3])).flatten().tolist() == [2, 2, 5, 2]
    owner = torch.tensor([1, 0, 1, 2])
    shown = Shown(torch.zeros(4, 1), torch.arange(4), 4, owner=owner)
    pruned = shown.pruned(torch.tensor([0.1, 0.6, 0.3]), 0.5)
    assert pruned.kept is not None and pruned.kept.tolist() == [0, 2, 3]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_the_first_question_keeps_what_the_reference_keeps_in_a_later_turn(llava: Path) -> None:
    """Importances, choice and answers of the offline model; merged tokens are unmerged virtually."""
    texts = ["What is in the image?", "Where is the dog?"]
    samples = list(make_images().values())
    layers = Reference(llava, {}).tower_layers
    hybrid: dict[str, Any] = {
        "thresholds": pick_thresholds(llava, samples, [0.3] * layers),
        "fastv_layer": 2,
        "fastv_ratio": 0.5,
    }
    reference = Reference(llava, hybrid)
    (image,) = decided_images(reference, 1, question=texts[0])
    model = OfflineModel(llava, 2)
    asked = [_of_prompt(reference, prompt(text)) for text in texts]
    show = unmerged(hybrid["thresholds"])
    shown = model.show(show, image, 0)
    found = model.importance(shown, asked)
    for importance, text in zip(found, texts, strict=True):
        (choice,) = reference.choices(reference.prompt_ids(prompt(text)), [image])
        torch.testing.assert_close(importance, choice.importance, atol=1e-6, rtol=1e-4)

    header = reference.tokenizer("ASSISTANT:")["input_ids"][1:]
    by_turn = Reference(llava, hybrid | {"fastv_rank": TURN_END, "assistant_header": header})
    later = reference.prompt_ids(conversation([(1, texts[0]), (0, texts[1])], "A dog."))
    (choice,) = by_turn.choices(later, [image])
    kept = shown.pruned(found[0], 0.5).kept
    assert kept is not None and sorted(set(shown.owners[kept].tolist())) == choice.kept

    answers, live, few = answer_ranked(model, show, 0.5, [image], [(asked[0], asked[0])])
    steps = reference.generate(reference.prompt_ids(prompt(texts[0])), [image], asked[0].longest)
    text = reference.tokenizer.decode([step.token for step in steps], skip_special_tokens=True).strip()
    assert answers[0].startswith(text) and (live, few) == (len(choice.importance), len(choice.kept))


def _of_prompt(reference: Reference, text: str) -> Asked:
    ids = reference.tokenizer(text)["input_ids"]
    at = ids.index(reference.config.image_token_index)
    return Asked(0, "colour", text, "", tuple(ids[:at]), tuple(ids[at + 1 :]), 4)


# ---- report ---------------------------------------------------------------------------------------


def _found() -> tuple[Questions, list[Answers]]:
    questions = Questions.of(talks([COLOUR, COUNT, PLACE]), _Tokenizer())
    first, later, spoken = (
        [each.answer for each in asked] for asked in (questions.first, questions.later, questions.spoken)
    )
    # The full model is right in all turns but one; the first question's choice loses the counts.
    lost = ["" if question.task == "count" else question.answer for question in questions.later]
    pruned = Setting(PRUNED, "R = 0.9", None, 0.9)
    both = Setting("both, R = 0.5", "low", (0.5,), 0.5)
    return questions, [
        Answers(Setting(FULL, "all patches"), "", 576.0, first, later, [*spoken[:-1], "?"]),
        Answers(pruned, PROMPT_END, 58.0, first, later, spoken),
        Answers(pruned, TURN_END, 58.0, first, lost, [first[0], *["?"] * (len(spoken) - 1)]),
        Answers(both, PROMPT_END, 47.0, first, later, None),
        Answers(both, TURN_END, 47.0, first, later, None),
    ]


def test_tables_compare_the_ranks_of_a_setting() -> None:
    questions, found = _found()
    lines = offline_table(questions, found).splitlines()
    assert len(lines) == 2 + 5 and len({each.count("|") for each in lines}) == 1
    assert "| later: headline (2) | colour (1) | place (1) | count (2) |" in lines[0]
    assert lines[2].endswith("| 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |  |  |  |")
    # Both questions stand for one picture, so the interval is none.
    assert lines[4].startswith("| pruned | R = 0.9 | 58 | turn_end | 100.0 | 100.0 | 100.0 | 100.0 | 0.0 |")
    assert lines[4].endswith("| +0.0 ± 0.0 | +0.0 ± 0.0 | -100.0 ± 0.0 |")
    assert "2 conversations about 1 pictures with 4 later questions (3 different ones)" in summary(
        questions, found, "float32"
    )


def test_turns_that_were_served_are_compared_where_the_full_model_is_right() -> None:
    questions, found = _found()
    lines = served_table(questions, found).splitlines()
    assert "| turn 1 (2) | turn 2 (2) | turn 3 (2) | later, full model right (3) |" in lines[0]
    assert len(lines) == 2 + 3
    assert lines[2].endswith("| 100.0 | 100.0 | 50.0 | 100.0 |  |")
    assert lines[4].endswith("| 50.0 | 0.0 | 0.0 | 0.0 | -100.0 ± 0.0 |")
    made = results(questions, found)
    assert (
        made[2]["turn_end_less_prompt_end"]["count and caption"] == (-1, 0) and "served_turns" not in made[3]
    )
    assert made[2]["served_turns"] == {1: 0.5, 2: 0, 3: 0} and made[2]["later"]["count"] == 0


def test_what_is_absent_may_be_left_out() -> None:
    questions = Questions.of(talks([COLOUR, PLACE, ABSENT]), _Tokenizer())
    right = [each.answer for each in questions.later]
    lost = ["" if not each.cells else each.answer for each in questions.later]
    setting = Setting(PRUNED, "R = 0.9", None, 0.9)
    found = [
        Answers(setting, rank, 58.0, [each.answer for each in questions.first], later, None)
        for rank, later in ((PROMPT_END, right), (TURN_END, lost))
    ]
    gains = results(questions, found)[1]["turn_end_less_prompt_end"]
    assert gains["headline"] == (-0.5, 0) and gains["headline, things that are there"] == (0, 0)
