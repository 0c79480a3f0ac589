"""The tokenizer's training, on sentences about pictures: python -m tools.demo_training.tokenizer FILE."""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path

from vllm_hybrid.demo.pictures import WORDS
from vllm_hybrid.demo.tokenizer import BOS, EOS, PIECES

_PATTERNS = (
    "What is the colour of the {shape}? The {shape} is {colour}.",
    "How many {shape}s are in the picture? There are {number} {shape}s.",
    "Where is the {colour} {shape}? It is {place} of the {other} {shape}.",
    "Is there a {colour} {shape} in the image? {answer}, there is.",
    "Describe the picture in one sentence. The image shows a {colour} {shape} and a {other} one beside it.",
    "USER: Read the text on the page. ASSISTANT: It says {word} {word2} {word3}.",
    "The {word} stands {place} of the {word2}, and behind it lies a {colour} {word3}.",
    "Compare both pictures: the first one has {number} objects, the second one is much {brightness}.",
    "Please answer with a single word or phrase: {colour}, {shape} or {word}!",
    "I can see {number} people walking along the {word} near the {word2}.",
    'Which word is written in the {place} corner? "{word}" (in {colour} letters).',
    "Numbers such as {digits} or {digits2} can be read; nothing else is visible.",
    "It looks like a {brightness} morning: the {word} is {colour}, so it doesn't rain any more.",
    "A photo of a {word2} in the {word}, taken from the {place}; its background isn't {colour}.",
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "rectangle", "line"),
    "colour": ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "grey", "brown"),
    "place": ("left", "right", "top", "bottom", "in front", "upper left", "lower right", "middle"),
    "number": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "answer": ("Yes", "No", "Perhaps"),
    "brightness": ("brighter", "darker", "larger", "smaller", "clearer", "busier"),
    "word": WORDS,
}
_ALIASES = {"other": "colour", "word2": "word", "word3": "word"}


def sentences(count: int = 6000, seed: int = 0) -> list[str]:
    """Questions and answers about pictures, made from patterns; the same ones for the same seed."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        words = {name: draw.choice(choices) for name, choices in _CHOICES.items()}
        words |= {name: draw.choice(_CHOICES[kind]) for name, kind in _ALIASES.items()}
        words |= {"digits": str(draw.randrange(1000)), "digits2": str(draw.randrange(10**5))}
        made.append(_PATTERNS[number % len(_PATTERNS)].format(**words))
    return made


def train() -> bytes:
    """Train a sentencepiece model as the one that ships was; returns its file's content.

    Another version of sentencepiece may choose other pieces, which the trained weights would not know.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_bytes(train())


if __name__ == "__main__":
    main()
