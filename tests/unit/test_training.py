"""Training: pictures, questions and prompts are right, and the packed model is the served one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tools.demo_training.alignment import Words, alignment, shown_patches
from tools.demo_training.batches import dense_batch
from tools.demo_training.curriculum import Student
from tools.demo_training.dense_labels import BACKGROUND, dense_labels
from tools.demo_training.language_stage import Asking, LanguageLesson
from tools.demo_training.lessons import Lesson, Pace
from tools.demo_training.network import TowerFeatures, hub_weights, new_model, normalised
from tools.demo_training.optimizer import Optimizer, rate_at
from tools.demo_training.packed_decoder import PackedDecoder
from tools.demo_training.prompts import NO_LOSS, Prompts, chat
from tools.demo_training.questions import TASKS, Question, ask
from tools.demo_training.run import Run
from tools.demo_training.state import StateFolder
from tools.demo_training.team import Team
from tools.demo_training.tower_stage import TowerLesson
from vllm_hybrid.demo.model import config, random_weights
from vllm_hybrid.demo.scenes import COLOURS, KINDS, Scene, Thing, draw_scene


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of small operations wait for each other longer than they work where others need the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model(0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(tmp_path_factory.mktemp("tokenizer"))


# ---- scenes and questions -------------------------------------------------------------------------


def test_scenes_are_seeded_and_things_keep_to_their_cells() -> None:
    for number in range(30):
        scene, again = draw_scene([3, number]), draw_scene([3, number])
        assert np.array_equal(scene.pixels, again.pixels) and scene.things == again.things
        assert scene.pixels.shape == (336, 336, 3) and scene.pixels.dtype == np.uint8
        assert 1 <= len(scene.things) <= 4
        assert len({thing.cell for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert left // 112 == (right - 1) // 112 == thing.cell % 3
            assert top // 112 == (bottom - 1) // 112 == thing.cell // 3
    assert not np.array_equal(draw_scene([3, 0]).pixels, draw_scene([4, 0]).pixels)


def test_dense_labels_cover_the_boxes() -> None:
    scene = draw_scene([5, 1])
    labels = dense_labels(scene)
    assert labels.kind.shape == (24, 24)
    assert labels.centre.sum() == len(scene.things)
    for thing in scene.things:
        row, column = ((thing.box[i] + thing.box[i + 2]) // 2 // 14 for i in (1, 0))
        assert KINDS[labels.kind[row, column] - 1] == thing.kind and labels.cell[row, column] == thing.cell
    assert (labels.kind == BACKGROUND).sum() > 576 // 2


def test_answers_are_true() -> None:
    red, blue = Thing("circle", "red", 0, (5, 5, 90, 90)), Thing("A", "blue", 4, (120, 120, 200, 200))
    other = Thing("circle", "blue", 8, (230, 230, 300, 300))
    scene = Scene(np.zeros((336, 336, 3), np.uint8), (red, blue, other))
    answers = {q.text: q.answer for seed in range(40) for q in ask(scene, 20, [seed])}
    assert answers["How many circles are there?"] == "two"
    assert answers["How many objects are there?"] == "three"
    assert answers["How many blue objects are there?"] == "two"
    assert answers["Where is the red circle?"] == "top left"
    assert answers["Where is the letter A?"] == "middle"
    assert answers["What is written in the middle?"] == "A"
    assert answers["Is there a blue circle?"] == "Yes"
    assert answers["What shape is the red object?"] == "circle"
    caption = (
        "A red circle at the top left, a blue letter A in the middle and a blue circle at the bottom right."
    )
    assert answers["Describe the picture."] == caption
    # Neither has one answer.
    assert "What colour is the circle?" not in answers and "Where is the blue object?" not in answers


def test_answers_cannot_be_guessed() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(300):
        scene = draw_scene([6, number], side=48)
        for question in ask(scene, 12, [number]):
            answers[question.task][question.answer] += 1
    likeliest = {task: count.most_common(1)[0][1] / count.total() for task, count in answers.items()}
    assert set(likeliest) == set(TASKS)
    assert max(likeliest[task] for task in ("colour", "shape", "place", "glyph")) < 0.3
    assert likeliest["presence"] < 0.56 and likeliest["count"] < 0.5


# ---- prompts --------------------------------------------------------------------------------------


def test_prompts_are_the_served_ones(demo_checkpoint: Path, prompts: Prompts) -> None:
    processor = AutoProcessor.from_pretrained(demo_checkpoint)
    text = processor.tokenizer.apply_chat_template(
        chat("Read the digit."), tokenize=False, add_generation_prompt=True
    )
    assert text == "USER: <image>\nRead the digit. ASSISTANT:"
    picture = Image.fromarray(draw_scene([1]).pixels)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    served = inputs["input_ids"][0].tolist()
    block = prompts.block("Read the digit.", "7")
    assert [*prompts.head, *[1024] * 576, *block.ids[: block.answer]] == served
    assert processor.tokenizer.decode(block.ids[block.answer :]) == "7</s>"
    expected = normalised(torch.from_numpy(np.array(picture))[None])
    assert torch.allclose(inputs["pixel_values"], expected, atol=1e-5)


@pytest.mark.parametrize("bare", [False, True], ids=["with <s>", "without"])
def test_packed_questions_equal_single_ones(model: Any, prompts: Prompts, bare: bool) -> None:
    head = prompts.head[bare:]
    questions = [
        Question("colour", "What colour is the circle?", "red"),
        Question("count", "How many?", "two"),
    ]
    scene = draw_scene([2])
    pixels = normalised(torch.from_numpy(scene.pixels)[None])
    batch = prompts.pack([questions], 48) | {"side": torch.tensor(1), "bare": torch.tensor(bare)}
    with torch.no_grad():
        features = TowerFeatures(model)(pixels)[:, 1:]
        logits, targets, _ = PackedDecoder(model, prompts.head)(features, batch)
        model.model.language_model.config._attn_implementation = "sdpa"
        alone = []
        for question in questions:
            block = prompts.block(question.text, question.answer)
            ids = torch.tensor([[*head, *[1024] * 576, *block.ids]])
            whole = model(input_ids=ids, pixel_values=pixels).logits[0]
            start = len(head) + 576 + block.answer
            alone.append(whole[start - 1 : -1])
    assert torch.allclose(logits, torch.cat(alone), atol=1e-4)
    blocks = [prompts.block(q.text, q.answer, q.described) for q in questions]
    assert targets.tolist() == [i for block in blocks for i in block.ids[block.answer :]]


def test_what_does_not_fit_is_left_out(prompts: Prompts) -> None:
    questions = [
        Question("caption", "Describe the picture.", "A red circle at the top left."),
        Question("count", "How?", "two"),
    ]
    size = len(prompts.block("How?", "two", 0).ids) - 1
    batch = prompts.pack([questions], size)
    assert batch["blocks"].tolist() == [[1] * size]
    assert int((batch["targets"] != NO_LOSS).sum()) == 2


def test_a_question_knows_where_its_things_are_from_the_last_word_that_describes_them(
    prompts: Prompts,
) -> None:
    scene = draw_scene([9, 0])
    for question in ask(scene, 30, [9, 1]):
        assert question.cells or question.answer == "No", question
        assert {thing.cell for thing in scene.things} >= set(question.cells)
        batch = prompts.pack([[question]], 64)
        block = prompts.block(question.text, question.answer, question.described)
        knows = batch["described"][0].nonzero().flatten().tolist()
        assert knows == list(range(block.described, block.answer))
        assert batch["cells"][0, knows[0]].nonzero().flatten().tolist() == sorted(question.cells)
    where = Question("place", "Where is the red star?", "left", (3,), len("Where is the red star"))
    block = prompts.block(where.text, where.answer, where.described)
    text = prompts._tokenizer.decode(block.ids[: block.described + 1])
    assert text.endswith("red star")


def test_alignment_names_patches_by_their_words(prompts: Prompts) -> None:
    words = Words(prompts)
    assert len({*words.kinds.tolist(), *words.colours.tolist()}) == len(KINDS) + len(COLOURS)
    scene = Scene(np.zeros((336, 336, 3), np.uint8), (Thing("star", "blue", 4, (112, 112, 224, 224)),))
    batch = dense_batch([scene, scene])
    shown = shown_patches(batch)
    assert len(shown) == 2 * 8 * 8 and (batch["kind"].flatten(1)[shown[:, 0], shown[:, 1]] > 0).all()
    embeddings = torch.randn(1088, 256)
    named = (
        embeddings[words.kinds[KINDS.index("star")]] + embeddings[words.colours[list(COLOURS).index("blue")]]
    )
    right = alignment(named.expand(len(shown), -1), shown, batch, words, embeddings)
    wrong = alignment(-named.expand(len(shown), -1), shown, batch, words, embeddings)
    assert float(right) < 0.5 < 5 < float(wrong)


# ---- training -------------------------------------------------------------------------------------


def test_weights_have_the_hubs_names_and_shapes(model: Any) -> None:
    made, wanted = hub_weights(model), random_weights(0)
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in wanted.items()}
    assert config(None)["vision_feature_layer"] == -2


def test_the_tower_learns_and_a_window_is_a_window(model: Any) -> None:
    student = Student(0)
    lesson = TowerLesson("small", student.model, student.heads, Pace(20, 4e-3, 2), side=84, most=2)
    optimizer = Optimizer(lesson.parameters(), Team())
    batch, losses = lesson.batch([1, 2]), []
    for step in range(12):
        loss, _ = lesson.loss(batch)
        loss.backward()
        optimizer.step(rate_at(step, 100, 2e-3, warm_up=3))
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_questions_train_projector_and_decoder(prompts: Prompts) -> None:
    student = Student(0)
    asking = Asking(questions=4, tokens=64, averaged=1.0)
    lesson = LanguageLesson("ask", student.model, prompts, Pace(10, 1e-3, 1), asking, student.finder)
    loss, figures = lesson.loss(lesson.batch([1, 3]))
    loss.backward()
    model = student.model.model
    assert model.vision_tower.embeddings.patch_embedding.weight.grad is None
    trained = [parameter for _, parameter in lesson.parameters()]
    assert all(parameter.grad is not None for parameter in trained)
    of_the_lesson = {id(parameter) for parameter in trained}
    for part in (model.multi_modal_projector, model.language_model, student.model.lm_head, student.finder):
        assert {id(parameter) for parameter in part.parameters()} <= of_the_lesson
    assert figures["answer"] == pytest.approx(7, abs=1)


def test_rates_rise_stay_and_fall() -> None:
    rates = [rate_at(step, 1000, 2.0, warm_up=50, decay=0.4) for step in range(1000)]
    assert rates[0] == pytest.approx(0.04) and rates[100] == rates[599] == 2.0
    assert rates[800] == pytest.approx(1.0) and 0 < rates[-1] < 0.01


def _short_curriculum(student: Student, _: Prompts) -> list[Lesson]:
    pace = Pace(steps=2, rate=1e-3, pictures=1)
    return [TowerLesson(name, student.model, student.heads, pace, side=84, most=1) for name in ("a", "b")]


def test_training_goes_on_where_it_ended(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo_training.run.curriculum", _short_curriculum)
    whole, parts = StateFolder(tmp_path / "whole"), StateFolder(tmp_path / "parts")
    assert Run(whole, prompts, Team(), seed=3, minutes=1e9).finish()
    # Without any time, a run is one step long.
    done = [Run(parts, prompts, Team(), seed=3, minutes=-1).finish() for _ in range(5)]
    assert done == [False] * 4 + [True]
    states = [folder.load() for folder in (whole, parts)]
    assert states[0] is not None and states[1] is not None
    assert states[0]["stage"] == states[1]["stage"] == 2
    for name, weight in states[0]["student"]["model"].items():
        assert torch.equal(weight, states[1]["student"]["model"][name]), name
    assert "b 2 held out:" in (tmp_path / "parts" / "log.txt").read_text()
    assert not list(tmp_path.glob("*/*.partial"))
