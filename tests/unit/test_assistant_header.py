"""What a chat template puts before an answer: found, refused, and written by prepare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from tests.support.tiny_checkpoints import write_checkpoint
from vllm_hybrid.checkpoint.assistant_header import assistant_header_of, find_assistant_header
from vllm_hybrid.checkpoint.writing import write_processor
from vllm_hybrid.demo.tokenizer import write_tokenizer
from vllm_hybrid.tools.prepare import prepare
from vllm_hybrid.tools.progress import Notice

# As the hub's llava-1.5-7b-hf has it: contents are parts, and an answer ends with a space.
LLAVA = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% if message['role'] != 'assistant' %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ part['text'] + ' ' }}{% endfor %}\
{% else %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# As Llama 3 has it; contents are text.
LLAMA_3 = """\
{% for message in messages %}\
{{ '<|' + message['role'] + '|>\\n\\n' + message['content'].strip() + '<|end|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n\\n' }}{% endif %}"""
# As Llama 2 has it: nothing stands before an answer.
LLAMA_2 = """\
{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"""
# The space at the header's end is one token with the answer that follows it.
OPEN_END = LLAVA.replace("'ASSISTANT:'", "'ASSISTANT: '")
# A header that is another one behind a question mark.
FICKLE = """\
{% for message in messages %}{{ message['content'] + ' ' }}\
{% if message['role'] == 'user' and (add_generation_prompt or not loop.last) %}\
{{ 'yes:' if '?' in message['content'] else 'so:' }}{% endif %}{% endfor %}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model's tokenizer and processor."""
    write_tokenizer(tmp_path)
    write_processor(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("plain") / "llava", architecture="LlavaForConditionalGeneration"
    )


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


def pieces(folder: Path, ids: list[int]) -> list[str]:
    return AutoProcessor.from_pretrained(folder).tokenizer.convert_ids_to_tokens(ids)


def written(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["hybrid"].get("assistant_header")


# ---- found ----------------------------------------------------------------------------------------


def test_header_of_the_demo_model(folder: Path) -> None:
    assert pieces(folder, find_assistant_header(folder)) == ["▁ASSISTANT", ":"]


def test_header_of_the_hubs_template(folder: Path) -> None:
    own = find_assistant_header(folder)
    assert find_assistant_header(with_template(folder, LLAVA)) == own


def test_header_is_where_a_conversation_has_it(folder: Path) -> None:
    header = find_assistant_header(with_template(folder, LLAVA))
    said: list[dict[str, Any]] = []
    for role in ("user", "assistant") * 3:
        said.append({"role": role, "content": [{"type": "text", "text": "the red circle"}]})
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer(processor.apply_chat_template(said), add_special_tokens=False)["input_ids"]
    ends = [i for i in range(len(ids)) if ids[: i + 1][-len(header) :] == header]
    answer = processor.tokenizer("the", add_special_tokens=False)["input_ids"]
    assert len(ends) == 3 and all(ids[end + 1 : end + 2] == answer for end in ends)


def test_header_of_a_template_for_text(folder: Path) -> None:
    found = pieces(folder, find_assistant_header(with_template(folder, LLAMA_3)))
    assert "".join(found) == "<0x3C><0x7C>assistant<0x7C><0x3E><0x0A><0x0A>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LLAMA_2, "puts nothing before an answer"),
        (OPEN_END, "other tokens before an answer that was given"),
        ("{{ raise_exception('No.') }}", r"cannot write a question and its answer \(No\.\)"),
        ("Hello.", r"cannot write a question and its answer \(it leaves out what is said\)"),
        ("{% if %}", "cannot write a question and its answer"),
    ],
)
def test_templates_without_a_header(folder: Path, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        find_assistant_header(with_template(folder, template))
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_header_that_depends_on_the_question(folder: Path) -> None:
    with pytest.raises(ValueError, match="behind one question and"):
        find_assistant_header(with_template(folder, FICKLE))


def test_no_template_and_no_processor(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="cannot write a question and its answer"):
        find_assistant_header(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"the processor of .* cannot be loaded"):
        find_assistant_header(folder)


@pytest.mark.parametrize("text", ["ASSISTANT:", " ASSISTANT:", "Answer:\n"])
def test_header_of_a_text(folder: Path, text: str) -> None:
    header = assistant_header_of(folder, text)
    if "ASSISTANT" in text:
        assert header == find_assistant_header(folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    prompt = tokenizer("USER: Which one is red? " + text.strip(" "), add_special_tokens=False)["input_ids"]
    assert prompt[-len(header) :] == header and tokenizer.decode(header).strip(" ") == text.strip(" ")


@pytest.mark.parametrize("text", ["", "  "])
def test_text_without_a_token(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match="holds no token; give the text"):
        assistant_header_of(folder, text)


# ---- prepared -------------------------------------------------------------------------------------


def test_prepare_writes_the_header(plain: Path, tmp_path: Path) -> None:
    hybrid = prepare(plain, tmp_path / "out")
    header = find_assistant_header(plain)
    assert written(tmp_path / "out") == header and hybrid.assistant_header == tuple(header)


def test_prepare_keeps_a_header_unless_told_otherwise(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hybrid": {"assistant_header": [7, 8]}}))
    prepare(source, tmp_path / "kept")
    assert written(tmp_path / "kept") == [7, 8]
    prepare(source, tmp_path / "told", assistant_header="answer:")
    assert written(tmp_path / "told") == assistant_header_of(plain, "answer:")
    (source / "config.json").write_text(json.dumps(config | {"hybrid": {"assistant_header": [-1]}}))
    with pytest.raises(ValueError, match=r"hybrid\.assistant_header\[0\] is -1"):
        prepare(source, tmp_path / "wrong")


def test_prepare_says_why_there_is_no_header(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    with_template(source, LLAMA_2)
    with pytest.warns(Notice, match=r"^left out hybrid\.assistant_header: the chat template") as told:
        prepare(source, tmp_path / "out")
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert "assistant_header" not in json.loads((tmp_path / "out" / "config.json").read_text())["hybrid"]
    prepare(source, tmp_path / "told", assistant_header="ASSISTANT:")
    assert written(tmp_path / "told")
