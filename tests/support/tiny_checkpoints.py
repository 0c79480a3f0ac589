"""Tiny LLaVA-1.5-shaped checkpoints, images and prompts for tests, made on the spot and the same every time.

The weights are random but scaled so that a test sees something: attention is peaky, the answer depends on the
image, similar patches have similar keys, and removing or merging image tokens moves log probabilities by far
more than rounding does. Image size, patch size and token count are LLaVA-1.5's own (336, 14, 576) unless
another size is asked for.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from tests.support.reference import Reference
from vllm_hybrid.checkpoint.writing import (
    LlavaShape,
    llava_config,
    write_json,
    write_processor,
    write_weights,
)

IMAGE_SIZE, PATCH_SIZE, PATCHES = 336, 14, 576
BOS, EOS, FIRST_PIECE = 1, 2, 3 + 256
ARCHITECTURE = "LlavaHybridForConditionalGeneration"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] if message['content'] is string else message['content'][0]['text'] -}}
  {%- else -%}
    {{- message['role'] | upper + ': ' -}}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
      {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
  {%- endif -%}
  {{- eos_token if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_TRAINING_TEXT = """\
What is in the image? The image shows a red circle beside a blue square on a grey wall.
How many shapes can you see in this picture? There are three triangles, two of them green.
Describe the picture in one sentence. A bright yellow star stands in the middle of a dark field.
What colour is the object on the left? The object on the left is purple, and the one on the right is orange.
Is there a person in the photo? No, there is only an empty street with parked cars and tall houses.
Where is the dog? The dog is lying under the table, close to the window, next to a small chair.
Which of the two images is brighter? The second image is much brighter than the first one.
Read the text on the sign. The sign says: open from 8 to 17, closed on Sundays and holidays!
What is the weather like? It looks like a cloudy morning; the ground is wet, so it has been raining.
Compare both pictures and explain what has changed between them. A lamp was moved to the other corner.
What would happen if the glass fell off the shelf? It would most likely break on the stone floor.
Answer with yes or no: does the picture contain a bicycle? Yes.
USER: Please give a short answer. ASSISTANT: Of course, here is a short answer.
Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 50 100 336 576 1000.
"""


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny checkpoint: the Llama decoder, then the CLIP tower (`vision_*`)."""

    layers: int = 8
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 256
    vision_layers: int = 4
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_intermediate: int = 128
    image_size: int = IMAGE_SIZE

    def llava(self, vocabulary: int) -> LlavaShape:
        """All sizes, with those that every tiny checkpoint has."""
        return LlavaShape(
            width=self.hidden,
            inside=self.intermediate,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_dim,
            vocabulary=vocabulary,
            context=4096,
            vision_width=self.vision_hidden,
            vision_inside=self.vision_intermediate,
            vision_layers=self.vision_layers,
            vision_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=PATCH_SIZE,
        )

    @property
    def tower_layers(self) -> int:
        """How many vision layers run for vision_feature_layer -2, so how many thresholds there are."""
        return self.vision_layers - 1


def write_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    hybrid: Mapping[str, Any] | None = None,
    names: Literal["old", "new"] = "old",
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    architecture: str = ARCHITECTURE,
    **shape: int,
) -> Path:
    """Write a random LLaVA-1.5 checkpoint with tokenizer and processor into `path` and return the path.

    hybrid: the config's "hybrid" section, left out for None. names: weight names as in the published
    llava-1.5-7b-hf ("old") or as in transformers from 4.52 on ("new"). shards: number of weight files; more
    than one come with an index. architecture: "LlavaForConditionalGeneration" makes a plain checkpoint.
    shape: fields of `Shape`. The same arguments always write the same weights; `names`, `shards` and `hybrid`
    do not change them.
    """
    path, sizes = Path(path), Shape(**shape)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    _write_tokenizer(path, tokenizer)
    write_processor(path, sizes.image_size, PATCH_SIZE)
    image_token = tokenizer.get_vocab()["<image>"]
    vocabulary = 64 * math.ceil(tokenizer.get_vocab_size() / 64)
    special_ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": image_token + 1}
    name_of_dtype = str(dtype).removeprefix("torch.")
    config = llava_config(sizes.llava(vocabulary), architecture, name_of_dtype, image_token, special_ids)
    if hybrid is not None:
        config["hybrid"] = dict(hybrid)
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", special_ids)
    weights = _random_weights(sizes, vocabulary, image_token, seed)
    write_weights(path, {_NAMES[names](name): tensor.to(dtype) for name, tensor in weights.items()}, shards)
    return path


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def _old_name(name: str) -> str:
    part, rest = name.split(".", 1)
    prefixes = {
        "decoder": "language_model.model.",
        "lm_head": "language_model.lm_head.",
        "tower": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
    }
    return prefixes[part] + rest


def _new_name(name: str) -> str:
    part, rest = name.split(".", 1)
    prefixes = {
        "decoder": "model.language_model.",
        "lm_head": "lm_head.",
        "tower": "model.vision_tower.vision_model.",
        "projector": "model.multi_modal_projector.",
    }
    return prefixes[part] + rest


_NAMES = {"old": _old_name, "new": _new_name}


class _Weights(dict[str, Tensor]):
    """Random tensors by name. A matrix of gain g maps inputs of unit variance to outputs of deviation g."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, outputs: int, inputs: int, gain: float, bias: float | None = None) -> None:
        self[f"{name}.weight"] = self.normal(outputs, inputs) * gain / math.sqrt(inputs)
        if bias is not None:
            self[f"{name}.bias"] = self.normal(outputs) * bias

    def norm(self, name: str, size: int, *, bias: bool) -> None:
        self[f"{name}.weight"] = 1 + 0.1 * self.normal(size)
        if bias:
            self[f"{name}.bias"] = 0.1 * self.normal(size)


def _random_weights(sizes: Shape, vocabulary: int, image_token: int, seed: int) -> dict[str, Tensor]:
    weights = _Weights(seed)
    _add_tower(weights, sizes, sizes.llava(vocabulary).side)
    weights.linear("projector.linear_1", sizes.hidden, sizes.vision_hidden, gain=1.5, bias=0.1)
    weights.linear("projector.linear_2", sizes.hidden, sizes.hidden, gain=1.5, bias=0.1)
    _add_decoder(weights, sizes, vocabulary)
    # A greedy answer should be readable text: special tokens (but </s>), raw bytes and unused ids get logit
    # 0, which is never the largest of so many logits of deviation 3.
    unwanted = [token for token in range(vocabulary) if token < FIRST_PIECE or token >= image_token]
    unwanted.remove(EOS)
    weights["lm_head.weight"][unwanted] = 0
    return dict(weights)


def _add_tower(weights: _Weights, sizes: Shape, side: int) -> None:
    width = sizes.vision_hidden
    weights["tower.embeddings.class_embedding"] = weights.normal(width)
    inputs = 3 * PATCH_SIZE**2
    kernel = weights.normal(width, 3, PATCH_SIZE, PATCH_SIZE) / math.sqrt(inputs)
    weights["tower.embeddings.patch_embedding.weight"] = kernel
    weights["tower.embeddings.position_embedding.weight"] = _smooth_positions(weights, side, width)
    weights.norm("tower.pre_layrnorm", width, bias=True)
    weights.norm("tower.post_layernorm", width, bias=True)
    for layer in range(sizes.vision_layers):
        name = f"tower.encoder.layers.{layer}"
        for part, gain in (("q_proj", 1.4), ("k_proj", 1.4), ("v_proj", 0.8), ("out_proj", 0.8)):
            weights.linear(f"{name}.self_attn.{part}", width, width, gain, bias=0.2)
        weights.norm(f"{name}.layer_norm1", width, bias=True)
        weights.norm(f"{name}.layer_norm2", width, bias=True)
        weights.linear(f"{name}.mlp.fc1", sizes.vision_intermediate, width, gain=1.5, bias=0.1)
        weights.linear(f"{name}.mlp.fc2", width, sizes.vision_intermediate, gain=0.7, bias=0.1)


def _smooth_positions(weights: _Weights, side: int, width: int) -> Tensor:
    """Position embeddings [1 + side * side, width] that change slowly over the grid, as trained ones do.

    A little noise is added. Slow change lets neighbouring patches of equal content be similar; the noise
    keeps scores from near ties.
    """
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    waves = weights.normal(2, width) * (2 * math.pi / side) * 0.7
    phases = weights.normal(width) * math.pi
    patches = 0.4 * (grid.float() @ waves + phases).sin() + 0.3 * weights.normal(len(grid), width)
    return torch.cat([weights.normal(1, width), patches])


def _add_decoder(weights: _Weights, sizes: Shape, vocabulary: int) -> None:
    hidden = sizes.hidden
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights["decoder.embed_tokens.weight"] = weights.normal(vocabulary, hidden)
    for layer in range(sizes.layers):
        name = f"decoder.layers.{layer}"
        weights.norm(f"{name}.input_layernorm", hidden, bias=False)
        weights.norm(f"{name}.post_attention_layernorm", hidden, bias=False)
        weights.linear(f"{name}.self_attn.q_proj", queries, hidden, gain=1.4)
        weights.linear(f"{name}.self_attn.k_proj", keys, hidden, gain=1.4)
        weights.linear(f"{name}.self_attn.v_proj", keys, hidden, gain=1.2)
        weights.linear(f"{name}.self_attn.o_proj", hidden, queries, gain=1.2)
        weights.linear(f"{name}.mlp.gate_proj", sizes.intermediate, hidden, gain=1.0)
        weights.linear(f"{name}.mlp.up_proj", sizes.intermediate, hidden, gain=1.0)
        weights.linear(f"{name}.mlp.down_proj", hidden, sizes.intermediate, gain=1.0)
    weights.norm("decoder.norm", hidden, bias=False)
    weights.linear("lm_head", vocabulary, hidden, gain=3.0)


# --------------------------------------------------------------------------------------------------
# Tokenizer and processor
# --------------------------------------------------------------------------------------------------


def train_tokenizer() -> Tokenizer:
    """A byte-fallback BPE like Llama's: <unk> 0, <s> 1, </s> 2, 256 bytes, pieces, and last <image> and
    <pad>.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT.splitlines(), trainer)
    return _with_specials(tokenizer)


def _with_specials(trained: Tokenizer) -> Tokenizer:
    """The trained pieces in Llama's set-up; the byte pieces must not be special, or decoding would drop
    them.
    """
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    options = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer(models.BPE(vocab=state["vocab"], merges=merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    specials = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def _write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(path / "special_tokens_map.json", names | {"image_token": "<image>"})
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "LlavaProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "left",
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    write_json(path / "tokenizer_config.json", settings | names)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# --------------------------------------------------------------------------------------------------
# Images, prompts, thresholds
# --------------------------------------------------------------------------------------------------


def make_images(seed: int = 0) -> dict[str, Image.Image]:
    """Images of different sizes and redundancy: flat, gradient, shapes, half, noise, text; all differ by
    seed.
    """
    draw = random.Random(seed)
    return {
        "flat": Image.new("RGB", (336, 336), _colour(draw)),
        "gradient": _gradient(500, 375, _colour(draw), _colour(draw)),
        "shapes": _shapes(draw, 640, 480, 12),
        "half": _half(seed, 400, 400, _colour(draw)),
        "noise": _noise(seed, 336, 448),
        "text": _text(draw, 320, 336),
    }


def _colour(draw: random.Random) -> tuple[int, int, int]:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)


def _gradient(width: int, height: int, start: tuple[int, ...], end: tuple[int, ...]) -> Image.Image:
    across = np.linspace(0, 1, width)[None, :, None] * 0.7 + np.linspace(0, 1, height)[:, None, None] * 0.3
    return Image.fromarray((np.array(start) * (1 - across) + np.array(end) * across).round().astype(np.uint8))


def _shapes(draw: random.Random, width: int, height: int, count: int) -> Image.Image:
    image = Image.new("RGB", (width, height), _colour(draw))
    canvas = ImageDraw.Draw(image)
    for index in range(count):
        x, y = draw.randrange(width), draw.randrange(height)
        box = (x, y, x + draw.randrange(40, 200), y + draw.randrange(40, 200))
        (canvas.ellipse if index % 2 else canvas.rectangle)(box, fill=_colour(draw))
    return image


def _noise(seed: int, width: int, height: int) -> Image.Image:
    """Independent blocks of 14 pixels, so that every patch is a different one."""
    shape = (height // 14 + 1, width // 14 + 1, 3)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(blocks.repeat(14, axis=0).repeat(14, axis=1)[:height, :width])


def _half(seed: int, width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), colour)
    image.paste(_noise(seed + 1, width // 2, height), (0, 0))
    return image


def _text(draw: random.Random, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (250, 250, 245))
    canvas = ImageDraw.Draw(image)
    for y in range(10, height - 20, 22):
        canvas.text((10, y), " ".join(str(draw.randrange(10**6)) for _ in range(6)), fill=_colour(draw))
    return image


def prompt(question: str, images: int = 1) -> str:
    """A LLaVA-1.5 prompt with that many images before the question (an image's token not yet repeated)."""
    return "USER: " + "<image>\n" * images + question + " ASSISTANT:"


def conversation(turns: Sequence[tuple[int, str]], answer: str) -> str:
    """A LLaVA-1.5 prompt of several turns, images and question each; all but the last one got that answer."""
    return f" {answer}</s>".join(prompt(question, images) for images, question in turns)


def pick_thresholds(
    checkpoint: str | Path, images: Sequence[Image.Image], shares: Sequence[float]
) -> list[float]:
    """Thresholds that merge about the given share of even tokens in each executed vision layer.

    shares: one number in (0, 1) per executed layer. Each threshold lies in the middle of the widest gap
    between scores near the wanted quantile, so that rounding does not decide a merge of these images.
    """
    thresholds: list[float] = []
    for layer, share in enumerate(shares):
        so_far = [*thresholds, *[None] * (len(shares) - layer)]
        reference = Reference(checkpoint, {"thresholds": so_far})
        scores = torch.cat([reference.match_scores(image)[layer] for image in images]).sort().values
        at, reach = int((1 - share) * len(scores)), max(2, len(scores) // 25)
        near = scores[max(0, at - reach) : at + reach]
        widest = int((near[1:] - near[:-1]).argmax())
        thresholds.append(float(near[widest] + near[widest + 1]) / 2)
    return thresholds


def decided_images(
    reference: Reference,
    count: int,
    *,
    question: str = "What is in the image?",
    seed: int = 0,
    merge_margin: float = 4e-6,
    choice_margin: float = 3e-4,
) -> list[Image.Image]:
    """`count` images, kinds mixed, whose merges and prunes under `reference` are no matter of rounding.

    Float32 cosines err by about 5e-7 and importances by about 3e-5 of themselves, so a smaller margin than
    these defaults lets a correct implementation decide otherwise and differ visibly. question: the prompt,
    with this one image, that the prunes are judged for. Raises RuntimeError when 50 seeds do not yield
    enough.
    """
    ids = reference.prompt_ids(prompt(question))
    found: list[Image.Image] = []
    for offset in range(50):
        for image in make_images(seed + offset).values():
            if reference.merge_margin(image) < merge_margin:
                continue
            if any(choice.margin < choice_margin for choice in reference.choices(ids, [image])):
                continue
            found.append(image)
            if len(found) == count:
                return found
    raise RuntimeError(f"Only {len(found)} of {count} images are clear of rounding; use other thresholds.")
