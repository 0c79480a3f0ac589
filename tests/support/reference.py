"""What vllm-hybrid is to compute, written a second time: float32, one request, no cache, no batching.

The code under test is not used here: checkpoints are read straight from their safetensors files and every
formula is spelled out on small tensors, with loops wherever a loop reads better. Sources: merging in the
vision tower and virtual unmerging follow DyMU (arXiv 2504.17040) and ToMe (arXiv 2210.09461), pruning follows
FastV (arXiv 2403.06764), the model is LLaVA-1.5 (arXiv 2310.03744).

Words: a *patch* is one of the image's 576 cells; a *live token* stands for a set of patches, its *members*; a
*row* is one vector of the language model, a text token or a live token; a *virtual position* is a position as
the unreduced model numbers it. A text row has one virtual position, a live token has one per member.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.activations import ACT2FN

# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------

_PREFIXES = (  # old hub names and the names of transformers 4.52 and later; the first match wins
    ("language_model.model.", "decoder."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "decoder."),
    ("vision_tower.vision_model.", "tower."),
    ("vision_tower.", "tower."),
    ("model.vision_tower.vision_model.", "tower."),
    ("model.vision_tower.", "tower."),
    ("multi_modal_projector.", "projector."),
    ("model.multi_modal_projector.", "projector."),
    ("lm_head.", "lm_head."),
)


def load_weights(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read all safetensors files of `checkpoint` as `dtype`.

    Names become `tower.*`, `projector.*`, `decoder.*` and `lm_head.weight`, whatever naming the files use.
    Raises ValueError for a name it does not know and FileNotFoundError when there is no safetensors file.
    """
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"No safetensors file in {checkpoint}.")
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            weights[_plain_name(name)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return weights


def _plain_name(name: str) -> str:
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ValueError(f"The weight {name!r} belongs to no known part of LLaVA-1.5.")


# --------------------------------------------------------------------------------------------------
# DToMe: merging in the vision tower (DyMU section 3.1; ToMe section 3)
# --------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """The vision tower's tokens between two sublayers.

    hidden: [T, C]; sizes: [T], the number of patches of each token (1 for the class token, always index 0);
    members: per token the patches it stands for (empty for the class token).
    """

    hidden: Tensor
    sizes: Tensor
    members: list[list[int]]


def vision_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """Proportional attention: bidirectional, with log(size) added to each key's logits.

    q, k, v: [T, heads, head_dim]; sizes: [T]. Returns [T, heads, head_dim]. With all sizes 1 it is plain
    attention.
    """
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head].T / math.sqrt(q.shape[2]) + sizes.log()
        out[:, head] = scores.softmax(dim=-1) @ v[:, head]
    return out


def match_scores(keys: Tensor) -> Tensor:
    """Cosine between every token at an even index (a row) and every token at an odd index (a column).

    keys: [T, heads, head_dim], as the key projection gives them. The metric is their mean over heads. Returns
    [ceil(T/2), floor(T/2)]; the class token's row is -inf, so that it never merges.
    """
    metric = keys.mean(dim=1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[0::2] @ metric[1::2].T
    scores[0] = -math.inf
    return scores


def merge_pairs(scores: Tensor, threshold: float) -> list[tuple[int, int]]:
    """The merges of one layer, best first: (even token, odd token it merges into), as token indices.

    scores: see `match_scores`. A token merges when its best score is strictly above `threshold`; at most
    (T-1)//2 tokens do.
    """
    tokens = scores.shape[0] + scores.shape[1]
    best = []
    for a in range(scores.shape[0]):
        b = int(scores[a].argmax())
        if float(scores[a, b]) > threshold:
            best.append((float(scores[a, b]), 2 * a, 2 * b + 1))
    best.sort(key=lambda match: -match[0])
    return [(a, b) for _, a, b in best[: (tokens - 1) // 2]]


def merge_margin(scores: Tensor, threshold: float) -> float:
    """How far the closest decision of `merge_pairs` is from falling the other way, in cosine units.

    A test that compares another implementation exactly needs this to stay well above its rounding error.
    """
    margin = math.inf
    for row in scores[1:]:
        ranked = row.sort(descending=True).values
        margin = min(margin, abs(float(ranked[0]) - threshold))
        if float(ranked[0]) > threshold and len(ranked) > 1:
            margin = min(margin, float(ranked[0] - ranked[1]))
    return margin


def merge_tokens(tokens: Tokens, pairs: Sequence[tuple[int, int]]) -> Tokens:
    """Carry out merges: size-weighted mean features, summed sizes, joined members.

    pairs: (even token, odd token it merges into). New order: even tokens that did not merge, in index order,
    then the odd tokens. Without pairs the tokens stay as they are, in their order.
    """
    if not pairs:
        return tokens
    total = tokens.hidden * tokens.sizes[:, None]
    sizes = tokens.sizes.clone()
    members = [list(patches) for patches in tokens.members]
    for a, b in pairs:
        total[b] += tokens.hidden[a] * tokens.sizes[a]
        sizes[b] += tokens.sizes[a]
        members[b] += tokens.members[a]
    gone = {a for a, _ in pairs}
    count = len(members)
    order = [i for i in range(0, count, 2) if i not in gone] + list(range(1, count, 2))
    return Tokens((total / sizes[:, None])[order], sizes[order], [members[i] for i in order])


def dtome_layer(tokens: Tokens, keys: Tensor, threshold: float) -> Tokens:
    """One layer's merging: after the attention residual, before the MLP.

    keys: [T, heads, head_dim], this layer's attention keys of the same tokens. No score is above a threshold
    of +inf.
    """
    return merge_tokens(tokens, merge_pairs(match_scores(keys), threshold))


# --------------------------------------------------------------------------------------------------
# VTU: virtual token unmerging in the language model (DyMU section 3.2), written as its definition
# --------------------------------------------------------------------------------------------------


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE in Llama's half-rotation style: x [n, d] at integer positions [n]; the angles use base `theta`."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=x.dtype, device=x.device) * 2 / x.shape[-1])
    angles = positions.to(x.dtype)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def vtu_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Sequence[Sequence[int]], theta: float
) -> Tensor:
    """Causal attention as if every row stood at each of its virtual positions.

    q: [rows, heads, head_dim]; k, v: [rows, kv_heads, head_dim], all before rotation; heads is a multiple of
    kv_heads (grouped-query attention). positions: the virtual positions of each row, at least one each, no
    position twice. Each copy of a query sees the copies of keys at its own or an earlier virtual position; a
    row's output is the mean over its copies. Returns [rows, heads, head_dim].
    """
    copy_row, copy_position = _copies(positions, q.device)
    group = q.shape[1] // k.shape[1]
    hidden = copy_position[None, :] > copy_position[:, None]
    copies = torch.tensor([len(p) for p in positions], dtype=q.dtype, device=q.device)
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        q_copies = rotate(q[copy_row, head], copy_position, theta)
        k_copies = rotate(k[copy_row, head // group], copy_position, theta)
        scores = q_copies @ k_copies.T / math.sqrt(q.shape[2])
        scores = scores.masked_fill(hidden, -math.inf)
        out_copies = scores.softmax(dim=-1) @ v[copy_row, head // group]
        out[:, head] = torch.zeros_like(out[:, head]).index_add_(0, copy_row, out_copies) / copies[:, None]
    return out


def importance_by_head(
    q: Tensor, k: Tensor, positions: Sequence[Sequence[int]], query_position: int, theta: float
) -> Tensor:
    """What one virtual position's query gives each row: its softmax row, summed over the row's positions.

    Arguments as for `vtu_attention`; query_position: the asking virtual position. Returns [heads, rows]; each
    head's masses sum to 1.
    """
    copy_row, copy_position = _copies(positions, q.device)
    group = q.shape[1] // k.shape[1]
    asking = copy_position == query_position
    importance = torch.zeros(q.shape[1], len(positions), dtype=q.dtype, device=q.device)
    for head in range(q.shape[1]):
        query = rotate(q[copy_row[asking], head], copy_position[asking], theta)
        k_copies = rotate(k[copy_row, head // group], copy_position, theta)
        scores = (query @ k_copies.T)[0] / math.sqrt(q.shape[2])
        scores = scores.masked_fill(copy_position > query_position, -math.inf)
        importance[head].index_add_(0, copy_row, scores.softmax(dim=-1))
    return importance


def _copies(positions: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """One entry per (row, virtual position): the rows and the positions, both [copies] int64."""
    pairs = [(row, position) for row, own in enumerate(positions) for position in own]
    rows, places = zip(*pairs, strict=True)
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


# --------------------------------------------------------------------------------------------------
# FastV: pruning between decoder layers K-1 and K (FastV section 4)
# --------------------------------------------------------------------------------------------------


def keep_count(tokens: int, ratio: float) -> int:
    """ceil((1 - ratio) * tokens), at least 1, exact for the decimal number that `ratio` was written as."""
    return max(1, math.ceil((1 - Fraction(str(ratio))) * tokens))


def select_tokens(importance: Tensor, ratio: float) -> list[int]:
    """The live tokens of one image that stay, in their old order.

    importance: [n]. The keep_count(n, ratio) most important stay, of equals the earlier.
    """
    ranked = sorted(range(len(importance)), key=lambda i: (-float(importance[i]), i))
    return sorted(ranked[: keep_count(len(importance), ratio)])


class Choice(NamedTuple):
    """FastV's choice for one image. importance: [n]; kept: indices of live tokens that stay, ascending."""

    importance: Tensor
    kept: list[int]

    @property
    def margin(self) -> float:
        """Gap between the least important kept and the most important dropped token, as a share of the
        former.

        Infinite when nothing is dropped. Below some 1e-4 another implementation's float32 rounding may choose
        otherwise.
        """
        dropped = sorted(set(range(len(self.importance))) - set(self.kept))
        if not dropped:
            return math.inf
        weakest = float(self.importance[self.kept].min())
        return (weakest - float(self.importance[dropped].max())) / weakest


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One generated token. top_logprobs: the most likely tokens and their log probabilities, best first."""

    token: int
    top_logprobs: dict[int, float]


class Score(NamedTuple):
    """logprobs: [m], of the given outputs; distributions: [m, vocabulary], all log probabilities."""

    logprobs: Tensor
    distributions: Tensor


class AtLevel(NamedTuple):
    """An image that is asked for at a level; one that stands alone is at the default level."""

    image: Image.Image
    level: str


Asked = Image.Image | AtLevel


class Setting(NamedTuple):
    """A level: the merge threshold of each executed vision layer, and FastV's ratio."""

    thresholds: list[float]
    ratio: float


@dataclass
class _Rows:
    """The language model's input: hidden [rows, C], virtual positions and image (None: text) of each row.

    ranked_by: per image the virtual position whose attention FastV goes by; ratios: per image the share of
    its tokens to drop.
    """

    hidden: Tensor
    positions: list[list[int]]
    image_of: list[int | None]
    ranked_by: list[int]
    ratios: list[float]


class Reference:
    """LLaVA-1.5 with merging, virtual unmerging and pruning, from a checkpoint directory.

    checkpoint: hub format, LLaVA-1.5 with a CLIP tower and a Llama decoder. hybrid: replaces the config's
    "hybrid" section ({} turns everything off, None takes the config's). dtype: float32 is the reference;
    float64 tells rounding error from meaning. kv_dtype: what keys and values are rounded to before they are
    attended to: text keys rotated, image keys not. Raises ValueError for what it does not implement.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        hybrid: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.kv_dtype = kv_dtype
        self.config = AutoConfig.from_pretrained(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        self.device = torch.device(device)
        self.dtype = dtype
        weights = load_weights(checkpoint, dtype)
        self.weights = {name: tensor.to(self.device) for name, tensor in weights.items()}
        if hybrid is None:
            hybrid = json.loads((Path(checkpoint) / "config.json").read_text()).get("hybrid") or {}
        self._read_config(hybrid)

    def _read_config(self, hybrid: Mapping[str, Any]) -> None:
        text, vision = self.config.text_config, self.config.vision_config
        rope = text.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"Only plain RoPE is implemented, not {rope['rope_type']!r}.")
        if self.config.vision_feature_select_strategy != "default":
            raise ValueError("Only the feature strategy 'default' is implemented.")
        self.theta = float(rope["rope_theta"])
        self.patches = (vision.image_size // vision.patch_size) ** 2
        layer = self.config.vision_feature_layer
        self.tower_layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        self.settings, self.default_level = _settings(hybrid, self.tower_layers)
        ratios = [setting.ratio for setting in self.settings.values()]
        self.fastv_layer = hybrid.get("fastv_layer")
        if self.fastv_layer is None and any(ratios):
            raise ValueError("fastv_ratio needs fastv_layer.")
        if self.fastv_layer is not None and not 1 <= self.fastv_layer < text.num_hidden_layers:
            raise ValueError(
                f"fastv_layer is {self.fastv_layer}, not one of 1 to {text.num_hidden_layers - 1}."
            )
        if not all(0 <= ratio < 1 for ratio in ratios):
            raise ValueError(f"fastv_ratio is one of {ratios}, not in [0, 1).")
        turns = hybrid.get("fastv_rank", "prompt_end") == "turn_end"
        # Without a header every image is ranked by the prompt's last position.
        self.header = list(hybrid["assistant_header"]) if turns and any(ratios) else None

    def setting(self, image: Asked) -> Setting:
        """The level of an image."""
        return self.settings[image.level if isinstance(image, AtLevel) else self.default_level]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    # ---- vision tower ---------------------------------------------------------------------------

    def pixel_values(self, image: Asked) -> Tensor:
        """The checkpoint's own preprocessing: [3, height, width]."""
        image = image.image if isinstance(image, AtLevel) else image
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(self.device, self.dtype)

    @torch.no_grad()
    def encode(self, image: Asked) -> tuple[Tensor, list[list[int]]]:
        """One image's live tokens: features after the projector [n, C] and the patches of each, in tower
        order.
        """
        tokens, _ = self._tower(self.pixel_values(image), self.setting(image).thresholds)
        return self._projector(tokens.hidden[1:]), tokens.members[1:]

    @torch.no_grad()
    def merge_margin(self, image: Asked) -> float:
        """The smallest `merge_margin` of all layers that merge: how robust this image's merging is."""
        return self._tower(self.pixel_values(image), self.setting(image).thresholds)[1]

    @torch.no_grad()
    def match_scores(self, image: Asked) -> list[Tensor]:
        """Per executed layer the best score of each even token (without the class token), [A-1] each.

        These are what a threshold is compared with, given the thresholds of the layers before.
        """
        best: list[Tensor] = []
        self._tower(self.pixel_values(image), self.setting(image).thresholds, best)
        return best

    def _tower(
        self, pixels: Tensor, thresholds: Sequence[float], best_scores: list[Tensor] | None = None
    ) -> tuple[Tokens, float]:
        vision = self.config.vision_config
        heads, eps = vision.num_attention_heads, vision.layer_norm_eps
        act = ACT2FN[vision.hidden_act]
        tokens = self._patch_tokens(pixels)
        margin = math.inf
        for layer in range(self.tower_layers):
            name = f"tower.encoder.layers.{layer}"
            x = self._layer_norm(tokens.hidden, f"{name}.layer_norm1", eps)
            q, k, v = (
                self._linear(x, f"{name}.self_attn.{part}_proj").unflatten(-1, (heads, -1)) for part in "qkv"
            )
            out = vision_attention(q, k, v, tokens.sizes).flatten(1)
            hidden = tokens.hidden + self._linear(out, f"{name}.self_attn.out_proj")
            tokens = Tokens(hidden, tokens.sizes, tokens.members)
            if best_scores is not None:
                best_scores.append(match_scores(k)[1:].max(dim=1).values)
            if thresholds[layer] < math.inf:
                margin = min(margin, merge_margin(match_scores(k), thresholds[layer]))
            tokens = dtome_layer(tokens, k, thresholds[layer])
            x = self._layer_norm(tokens.hidden, f"{name}.layer_norm2", eps)
            tokens.hidden = tokens.hidden + self._linear(
                act(self._linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2"
            )
        return tokens, margin

    def _patch_tokens(self, pixels: Tensor) -> Tokens:
        """The class token and one token per patch, row by row, with position embeddings and the first
        norm.
        """
        vision = self.config.vision_config
        kernel = self.weights["tower.embeddings.patch_embedding.weight"]
        grid = F.conv2d(pixels[None], kernel, stride=vision.patch_size)[0]
        patches = grid.flatten(1).T
        hidden = torch.cat([self.weights["tower.embeddings.class_embedding"][None], patches])
        hidden = hidden + self.weights["tower.embeddings.position_embedding.weight"]
        hidden = self._layer_norm(hidden, "tower.pre_layrnorm", vision.layer_norm_eps)
        members: list[list[int]] = [[]] + [[patch] for patch in range(len(patches))]
        return Tokens(hidden, torch.ones(len(hidden), dtype=self.dtype, device=self.device), members)

    def _layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps
        )

    def _projector(self, features: Tensor) -> Tensor:
        act = ACT2FN[self.config.projector_hidden_act]
        return self._linear(act(self._linear(features, "projector.linear_1")), "projector.linear_2")

    # ---- prompt ---------------------------------------------------------------------------------

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of `text`, each <image> as often as the image has patches (what a server counts)."""
        ids: list[int] = []
        for token in self.tokenizer(text)["input_ids"]:
            ids += [token] * (self.patches if token == self.config.image_token_index else 1)
        return ids

    def _rows(self, prompt_ids: Sequence[int], images: Sequence[Asked]) -> _Rows:
        """Text rows and live tokens in prompt order; the live tokens of an image stay in tower order."""
        embedding = self.weights["decoder.embed_tokens.weight"]
        placeholder = self.config.image_token_index
        places = sum(token == placeholder for token in prompt_ids)
        if places != self.patches * len(images):
            raise ValueError(
                f"{len(images)} images need {self.patches * len(images)} placeholders, not {places}."
            )
        hidden: list[Tensor] = []
        positions: list[list[int]] = []
        image_of: list[int | None] = []
        ranked_by: list[int] = []
        position, image = 0, 0
        while position < len(prompt_ids):
            if prompt_ids[position] != placeholder:
                hidden.append(embedding[prompt_ids[position]])
                positions.append([position])
                image_of.append(None)
                position += 1
                continue
            if any(token != placeholder for token in prompt_ids[position : position + self.patches]):
                raise ValueError(f"The placeholders of image {image} are not in one piece.")
            features, members = self.encode(images[image])
            for feature, patches in zip(features, members, strict=True):
                hidden.append(feature)
                positions.append([position + patch for patch in patches])
                image_of.append(image)
            position += self.patches
            image += 1
            ranked_by.append(self._ranked_by(list(prompt_ids), position))
        ratios = [self.setting(image).ratio for image in images]
        return _Rows(torch.stack(hidden), positions, image_of, ranked_by, ratios)

    def _ranked_by(self, prompt_ids: list[int], behind: int) -> int:
        """The position that ranks an image which ends before position `behind`: the last one of the first
        assistant header from there on, or of the prompt.
        """
        if self.header is not None:
            for end in range(behind + len(self.header), len(prompt_ids) + 1):
                if prompt_ids[end - len(self.header) : end] == self.header:
                    return end - 1
        return len(prompt_ids) - 1

    # ---- language model -------------------------------------------------------------------------

    def _decode(
        self, prompt: _Rows, generated_ids: Sequence[int], last_prompt_position: int
    ) -> tuple[Tensor, list[Choice]]:
        """Logits at the last prompt position and at every generated token, [1 + m, vocabulary], and the
        choice.

        One causal pass over prompt and generated tokens: a generated token changes nothing before it, and the
        choice looks at the prompt alone.
        """
        text = self.config.text_config
        eps = text.rms_norm_eps
        act = ACT2FN[text.hidden_act]
        rows = self._with_generated(prompt, generated_ids, last_prompt_position)
        choices: list[Choice] = []
        for layer in range(text.num_hidden_layers):
            name = f"decoder.layers.{layer}"
            x = self._rms_norm(rows.hidden, f"{name}.input_layernorm", eps)
            q, k, v = (
                self._linear(x, f"{name}.self_attn.{part}_proj").unflatten(-1, (-1, text.head_dim))
                for part in "qkv"
            )
            if self.kv_dtype is not None:
                k, v = self._kept(k, rows), v.to(self.kv_dtype).to(v.dtype)
            out = vtu_attention(q, k, v, rows.positions, self.theta).flatten(1)
            hidden = rows.hidden + self._linear(out, f"{name}.self_attn.o_proj")
            x = self._rms_norm(hidden, f"{name}.post_attention_layernorm", eps)
            gated = act(self._linear(x, f"{name}.mlp.gate_proj")) * self._linear(x, f"{name}.mlp.up_proj")
            rows = replace(rows, hidden=hidden + self._linear(gated, f"{name}.mlp.down_proj"))
            if self.fastv_layer is not None and layer == self.fastv_layer - 1:
                rows, choices = self._prune(rows, self._importance(q, k, rows))
        hidden = self._rms_norm(rows.hidden, "decoder.norm", eps)
        wanted = [self._row_at(rows, last_prompt_position + i) for i in range(1 + len(generated_ids))]
        return self._lm_head(hidden[wanted]), choices

    def _with_generated(
        self, prompt: _Rows, generated_ids: Sequence[int], last_prompt_position: int
    ) -> _Rows:
        """`prompt` followed by generated tokens; an image id among them is an ordinary token."""
        embedding = self.weights["decoder.embed_tokens.weight"]
        hidden = [prompt.hidden] + [embedding[token][None] for token in generated_ids]
        positions = prompt.positions + [[last_prompt_position + 1 + i] for i in range(len(generated_ids))]
        image_of = prompt.image_of + [None] * len(generated_ids)
        return replace(prompt, hidden=torch.cat(hidden), positions=positions, image_of=image_of)

    def _kept(self, k: Tensor, rows: _Rows) -> Tensor:
        """Keys [rows, kv_heads, head_dim] as a cache of another dtype gives them back, before rotation."""
        assert self.kv_dtype is not None
        own = torch.tensor(
            [
                0 if image is not None else at[0]
                for at, image in zip(rows.positions, rows.image_of, strict=True)
            ]
        )
        kept = [
            rotate(rotate(head, own, self.theta).to(self.kv_dtype).to(k.dtype), -own, self.theta)
            for head in k.unbind(1)
        ]
        return torch.stack(kept, dim=1)

    def _importance(self, q: Tensor, k: Tensor, rows: _Rows) -> Tensor:
        """What the position that ranks its image gives each image row, the mean over heads; zero for text.

        q, k: as for `vtu_attention`. Returns [rows].
        """
        importance = torch.zeros(len(rows.positions), dtype=q.dtype, device=q.device)
        for position in set(rows.ranked_by):
            own = [
                row
                for row, image in enumerate(rows.image_of)
                if image is not None and rows.ranked_by[image] == position
            ]
            importance[own] = importance_by_head(q, k, rows.positions, position, self.theta).mean(dim=0)[own]
        return importance

    def _prune(self, rows: _Rows, importance: Tensor) -> tuple[_Rows, list[Choice]]:
        """Drop the unimportant live tokens of every image. importance: [rows], attention of the position that
        ranks each row's image.
        """
        images = max((image for image in rows.image_of if image is not None), default=-1) + 1
        choices, dropped = [], set()
        for image in range(images):
            own = [row for row, of in enumerate(rows.image_of) if of == image]
            kept = select_tokens(importance[own], rows.ratios[image])
            choices.append(Choice(importance[own], kept))
            dropped |= set(own) - {own[i] for i in kept}
        stay = [row for row in range(len(rows.positions)) if row not in dropped]
        positions = [rows.positions[row] for row in stay]
        image_of = [rows.image_of[row] for row in stay]
        return replace(rows, hidden=rows.hidden[stay], positions=positions, image_of=image_of), choices

    def _row_at(self, rows: _Rows, position: int) -> int:
        for row, own in enumerate(rows.positions):
            if position in own:
                return row
        raise ValueError(
            f"No row is left at virtual position {position}: the prompt ends in a pruned image token."
        )

    def _rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def _lm_head(self, x: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        return F.linear(x, self.weights["decoder.embed_tokens.weight" if tied else "lm_head.weight"])

    # ---- requests -------------------------------------------------------------------------------

    @torch.no_grad()
    def choices(self, prompt_ids: Sequence[int], images: Sequence[Asked]) -> list[Choice]:
        """FastV's choice per image; empty when pruning is off (no `fastv_layer`)."""
        return self._decode(self._rows(prompt_ids, images), (), len(prompt_ids) - 1)[1]

    @torch.no_grad()
    def logits(
        self, prompt_ids: Sequence[int], images: Sequence[Asked], generated_ids: Sequence[int] = ()
    ) -> Tensor:
        """Logits after the prompt and `generated_ids`, from scratch: [vocabulary]."""
        return self._decode(self._rows(prompt_ids, images), generated_ids, len(prompt_ids) - 1)[0][-1]

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[int], images: Sequence[Asked], output_ids: Sequence[int]) -> Score:
        """Log probabilities of given outputs, each after the prompt and the outputs before it."""
        rows = self._rows(prompt_ids, images)
        logits = self._decode(rows, list(output_ids)[:-1], len(prompt_ids) - 1)[0]
        distributions = logits.log_softmax(dim=-1)[: len(output_ids)]
        return Score(distributions[range(len(output_ids)), list(output_ids)], distributions)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[int],
        images: Sequence[Asked],
        max_tokens: int,
        stop_ids: Iterable[int] = (),
        top: int = 5,
    ) -> list[Step]:
        """Greedy decoding, everything recomputed for every token; ends after a token of `stop_ids`.

        top: how many log probabilities (over the whole vocabulary) each step reports.
        """
        rows = self._rows(prompt_ids, images)
        stops = set(stop_ids)
        generated: list[int] = []
        steps: list[Step] = []
        for _ in range(max_tokens):
            logits = self._decode(rows, generated, len(prompt_ids) - 1)[0][-1]
            best = logits.log_softmax(dim=-1).topk(top)
            token = int(best.indices[0])
            steps.append(Step(token, dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))))
            generated.append(token)
            if token in stops:
                break
        return steps


def _settings(hybrid: Mapping[str, Any], layers: int) -> tuple[dict[str, Setting], str]:
    """The levels of a section, and the name of the default one."""
    levels = hybrid.get("levels")
    if levels is None:
        thresholds = hybrid.get("thresholds")
        named = thresholds if isinstance(thresholds, Mapping) else {"default": thresholds}
        ratio = hybrid.get("fastv_ratio")
        levels = {name: {"thresholds": values, "fastv_ratio": ratio} for name, values in named.items()}
    settings = {
        name: Setting(_thresholds(level.get("thresholds"), layers), float(level.get("fastv_ratio") or 0.0))
        for name, level in {"full": {}, **levels}.items()
    }
    only = next(iter(levels)) if len(levels) == 1 else None
    return settings, hybrid.get("level") or hybrid.get("default_level") or only or "full"


def _thresholds(thresholds: Sequence[float | None] | None, layers: int) -> list[float]:
    """One threshold per executed vision layer; None, as a whole or in one place, merges nothing there."""
    if thresholds is None:
        return [math.inf] * layers
    if len(thresholds) != layers:
        raise ValueError(f"{len(thresholds)} thresholds for {layers} executed vision layers.")
    return [math.inf if threshold is None else float(threshold) for threshold in thresholds]
