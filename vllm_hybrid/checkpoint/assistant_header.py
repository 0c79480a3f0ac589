"""The assistant header of a checkpoint: token ids of what its chat template puts before an answer.

LLaVA-1.5's is "ASSISTANT:". How text becomes tokens depends on what stands before it, so the ids are taken
from whole prompts, never from the header's text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_hybrid.errors import one_line

# Two that end differently: a header whose first token depends on the question would not be found again.
_QUESTIONS = ("What is in this picture?", "Describe it in one word")
_ANSWER = "A red circle."


def find_assistant_header(checkpoint: str | Path) -> list[int]:
    """The token ids that the checkpoint's own chat template puts between a question and its answer.

    Args:
        checkpoint: its folder, with tokenizer, processor and template.

    Returns:
        At least one id.

    Raises:
        ValueError: there is no template, it puts nothing there, or other tokens in each place; one sentence
            says which.

    """
    chat = _Chat.load(checkpoint)
    first, second = (_header_behind(chat, question) for question in _QUESTIONS)
    if first != second:
        raise ValueError(
            f"the chat template of {checkpoint} begins an answer with tokens {first} behind one question and "
            f"{second} behind another; use a template that ends a question"
        )
    return first


def assistant_header_of(checkpoint: str | Path, text: str) -> list[int]:
    """The token ids of a header's text as it stands in a prompt, a space behind other text.

    Args:
        checkpoint: folder with the tokenizer.
        text: such as "ASSISTANT:"; spaces at its beginning do not count.

    Raises:
        ValueError: the tokenizer cannot be read, or makes no token of the text.

    """
    chat = _Chat.load(checkpoint)
    before = _QUESTIONS[0] + " "
    header = _rest(chat.ids(before), chat.ids(before + text.lstrip(" ")))
    if not header:
        raise ValueError(
            f"the assistant header {text!r} holds no token; give the text that the chat template puts before "
            "an answer"
        )
    return header


@dataclass
class _Chat:
    """How a checkpoint writes conversations.

    Attributes:
        checkpoint: its folder.
        tokenizer: transformers' tokenizer of it.
        template: its processor's chat template; None where only the tokenizer may have one.

    """

    checkpoint: str | Path
    tokenizer: Any
    template: str | None

    @classmethod
    def load(cls, checkpoint: str | Path) -> _Chat:
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(str(checkpoint), trust_remote_code=False)
            tokenizer = processor.tokenizer
        except Exception as error:  # Which one depends on what is wrong in which file.
            raise ValueError(
                f"the processor of {checkpoint} cannot be loaded ({one_line(error)}); repair its files"
            ) from error
        template = getattr(processor, "chat_template", None)
        # Named templates: vLLM, too, takes the default one.
        return cls(checkpoint, tokenizer, template.get("default") if isinstance(template, dict) else template)

    def ids(self, text: str) -> list[int]:
        """Tokens of a rendered prompt; it brings its own special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def render(self, messages: Sequence[dict[str, Any]], header: bool) -> str:
        """The prompt of a conversation, with the assistant's header at its end or without."""
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=header
        )


def _header_behind(chat: _Chat, question: str) -> list[int]:
    """What stands between a question about a picture and its answer, the same in prompt and conversation."""
    closed, opened, answered = map(chat.ids, _conversation(chat, question))
    header = _rest(closed, opened)
    if not header:
        raise ValueError(
            f"the chat template of {chat.checkpoint} puts nothing before an answer; use one with a "
            "generation prompt"
        )
    if answered[: len(opened)] != opened:
        raise ValueError(
            f"the chat template of {chat.checkpoint} has other tokens before an answer that was given than "
            "before one that is asked for; use one that has the same"
        )
    return header


def _conversation(chat: _Chat, question: str) -> tuple[str, str, str]:
    """A question without and with the header behind it, and with its answer.

    A template wants contents as parts, as LLaVA's do, or as text.
    """
    contents: tuple[Callable[[str, bool], Any], ...] = (_parts, _text)
    reason = "it leaves out what is said"
    for content in contents:
        user = {"role": "user", "content": content(question, True)}
        answer = {"role": "assistant", "content": content(_ANSWER, False)}
        try:
            made = chat.render([user], False), chat.render([user], True), chat.render([user, answer], False)
        except Exception as error:  # A template may raise anything.
            reason = one_line(error)
            continue
        if all(question in text for text in made) and _ANSWER in made[2]:
            return made
    raise ValueError(
        f"the chat template of {chat.checkpoint} cannot write a question and its answer ({reason}); use "
        "one that can"
    )


def _parts(text: str, picture: bool) -> list[dict[str, str]]:
    return [{"type": "image"}] * picture + [{"type": "text", "text": text}]


def _text(text: str, picture: bool) -> str:
    return "<image>\n" * picture + text


def _rest(shorter: Sequence[int], longer: Sequence[int]) -> list[int]:
    """The longer one's ids behind those that both begin with."""
    same = 0
    while same < min(len(shorter), len(longer)) and shorter[same] == longer[same]:
        same += 1
    return list(longer[same:])
