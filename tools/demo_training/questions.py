"""Questions on a scene whose answers follow from it, and cannot be guessed without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_hybrid.demo.scenes import COLOURS, DIGITS, KINDS, LETTERS, PLACES, SHAPES, Scene, Thing, kind_name

NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question, its only right answer and its task.

    Attributes:
        task: one of TASKS.
        text: the question.
        answer: the right answer.
        cells: where the things are that the question speaks of.
        described: characters of the text up to where it has said which things those are.

    """

    task: str
    text: str
    answer: str
    cells: tuple[int, ...] = ()
    described: int = 0


@dataclass(frozen=True)
class Description:
    """What a question calls things: "red", "circle", "red circle", "letter", "at the top left"."""

    colour: str | None = None
    kind: str | None = None
    cell: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether it describes the thing."""
        return (
            self.colour in (None, thing.colour)
            and self.cell in (None, thing.cell)
            and (self.kind is None or self.kind in (thing.kind, family(thing)))
        )

    def __str__(self) -> str:
        """The words, without an article."""
        noun = "object" if self.kind is None else kind_name(self.kind)
        words = noun if self.colour is None else f"{self.colour} {noun}"
        return words if self.cell is None else f"{words} {at(PLACES[self.cell])}"


def family(thing: Thing) -> str:
    """Shape, letter or digit."""
    if thing.kind in LETTERS:
        return "letter"
    return "digit" if thing.kind in DIGITS else "shape"


def at(place: str) -> str:
    """The place with its preposition."""
    return f"in the {place}" if place == "middle" else f"at the {place}"


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeo" else f"a {words}"


# Tasks and how often they are asked for.
_WEIGHTS = {
    "colour": 2.0,
    "shape": 2.0,
    "place": 2.5,
    "presence": 2.5,
    "glyph": 3.0,
    "count": 2.5,
    "caption": 0.5,
}
TASKS = tuple(_WEIGHTS)


def ask(scene: Scene, count: int, seed: list[int], tasks: tuple[str, ...] = TASKS) -> list[Question]:
    """Up to ``count`` different questions on a scene; a task that the scene has no question for is left out.

    Args:
        scene: what is asked about.
        count: questions at most.
        seed: any integers; the same ones ask the same questions.
        tasks: what to ask about.

    """
    rng = np.random.default_rng(seed)
    weights = np.array([_WEIGHTS[task] for task in tasks])
    asked: dict[str, Question] = {}
    for task in rng.choice(tasks, count * 2, p=weights / weights.sum()).tolist():
        question = _ASKERS[task](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


def _question(scene: Scene, task: str, text: str, of: Description, answer: str, words: str = "") -> Question:
    """A question with {} where ``words`` go, by default the description's own."""
    words = words or str(of)
    cells = tuple(thing.cell for thing in scene.things if of.fits(thing))
    return Question(task, text.format(words), answer, cells, text.index("{}") + len(words))


def _pick(rng: np.random.Generator, options: list[Description]) -> Description | None:
    return options[int(rng.integers(len(options)))] if options else None


def _only(scene: Scene, description: Description) -> bool:
    return sum(description.fits(thing) for thing in scene.things) == 1


def _thing(scene: Scene, rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> Thing | None:
    fitting = [thing for thing in scene.things if thing.kind in kinds]
    return fitting[int(rng.integers(len(fitting)))] if fitting else None


def _wording(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _thing(scene, rng)
    assert thing is not None
    options = [Description(kind=thing.kind), Description(cell=thing.cell), Description(kind=family(thing))]
    of = _pick(rng, [each for each in options if _only(scene, each)])
    text = _wording(rng, "What colour is the {}?", "What is the colour of the {}?", "What color is the {}?")
    return None if of is None else _question(scene, "colour", text, of, thing.colour)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _thing(scene, rng, SHAPES)
    if thing is None:
        return None
    options = [Description(colour=thing.colour), Description(cell=thing.cell)]
    of = _pick(rng, [each for each in options if _only(scene, each)])
    text = _wording(rng, "What shape is the {}?", "What is the shape of the {}?")
    return None if of is None else _question(scene, "shape", text, of, thing.kind)


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _thing(scene, rng)
    assert thing is not None
    options = [
        Description(kind=thing.kind),
        Description(colour=thing.colour),
        Description(thing.colour, thing.kind),
        Description(kind=family(thing)),
    ]
    of = _pick(rng, [each for each in options if _only(scene, each)])
    return None if of is None else _question(scene, "place", "Where is the {}?", of, thing.place)


def _glyph(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _thing(scene, rng, (*DIGITS, *LETTERS))
    if thing is None:
        return None
    kind = family(thing)
    if rng.random() < 0.4 and _only(scene, Description(kind=kind)):
        text = _wording(rng, "Which {} is in the picture?", "Read the {}.", "Which {} is it?")
        return _question(scene, "glyph", text, Description(kind=kind), thing.kind)
    of = Description(colour=thing.colour, kind=kind)
    if rng.random() < 0.5 and _only(scene, of):
        return _question(scene, "glyph", f"Which {kind} is {{}}?", of, thing.kind, thing.colour)
    text = _wording(rng, f"Which {kind} is {{}}?", "What is written {}?")
    return _question(scene, "glyph", text, Description(cell=thing.cell), thing.kind, at(thing.place))


def _presence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Yes and no are equally likely whatever the description's form is."""
    form = int(rng.integers(5))
    there = bool(rng.random() < 0.5)
    for _ in range(30):
        colour, kind = str(rng.choice(list(COLOURS))), str(rng.choice(_some_kind(rng)))
        # Half of what is absent is made of what is present: a red circle and a blue star, no blue circle.
        if rng.random() < 0.5 or there:
            thing, other = _thing(scene, rng), _thing(scene, rng)
            assert thing is not None and other is not None
            colour, kind = thing.colour, thing.kind if there else other.kind
        cell = int(rng.integers(len(PLACES)))
        description = (
            Description(colour=colour),
            Description(kind=kind),
            Description(colour, kind),
            Description(colour, kind),
            Description(cell=cell),
        )[form]
        if any(map(description.fits, scene.things)) == there:
            text = _wording(rng, "Is there {}?", "Is there {} in the picture?")
            answer = "Yes" if there else "No"
            return _question(scene, "presence", text, description, answer, _a(str(description)))
    return None


def _some_kind(rng: np.random.Generator) -> tuple[str, ...]:
    return SHAPES if rng.random() < 0.6 else (*DIGITS, *LETTERS)


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Of all things, or of one colour or kind; the larger counts are asked for more, as they are rarer."""
    colours = [Description(colour=c) for c in sorted({thing.colour for thing in scene.things})]
    kinds = sorted({t.kind for t in scene.things if t.kind in SHAPES} | {family(t) for t in scene.things})
    options = [Description(), *colours, *(Description(kind=kind) for kind in kinds)]
    counts = [sum(map(option.fits, scene.things)) for option in options]
    weights = np.array(counts, float) ** 2
    chosen = int(rng.choice(len(options), p=weights / weights.sum()))
    plural = "crosses" if options[chosen].kind == "cross" else "s"
    words = str(options[chosen])
    words = words.replace("cross", plural) if plural != "s" else words + plural
    text = _wording(rng, "How many {} are there?", "How many {} are in the picture?")
    return _question(scene, "count", text, options[chosen], NUMBERS[counts[chosen] - 1], words)


def _caption(scene: Scene, rng: np.random.Generator) -> Question | None:
    parts = [f"{_a(f'{t.colour} {t.name}')} {at(t.place)}" for t in scene.things]
    told = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    text = _wording(rng, "Describe the picture.", "What is in the picture?", "What do you see?")
    cells = tuple(thing.cell for thing in scene.things)
    return Question("caption", text, told[0].upper() + told[1:] + ".", cells, len(text))


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "presence": _presence,
    "glyph": _glyph,
    "count": _count,
    "caption": _caption,
}
