"""One picture and one question through the server's own engine, at a level and at full, as a PNG."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_hybrid.checkpoint.image_processor import check_size, load_image_processor
from vllm_hybrid.checkpoint.llava import ARCHITECTURE, check_checkpoint, load_config, parse_hybrid
from vllm_hybrid.levels import FULL, REQUEST_LEVEL, Level
from vllm_hybrid.tools.pictures import to_rgb
from vllm_hybrid.tools.regions import enlarged, kept_regions, merged_regions, side_by_side


@dataclass
class Seen:
    """What an engine made of a picture.

    Attributes:
        answer: its answer.
        owner: int [patches], the live token that holds each patch; None where nothing was watched.
        kept: bool [live tokens], what FastV keeps for the question; None where nothing was watched.

    """

    answer: str
    owner: np.ndarray | None = None
    kept: np.ndarray | None = None


def show(
    checkpoint: str | Path,
    picture: Image.Image,
    question: str,
    level: str | None = None,
    tokens: int = 64,
    dtype: str = "auto",
) -> Image.Image:
    """Draw what a level merges and drops of a picture, with the answers at it and at the full level.

    One engine, in a process of its own, answers at both.

    Args:
        checkpoint: folder that ``vllm serve`` can serve.
        picture: any size and mode.
        question: what to ask.
        level: name of any level of the checkpoint's; left out: the default one.
        tokens: longest answer, in tokens.
        dtype: as ``vllm serve --dtype``.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: the checkpoint or the level reduces nothing, there is no such level, or the checkpoint
            cannot be served.

    """
    config = check_checkpoint(checkpoint)
    if not getattr(config, "hybrid", None):
        raise ValueError(
            f"{checkpoint} has no hybrid section, so there is nothing to show; make one with prepare"
        )
    picture = to_rgb(picture)
    # Before the engine starts, since not every picture can be processed.
    square = as_the_tower_sees(checkpoint, picture)
    shown = _level_to_show(checkpoint, config, level)
    reduced, full = _in_own_process(str(checkpoint), shown.name, picture, question, tokens, dtype)
    return draw(square, question, reduced, full)


def _level_to_show(checkpoint: str | Path, config: Any, name: str | None) -> Level:
    """The level of a name, or the default one.

    Raises:
        ValueError: there is none, or it reduces nothing.

    """
    if ARCHITECTURE not in (config.architectures or ()):
        raise ValueError(
            f"{checkpoint} has a hybrid section, but not the architecture {ARCHITECTURE}; make one with "
            "prepare"
        )
    hybrid = parse_hybrid(config.hybrid, config)
    if not hybrid.active:
        raise ValueError(
            f"the hybrid section of {checkpoint} switches nothing on, so there is nothing to show; make one "
            "with prepare"
        )
    level = hybrid.levels.default if name is None else hybrid.levels.asked(name, "--level")
    if not (level.merges or level.prunes):
        others = ", ".join(other.name for other in hybrid.levels if other.merges or other.prunes)
        raise ValueError(
            f"level {level.name} of {checkpoint} merges and drops nothing, so there is nothing to show; "
            f"choose with --level from {others}"
        )
    return level


def draw(picture: Image.Image, question: str, reduced: Seen, full: Seen) -> Image.Image:
    """The sheet: picture, merged regions, kept regions, and below them question and answers."""
    assert reduced.owner is not None and reduced.kept is not None
    live, kept, patches = len(reduced.kept), int(reduced.kept.sum()), len(reduced.owner)
    panels = {
        f"{patches} patches": enlarged(picture),
        f"{live} live tokens": merged_regions(picture, reduced.owner),
        f"{kept} kept for the question": kept_regions(picture, reduced.owner, reduced.kept),
    }
    return side_by_side(
        panels, [f"Question: {question}", f"Full: {full.answer}", f"Reduced: {reduced.answer}"]
    )


def as_the_tower_sees(checkpoint: str | Path, picture: Image.Image) -> Image.Image:
    """The picture after the checkpoint's own resizing, cropping and padding: RGB, a square.

    Raises:
        ValueError: the checkpoint has no configuration or image processor that can be used, or the picture
            is so narrow that this one cannot process it.

    """
    processor = load_image_processor(checkpoint, load_config(checkpoint).vision_config.image_size)
    check_size(picture.size, processor)
    pixels = processor(picture, return_tensors="np", do_normalize=False, do_rescale=False)["pixel_values"][0]
    return Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _in_own_process(*arguments: Any) -> tuple[Seen, Seen]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_ask, *arguments).result()


def _ask(
    checkpoint: str,
    level: str,
    picture: Image.Image,
    question: str,
    tokens: int,
    dtype: Any,
) -> tuple[Seen, Seen]:
    """Answer one question in this process, at a level and at the full one."""
    import os

    # The engine runs in this process, where the model can be watched.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": 1},
    )
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    llm.apply_model(lambda model: model.watch_choices(lambda *step: seen.append(_choice(*step))))
    message = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": question}]

    def answer(name: str) -> str:
        params = SamplingParams(temperature=0, max_tokens=tokens, extra_args={REQUEST_LEVEL: name})
        outputs = llm.chat([{"role": "user", "content": message}], params, use_tqdm=False)
        return outputs[0].outputs[0].text.strip()

    reduced = Seen(answer(level), *seen[0])
    return reduced, Seen(answer(FULL))


def _choice(images: Any, lower: Any, upper: Any) -> tuple[np.ndarray, np.ndarray]:
    """Owners and kept tokens of the only image of a step."""
    owner = images.owner[0].cpu().numpy()
    stands = (upper.row_of[images.patch_rows[0]] >= 0).cpu().numpy()
    kept = np.zeros(owner.max() + 1, dtype=bool)
    kept[owner[stands]] = True
    return owner, kept
