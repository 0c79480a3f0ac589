"""The files of a checkpoint that make a request into the model's inputs: tokenizer, image processor.

A server reads them through libraries that say little about a broken file. What can be known without
loading a model is said here.
"""

from __future__ import annotations

from pathlib import Path

from vllm_hybrid.errors import one_line
from vllm_hybrid.files import check_present, read_json_object

# Either of them makes a tokenizer; libraries take the first one that is there.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_SETTINGS = (
    "generation_config.json",
    PREPROCESSOR,
    PROCESSOR,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_TEMPLATE = "chat_template.jinja"


def check_processor_files(checkpoint: str | Path) -> None:
    """See that a checkpoint has a tokenizer and an image processor, and that their files are whole.

    Raises:
        ValueError: the first fault, in one sentence.
        OSError: a file cannot be opened.

    """
    folder = Path(checkpoint)
    for name in _SETTINGS:
        if _is_there(folder / name):
            read_json_object(folder / name)
    check_image_processor(folder)
    _check_tokenizer(folder)
    if _is_there(folder / _TEMPLATE):
        check_present(folder / _TEMPLATE)


def check_image_processor(checkpoint: str | Path) -> None:
    """See that a checkpoint says how pictures become pixel values.

    Raises:
        ValueError: it does not, or the file is broken.
        OSError: a file cannot be opened.

    """
    folder = Path(checkpoint)
    if _is_there(folder / PREPROCESSOR):
        read_json_object(folder / PREPROCESSOR)
        return
    if not _is_there(folder / PROCESSOR) or "image_processor" not in read_json_object(folder / PROCESSOR):
        raise ValueError(f"{folder} has no {PREPROCESSOR}; give a complete checkpoint")


def _check_tokenizer(folder: Path) -> None:
    there = [name for name in TOKENIZERS if _is_there(folder / name)]
    if not there:
        raise ValueError(f"{folder} has no tokenizer ({' or '.join(TOKENIZERS)}); give a complete checkpoint")
    file = folder / there[0]
    check_present(file)
    try:
        _load_tokenizer(file)
    except Exception as error:  # the libraries raise nothing more specific
        raise ValueError(
            f"{file} cannot be read as a tokenizer ({one_line(error)}); fetch it again"
        ) from error


def _load_tokenizer(file: Path) -> None:
    if file.suffix == ".json":
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(file))
        return
    from sentencepiece import SentencePieceProcessor

    SentencePieceProcessor(model_file=str(file))


def _is_there(file: Path) -> bool:
    """Whether there is such a file, or a link that was meant to lead to one."""
    return file.is_file() or file.is_symlink()
