"""What a row's picture is sent with."""

from __future__ import annotations

from string import ascii_uppercase

from vllm_hybrid.evaluation.tsv import Data, Row

# As VLMEvalKit asks for captions (vlmeval/dataset/image_caption.py), the space at the end included. LLaVA
# answers with a paragraph, which the metrics for captions of one sentence score near zero.
CAPTION = (
    "Please describe this image in general. Directly provide the description, "
    'do not include prefix like "This image depicts". '
)
# As LLaVA-1.5 was asked for captions in training (arXiv 2310.03744, TextCaps): it answers with one sentence.
SHORT_CAPTION = "Provide a one-sentence caption for the provided image."
# As LLaVA-1.5 was asked in training, and as VLMEvalKit asks.
QUESTION = "{question}\nAnswer the question using a single word or phrase."
CHOICE = "{question}\nAnswer with the option's letter from the given choices directly."


def choose_template(data: Data, prompt: str | None, short_caption: bool) -> str:
    """The template of all rows' prompts.

    Args:
        data: what is asked.
        prompt: the user's own; "{question}" in it stands for a row's question.
        short_caption: ask for a caption of one sentence.

    Raises:
        ValueError: they contradict each other, or the data.

    """
    if prompt is not None and short_caption:
        raise ValueError("--prompt and --short-caption exclude each other; give one of them")
    if short_caption and data.asks:
        raise ValueError(f"{data.file} asks questions of its own; --short-caption is for files without")
    if prompt is not None and data.asks and "{question}" not in prompt:
        raise ValueError(f"{data.file} asks questions of its own; put {{question}} where they go in --prompt")
    if prompt is not None and not data.asks and "{question}" in prompt:
        raise ValueError(f"{data.file} has no column question, which --prompt refers to")
    if prompt is not None:
        return prompt
    if data.asks:
        return CHOICE if _options(data.columns) else QUESTION
    return SHORT_CAPTION if short_caption else CAPTION


def prompt_of(row: Row, template: str) -> str:
    """The text that goes with a row's pictures: its hint, question and options in the template."""
    lines = [row.cells[name] for name in ("hint", "question") if name in row.cells]
    if _options(list(row.cells)):
        lines += [f"{letter}. {row.cells[letter]}" for letter in ascii_uppercase if letter in row.cells]
    return template.replace("{question}", "\n".join(lines))


def _options(columns: list[str]) -> bool:
    return {"A", "B"} <= set(columns)
