"""The demo checkpoint: transformers loads it offline; its thresholds tell plain pictures from busy ones."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from benchmarks.calibration import UNSEEN_SERIES, rank_correlation, unseen_counts
from tools.demo_training.tokenizer import sentences
from tools.demo_training.tower_stage import HELD_OUT, TRAIN
from vllm_hybrid.checkpoint.assistant_header import find_assistant_header
from vllm_hybrid.checkpoint.llava import load_config, load_tower, merging_layers
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.demo.model import (
    CALIBRATION_SERIES,
    LEVELS,
    SHIPPED_SCENES,
    SHIPPED_SERIES,
    config,
    random_weights,
    write_demo_model,
)
from vllm_hybrid.demo.pictures import KINDS, pictures, write_pictures
from vllm_hybrid.tools.calibrate import live_counts
from vllm_hybrid.tools.folders import complete_folder


@pytest.fixture(scope="module")
def processor(demo_checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> Any:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        demo_checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


# ---- files ----------------------------------------------------------------------------------------


def test_files(demo_checkpoint: Path) -> None:
    names = {file.name for file in demo_checkpoint.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "pictures",
    }
    scenes = {f"scene-{number}" for number in range(SHIPPED_SCENES)}
    assert {f.stem for f in (demo_checkpoint / "pictures").iterdir()} == set(KINDS) | scenes
    assert (demo_checkpoint / "model.safetensors").stat().st_size < 20e6
    assert not list(demo_checkpoint.parent.glob(".*"))


def test_files_can_be_read_by_others(demo_checkpoint: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for file in demo_checkpoint.iterdir():
        wanted = 0o777 if file.is_dir() else 0o666
        assert stat.S_IMODE(file.stat().st_mode) == wanted & ~umask or file.is_dir(), file


def test_config(demo_checkpoint: Path) -> None:
    loaded = AutoConfig.from_pretrained(demo_checkpoint)
    assert loaded.architectures == ["LlavaHybridForConditionalGeneration"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.image_token_id == 1024 and loaded.text_config.max_position_embeddings == 4096
    hybrid = HybridConfig.parse(loaded.hybrid, vision_layers=5, decoder_layers=8)
    assert hybrid.levels.names == (*LEVELS, "full") and hybrid.levels.default.name == "mid"
    for name in LEVELS:
        level = hybrid.levels.of_detail(name)
        assert level.name == name and level.merges and level.fastv_ratio == 0.5
    assert loaded.hybrid["assistant_header"] == find_assistant_header(demo_checkpoint)
    assert merging_layers(load_config(demo_checkpoint)) == 5


def test_weights_are_seeded() -> None:
    first, again, other = random_weights(0), random_weights(0), random_weights(1)
    assert first.keys() == other.keys() and len(first) == 182
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    prefixes = {name.split(".")[0] for name in first}
    assert prefixes == {"language_model", "vision_tower", "multi_modal_projector"}


# ---- tokenizer and prompts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*sentences(5), "Ünïcode → 漢字 and\nnew line,  two spaces", "1234567890", "x"]
)
def test_tokenizer_is_sentencepiece(demo_checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(demo_checkpoint / "tokenizer.model"))
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *pieces.encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens(demo_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    names = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 1024, 1025]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 1025)
    assert len(tokenizer) == 1026 <= config(None)["text_config"]["vocab_size"]
    # Words of its own sentences are few tokens: the pieces were learned, not only bytes.
    assert len(tokenizer("What is the colour of the circle?")["input_ids"]) < 12


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_chat_template(processor: Any, kind: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}, {"type": kind}, {"type": kind}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        {"role": "user", "content": "Why?"},
    ]
    prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "Be brief. USER: <image>\n<image>\nWhich? ASSISTANT: This.</s>USER: Why? ASSISTANT:"


def test_processor_counts_patches(processor: Any) -> None:
    text = "USER: <image>\nWhat? ASSISTANT:"
    inputs = processor(images=pictures()["sky"], text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert int((inputs["input_ids"] == 1024).sum()) == 576
    assert inputs["input_ids"][0, 0] == 1


# ---- model ----------------------------------------------------------------------------------------


def test_answers_depend_on_the_picture_and_are_text(model: Any, processor: Any) -> None:
    text = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    logits = []
    for name in ("wall", "page"):
        inputs = processor(images=pictures()[name], text=text, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1].log_softmax(-1))
        # Only words and the end can be the answer's next token.
        assert int(logits[-1].argmax()) in {2, *range(259, 1024)}
    assert (logits[0] - logits[1]).abs().max() > 0.5


def test_tower_alone_equals_the_models(demo_checkpoint: Path, model: Any) -> None:
    tower, image_processor = load_tower(demo_checkpoint)
    pixels = image_processor(images=[pictures()["crowd"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        alone = tower(pixels, output_hidden_states=True).hidden_states[-2]
        whole = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(alone, whole)


def test_plain_pictures_keep_fewer_tokens(demo_checkpoint: Path) -> None:
    tower, image_processor = load_tower(demo_checkpoint)
    files = sorted((demo_checkpoint / "pictures").iterdir())
    levels = json.loads((demo_checkpoint / "config.json").read_text())["hybrid"]["levels"]
    stems = [file.stem for file in files]
    live = {
        name: dict(zip(stems, live_counts(tower, image_processor, files, level["thresholds"]), strict=True))
        for name, level in levels.items()
    }
    for level in ("low", "mid"):
        plain = max(live[level][name] for name in ("wall", "sky", "shapes"))
        busy = min(live[level][name] for name in ("crowd", "page", "noise"))
        assert plain < 0.7 * busy, live[level]
    for name in KINDS:
        assert live["low"][name] <= live["mid"][name] <= live["high"][name]


def test_levels_meet_their_averages_on_pictures_not_seen(demo_checkpoint: Path) -> None:
    assert UNSEEN_SERIES not in (TRAIN, HELD_OUT, CALIBRATION_SERIES, SHIPPED_SERIES)
    counts, busy = unseen_counts(demo_checkpoint, 96)
    for level, live in counts.items():
        assert sum(live) / len(live) == pytest.approx(LEVELS[level], rel=0.1), level
        assert rank_correlation(busy, live) > 0.3, level


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 9.0], [3, 4, 5]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 9.0], [5, 4, 3]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([0.0, 1.0, 1.0, 2.0], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)


# ---- pictures and folders -------------------------------------------------------------------------


def test_pictures_are_deterministic(tmp_path: Path) -> None:
    first, again, other = pictures(0), pictures(0), pictures(1)
    assert list(first) == list(KINDS)
    assert all(first[name].tobytes() == again[name].tobytes() for name in KINDS)
    assert not any(first[name].tobytes() == other[name].tobytes() for name in KINDS)
    files = write_pictures(tmp_path / "new" / "folder", 2)
    assert len(files) == len(set(files)) == 2 * len(KINDS)
    with Image.open(files[1]) as picture:
        assert picture.mode == "RGB" and picture.tobytes() == first["gradient"].tobytes()


def test_no_folder_is_left_after_a_failure(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        write_demo_model(tmp_path / "out", weights=fail)
    assert not list(tmp_path.iterdir())


def test_taken_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    cases = {
        ("full", False): "exists and is not empty; give another folder, or --force",
        ("full", True): "holds no checkpoint",
        ("full/thesis.txt", True): "is a file",
        ("link", True): "is a symbolic link",
    }
    for (name, force), message in cases.items():
        with pytest.raises(ValueError, match=message):
            write_demo_model(tmp_path / name, force=force)
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["full", "link", "thesis.txt"]


def test_empty_and_forced_places(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for force in (False, True):
        with complete_folder(out, force) as folder:
            (folder / "config.json").write_text(str(force))
        assert (out / "config.json").read_text() == str(force)
    with pytest.raises(ZeroDivisionError), complete_folder(out, force=True):
        1 / 0  # noqa: B018
    assert (out / "config.json").read_text() == "True"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
