"""The demo model's tokenizer: a sentencepiece BPE with byte fallback, as Llama has, for our own sentences."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from .demo_pictures import WORDS

PIECES = 1024
BOS, EOS = 1, 2
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
IMAGE_ID, PAD_ID = PIECES, PIECES + 1
# Ids up to here are <unk>, <s>, </s> and one for every byte.
FIRST_PIECE = 3 + 256
CONTEXT = 4096

# What ships of the demo model: its weights, and the tokenizer that they were trained with.
EMBEDDED = Path(__file__).parent / "embedded"

# As LLaVA-1.5's prompts go: "USER: <image>\nquestion ASSISTANT: answer</s>USER: ...". Contents may be strings
# or lists of parts; a message's images stand before its text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{- message['role'] | upper + ': ' -}}{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}{{- '<image>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- eos_token if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

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


def write_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.model``, ``tokenizer.json``, its configuration and the chat template.

    <image> and <pad> follow the pieces, as in llava-1.5-7b-hf.
    """
    from transformers import AddedToken, LlamaTokenizer

    shutil.copyfile(EMBEDDED / "tokenizer.model", folder / "tokenizer.model")
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(names | settings))
    tokenizer = LlamaTokenizer.from_pretrained(str(folder))
    added = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, PAD_TOKEN)]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.save_pretrained(str(folder))
    # Written by hand, as the file's keys are the hub's contract with every reader of it.
    settings |= {
        "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "pad_token": PAD_TOKEN,
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
    }
    write_json(config, settings | names)
    write_json(
        folder / "special_tokens_map.json", names | {"pad_token": PAD_TOKEN, "image_token": IMAGE_TOKEN}
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(file: Path, content: object) -> None:
    """Write a value as readable JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n")
