"""The demo model's tokenizer: a sentencepiece BPE with byte fallback, as Llama has, for our own sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_hybrid.checkpoint.writing import IMAGE_TOKEN, write_json

PIECES = 1024
BOS, EOS = 1, 2
PAD_TOKEN = "<pad>"
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
