"""The reference against transformers' LLaVA, against hand-worked cases, and the test data against
blindness.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.support.reference import (
    Choice,
    Reference,
    Tokens,
    dtome_layer,
    importance_by_head,
    keep_count,
    match_scores,
    merge_margin,
    merge_pairs,
    merge_tokens,
    rotate,
    select_tokens,
    vision_attention,
    vtu_attention,
)
from tests.support.tiny_checkpoints import (
    PATCHES,
    Shape,
    decided_images,
    make_images,
    pick_thresholds,
    prompt,
    write_checkpoint,
)

THETA = 10000.0


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a busy machine waiting threads make them ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images() -> dict[str, Image.Image]:
    return make_images(0)


@pytest.fixture(scope="module")
def thresholds(checkpoint: Path, images: dict[str, Image.Image]) -> list[float]:
    return pick_thresholds(checkpoint, list(images.values()), [0.6, 0.6, 0.6])


def _transformers_model(path: Path, **options: Any) -> Any:
    """transformers' own LLaVA; from_pretrained leaves it in evaluation mode."""
    return LlavaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    )


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- everything off is stock LLaVA -------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "shards", "shape"),
    [
        ("old", 1, {}),
        ("new", 3, {"heads": 2, "kv_heads": 2, "layers": 3}),
        ("old", 2, {"heads": 4, "kv_heads": 1, "layers": 2, "vision_layers": 3, "head_dim": 32}),
    ],
)
@torch.no_grad()
def test_off_equals_transformers(tmp_path: Path, names: Any, shards: int, shape: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path, names=names, shards=shards, **shape)
    model, loading = _transformers_model(path, output_loading_info=True)
    assert not any(loading.values()), "weights that transformers misses or does not know"
    processor, reference = AutoProcessor.from_pretrained(path), Reference(path)
    pictures = make_images(1)
    for kinds in (["shapes"], ["noise", "text"], []):
        chosen = [pictures[kind] for kind in kinds]
        text = prompt("Compare: what is it?", len(chosen))
        inputs = processor(images=chosen or None, text=text, return_tensors="pt")
        ids = reference.prompt_ids(text)
        assert ids == inputs["input_ids"][0].tolist()
        extra = [70, 300, 12]
        inputs["input_ids"] = torch.tensor([ids + extra])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        theirs = model(**inputs).logits[0, -4:]
        assert theirs.std() > 1, "too flat to compare"
        torch.testing.assert_close(reference.logits(ids, chosen), theirs[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(reference.logits(ids, chosen, extra), theirs[-1], atol=1e-4, rtol=0)
        distributions = reference.score(ids, chosen, [*extra, 0]).distributions
        torch.testing.assert_close(distributions, theirs.log_softmax(-1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_off_generates_what_transformers_generates(checkpoint: Path, images: dict[str, Image.Image]) -> None:
    model = _transformers_model(checkpoint)
    processor, reference = AutoProcessor.from_pretrained(checkpoint), Reference(checkpoint, {})
    text = prompt("What is in the image?")
    inputs = processor(images=[images["half"]], text=text, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    steps = reference.generate(reference.prompt_ids(text), [images["half"]], 6)
    assert [step.token for step in steps] == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_every_way_of_saying_off_is_off(tmp_path: Path, images: dict[str, Image.Image]) -> None:
    path = write_checkpoint(tmp_path, hybrid={"thresholds": [0.1] * 3, "fastv_layer": 2, "fastv_ratio": 0.9})
    ids = Reference(path).prompt_ids(prompt("Why?"))
    off = Reference(path, {}).logits(ids, [images["shapes"]])
    for hybrid in (
        {"thresholds": None, "fastv_layer": None, "fastv_ratio": None},
        {"thresholds": [None, math.inf, None]},
        {"thresholds": {"low": [0.1] * 3, "high": [None] * 3}, "default_level": "high"},
        {"fastv_layer": 2, "fastv_ratio": 0.0},
    ):
        assert torch.equal(Reference(path, hybrid).logits(ids, [images["shapes"]]), off)
    assert (Reference(path).logits(ids, [images["shapes"]]) - off).abs().max() > 0.1


@pytest.mark.parametrize(
    "hybrid",
    [
        {"thresholds": [0.9, 0.9]},
        {"fastv_layer": 0, "fastv_ratio": 0.5},
        {"fastv_layer": 8, "fastv_ratio": 0.5},
        {"fastv_layer": 2, "fastv_ratio": 1.0},
        {"fastv_ratio": 0.5},
    ],
)
def test_wrong_settings_are_refused(checkpoint: Path, hybrid: dict) -> None:
    with pytest.raises(ValueError):
        Reference(checkpoint, hybrid)


# ---- merging -----------------------------------------------------------------------------------


def test_scores_are_cosines_of_mean_keys_and_spare_the_class_token() -> None:
    keys = _normal(7, 2, 4)
    scores = match_scores(keys)
    metric = keys.mean(1)
    assert scores.shape == (4, 3)
    assert torch.isinf(scores[0]).all() and (scores[0] < 0).all()
    for a in range(1, 4):
        for b in range(3):
            cosine = F.cosine_similarity(metric[2 * a], metric[2 * b + 1], dim=0)
            assert float(scores[a, b]) == pytest.approx(float(cosine), abs=1e-6)


def test_pairs_are_strictly_above_the_threshold_and_best_first() -> None:
    scores = torch.tensor([[-math.inf] * 3, [0.5, 0.75, 0.1], [0.9, 0.2, 0.3], [0.25, 0.0, 0.5]])
    assert merge_pairs(scores, 0.5) == [(4, 1), (2, 3)]
    assert merge_pairs(scores, 0.4) == [(4, 1), (2, 3), (6, 5)]
    assert merge_pairs(scores, 0.49999) == [(4, 1), (2, 3), (6, 5)]
    assert merge_pairs(scores, 0.9) == []
    assert merge_pairs(scores, math.inf) == []
    assert merge_margin(scores, 0.6) == pytest.approx(0.1)
    assert merge_margin(scores, 0.01) == pytest.approx(0.25)


def test_merging_by_hand() -> None:
    hidden = torch.tensor([[9.0], [1.0], [4.0], [2.0], [7.0], [5.0], [8.0]])
    tokens = Tokens(
        hidden, torch.tensor([1.0, 1, 2, 3, 1, 1, 1]), [[], [5], [0, 6], [1, 2, 7], [3], [4], [8]]
    )
    merged = merge_tokens(tokens, [(2, 3), (6, 3)])
    assert merged.hidden[:, 0].tolist() == pytest.approx([9.0, 7.0, 1.0, (4 * 2 + 2 * 3 + 8) / 6, 5.0])
    assert merged.sizes.tolist() == [1, 1, 1, 6, 1]
    assert merged.members == [[], [3], [5], [1, 2, 7, 0, 6, 8], [4]]
    assert tokens.members[3] == [1, 2, 7], "the input must stay as it was"


def test_identical_patches_merge_into_one_and_keep_their_feature() -> None:
    """All patches alike: half of them go in every layer, features stay, and attention stays what it was."""
    hidden = torch.cat([_normal(1, 6), _normal(1, 6, seed=1).expand(16, 6)])
    tokens = Tokens(hidden, torch.ones(17), [[], *([patch] for patch in range(16))])
    before = tokens
    for expected in (9, 5, 3, 2, 2):
        keys = tokens.hidden.unflatten(1, (2, 3))
        # All odd tokens tie, so the first one takes every even one.
        tokens = dtome_layer(tokens, keys, 0.99)
        assert len(tokens.members) == expected
        torch.testing.assert_close(tokens.hidden[0], hidden[0])
        torch.testing.assert_close(tokens.hidden[1:], hidden[1:].narrow(0, 0, expected - 1))
        assert tokens.sizes.tolist() == [1.0, *(float(len(own)) for own in tokens.members[1:])]
        assert sorted(sum(tokens.members, [])) == list(range(16))

        def attend(state: Tokens) -> torch.Tensor:
            heads = state.hidden.unflatten(1, (2, 3))
            return vision_attention(heads, heads, heads, state.sizes)

        torch.testing.assert_close(attend(tokens)[:2], attend(before)[:2])


@pytest.mark.parametrize("threshold", [1.1, math.inf])
def test_a_threshold_that_nobody_reaches_leaves_features_and_order(threshold: float) -> None:
    """No cosine is above 1, so nothing merges; and where one pair does, the order is another."""
    hidden, keys = _normal(5, 4), _normal(5, 2, 2)
    tokens = Tokens(hidden.clone(), torch.ones(5), [[], [0], [1], [2], [3]])
    same = dtome_layer(tokens, keys, threshold)
    assert torch.equal(same.hidden, hidden)
    assert same.sizes.tolist() == [1] * 5 and same.members == [[], [0], [1], [2], [3]]
    assert merge_tokens(tokens, [(2, 3)]).members == [[], [3], [0], [2, 1]]


def test_proportional_attention_equals_repeated_keys() -> None:
    q, k, v = (_normal(4, 2, 8, seed=seed) for seed in range(3))
    sizes = torch.tensor([1, 3, 1, 2])
    repeated = torch.arange(4).repeat_interleave(sizes)
    heads_first = [x.transpose(0, 1) for x in (q, k[repeated], v[repeated])]
    expected = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2])
    torch.testing.assert_close(vision_attention(q, k, v, sizes.float()), expected.transpose(0, 1))


@torch.no_grad()
def test_tower_equals_transformers_layers_with_merging_between_their_parts(
    checkpoint: Path, images: dict[str, Image.Image], thresholds: list[float]
) -> None:
    """transformers' own sublayers in the order of DToMe: attention, residual, merge, MLP; log sizes as its
    mask.
    """
    model = _transformers_model(checkpoint).model
    tower = model.vision_tower
    pixels = AutoProcessor.from_pretrained(checkpoint)(images=images["half"], text="", return_tensors="pt")
    hidden = tower.pre_layrnorm(tower.embeddings(pixels["pixel_values"]))
    tokens = Tokens(hidden[0], torch.ones(1 + PATCHES), [[], *([patch] for patch in range(PATCHES))])
    merged_layers = [thresholds[0], math.inf, thresholds[2]]
    for layer, threshold in zip(tower.encoder.layers[:-1], merged_layers, strict=True):
        x = layer.layer_norm1(tokens.hidden[None])
        mask = tokens.sizes.log().expand(1, 1, len(tokens.sizes), -1)
        hidden = tokens.hidden + layer.self_attn(x, attention_mask=mask)[0][0]
        keys = layer.self_attn.k_proj(x)[0].unflatten(-1, (Shape().vision_heads, -1))
        tokens = dtome_layer(Tokens(hidden, tokens.sizes, tokens.members), keys, threshold)
        tokens.hidden = tokens.hidden + layer.mlp(layer.layer_norm2(tokens.hidden))
    features, members = Reference(checkpoint, {"thresholds": merged_layers}).encode(images["half"])
    assert members == tokens.members[1:] and 100 < len(members) < 500
    expected = model.multi_modal_projector(tokens.hidden[1:])
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def test_live_tokens_partition_the_patches(
    checkpoint: Path, images: dict[str, Image.Image], thresholds: list[float]
) -> None:
    reference = Reference(checkpoint, {"thresholds": thresholds})
    counts = {}
    for kind, image in images.items():
        features, members = reference.encode(image)
        assert features.shape == (len(members), Shape().hidden)
        assert sorted(sum(members, [])) == list(range(PATCHES))
        counts[kind] = len(members)
    assert counts["flat"] < counts["half"] and counts["gradient"] < counts["noise"], counts
    assert min(counts.values()) < 120 and max(counts.values()) > 250, counts


# ---- virtual unmerging -------------------------------------------------------------------------


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ordinary causal attention of rows standing at positions 0, 1, 2, ...: torch's, grouped-query,
    rotated.
    """
    places = torch.arange(q.shape[0])
    q, k = (torch.stack([rotate(x[:, h], places, THETA) for h in range(x.shape[1])]) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v.transpose(0, 1), is_causal=True, enable_gqa=True).transpose(
        0, 1
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_vtu_is_attention_over_the_unmerged_sequence(kv_heads: int) -> None:
    positions = [[0], [5, 1, 3], [2], [4, 7, 6], [8], [9]]
    q, k, v = _normal(6, 4, 16), _normal(6, kv_heads, 16, seed=1), _normal(6, kv_heads, 16, seed=2)
    row_at = torch.tensor([next(r for r, own in enumerate(positions) if place in own) for place in range(10)])
    full = _plain_attention(q[row_at], k[row_at], v[row_at])
    expected = torch.stack([full[own].mean(0) for own in positions])
    torch.testing.assert_close(vtu_attention(q, k, v, positions, THETA), expected)
    importance = importance_by_head(q, k, positions, 9, THETA)
    torch.testing.assert_close(importance.sum(1), torch.ones(4))
    torch.testing.assert_close(
        torch.einsum("hr,rhd->hd", importance, v.repeat_interleave(4 // kv_heads, 1)), expected[-1]
    )


def test_attention_mass_of_one_copy_sees_only_what_that_copy_sees() -> None:
    positions = [[0], [1, 4], [2], [3], [5]]
    importance = importance_by_head(_normal(5, 2, 8), _normal(5, 1, 8, seed=1), positions, 1, THETA)
    assert (importance[:, [2, 3, 4]] == 0).all() and (importance[:, :2] > 0).all()


def test_rotation_is_llamas() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    x, places = _normal(5, 16), torch.tensor([0, 3, 600, 17, 2])
    config = LlamaConfig(hidden_size=16, num_attention_heads=1, num_key_value_heads=1)
    cos, sin = LlamaRotaryEmbedding(config)(x, places[None])
    expected = apply_rotary_pos_emb(x[None, None], x[None, None], cos, sin)[0][0, 0]
    torch.testing.assert_close(rotate(x, places, THETA), expected, atol=1e-5, rtol=0)


def test_generated_tokens_change_nothing_before_them(
    checkpoint: Path, images: dict[str, Image.Image], thresholds: list[float]
) -> None:
    reference = Reference(checkpoint, {"thresholds": thresholds, "fastv_layer": 2, "fastv_ratio": 0.5})
    ids = reference.prompt_ids(prompt("Describe the picture."))
    steps = reference.generate(ids, [images["shapes"]], 4)
    tokens = [step.token for step in steps]
    score = reference.score(ids, [images["shapes"]], tokens)
    assert score.logprobs.tolist() == pytest.approx(
        [step.top_logprobs[step.token] for step in steps], abs=1e-4
    )
    for m in range(4):
        alone = reference.logits(ids, [images["shapes"]], tokens[:m]).log_softmax(-1)
        torch.testing.assert_close(alone, score.distributions[m], atol=1e-4, rtol=0)


def test_image_position_counts_but_other_images_do_not_leak(
    checkpoint: Path, images: dict[str, Image.Image], thresholds: list[float]
) -> None:
    """Two images in one prompt: each is chosen from by its own count; swapping them changes the answer."""
    hybrid = {"thresholds": thresholds, "fastv_layer": 3, "fastv_ratio": 0.25}
    reference = Reference(checkpoint, hybrid)
    pair = [images["shapes"], images["noise"]]
    ids = reference.prompt_ids(prompt("Which of the two images is brighter?", 2))
    choices = reference.choices(ids, pair)
    live = [len(reference.encode(image)[1]) for image in pair]
    assert [len(choice.importance) for choice in choices] == live
    assert [len(choice.kept) for choice in choices] == [math.ceil(0.75 * n) for n in live]
    swapped = reference.logits(ids, pair[::-1]).log_softmax(-1)
    assert (reference.logits(ids, pair).log_softmax(-1) - swapped).abs().max() > 0.1


# ---- pruning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "ratio", "expected"),
    [
        (576, 0.5, 288),
        (576, 0.0, 576),
        (10, 0.9, 1),  # 0.1 * 10 in floating point is 0.99..98 or 1.00..02, depending on how it is written
        (100, 0.9, 10),
        (10, 0.7, 3),
        (100, 0.43, 57),
        (1, 0.999, 1),
        (3, 0.99, 1),
        (7, 0.5, 4),
        (576, 0.75, 144),
    ],
)
def test_keep_count(tokens: int, ratio: float, expected: int) -> None:
    assert keep_count(tokens, ratio) == expected


def test_choice_keeps_the_most_important_in_order_and_the_earlier_of_equals() -> None:
    assert select_tokens(torch.tensor([0.1, 0.5, 0.2, 0.5, 0.2]), 0.4) == [1, 2, 3]
    assert select_tokens(torch.tensor([0.0, 0.0, 0.0, 0.0]), 0.5) == [0, 1]
    assert select_tokens(torch.tensor([0.3]), 0.9) == [0]
    assert Choice(torch.tensor([0.1, 0.4, 0.2]), [1, 2]).margin == pytest.approx(0.5)
    assert Choice(torch.tensor([0.1]), [0]).margin == math.inf


@torch.no_grad()
def test_importance_is_transformers_attention(checkpoint: Path, images: dict[str, Image.Image]) -> None:
    """Without merging it is the last prompt row of layer K-1's attention, averaged over heads."""
    model = _transformers_model(checkpoint)
    reference = Reference(checkpoint, {"fastv_layer": 3, "fastv_ratio": 0.5})
    text = prompt("Where is the dog?")
    inputs = AutoProcessor.from_pretrained(checkpoint)(
        images=[images["text"]], text=text, return_tensors="pt"
    )
    attention = model(**inputs, output_attentions=True).attentions[2][0, :, -1].mean(0)
    places = inputs["input_ids"][0] == reference.config.image_token_index
    (choice,) = reference.choices(reference.prompt_ids(text), [images["text"]])
    torch.testing.assert_close(choice.importance, attention[places], atol=1e-6, rtol=0)


@torch.no_grad()
def test_importance_at_the_end_of_a_turn_is_transformers_attention(
    checkpoint: Path, images: dict[str, Image.Image]
) -> None:
    """A header behind each image, in the prompt's middle and at its end, and none behind the last one."""
    text = "<image> What? ASSISTANT: ASSISTANT: A dog. <image> And here? ASSISTANT: A cat. <image>"
    header = Reference(checkpoint).tokenizer("ASSISTANT:")["input_ids"][1:]
    hybrid = {"fastv_layer": 3, "fastv_ratio": 0.5, "fastv_rank": "turn_end", "assistant_header": header}
    pictures = [images["text"], images["half"], images["shapes"]]
    inputs = AutoProcessor.from_pretrained(checkpoint)(images=pictures, text=text, return_tensors="pt")
    attentions = _transformers_model(checkpoint)(**inputs, output_attentions=True).attentions[2][0].mean(0)
    reference = Reference(checkpoint, hybrid)
    ids = reference.prompt_ids(text)
    (places,) = (inputs["input_ids"][0] == reference.config.image_token_index).nonzero(as_tuple=True)
    ends = [at for at in range(len(ids)) if ids[at + 1 - len(header) : at + 1] == header]
    choices = reference.choices(ids, pictures)
    for own, asking, choice in zip(
        places.split(PATCHES), (ends[0], ends[2], len(ids) - 1), choices, strict=True
    ):
        torch.testing.assert_close(choice.importance, attentions[asking, own], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("layer", "ratio"), [(1, 0.5), (2, 0.75), (7, 0.9), (3, 0.002), (4, 0.0)])
@torch.no_grad()
def test_whole_model_equals_the_unmerged_model_with_means_and_masks(
    checkpoint: Path,
    images: dict[str, Image.Image],
    thresholds: list[float],
    merge: bool,
    layer: int,
    ratio: float,
) -> None:
    """transformers' model over all 576 positions of each image computes the same.

    Every patch carries its live token's feature, attention outputs are averaged over each token's patches,
    and layers >= K do not see the positions of dropped tokens.
    """
    hybrid = {"thresholds": thresholds if merge else None, "fastv_layer": layer, "fastv_ratio": ratio}
    reference = Reference(checkpoint, hybrid)
    text = prompt("Which of the two images is brighter?", 2)
    ids, pair, extra = reference.prompt_ids(text), [images["noise"], images["text"]], [70, 300, 12]
    placeholder = reference.config.image_token_index
    starts = [i for i in range(1, len(ids)) if ids[i] == placeholder != ids[i - 1]]

    model = _transformers_model(checkpoint)
    embeddings = model.get_input_embeddings()(torch.tensor(ids + extra))
    dropped = torch.zeros(len(embeddings), dtype=torch.bool)
    groups = []
    for start, image, choice in zip(starts, pair, reference.choices(ids, pair), strict=True):
        features, members = reference.encode(image)
        assert (len(members) < PATCHES) == merge
        assert len(choice.kept) == math.ceil((1 - ratio) * len(members))
        for index, (feature, patches) in enumerate(zip(features, members, strict=True)):
            places = [start + patch for patch in patches]
            embeddings[places] = feature
            dropped[places] = index not in choice.kept
            groups.append(places)

    def average(_module: object, _args: object, output: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        out = output[0].clone()
        for places in groups:
            out[0, places] = out[0, places].mean(0)
        return out, output[1]

    lowest = torch.finfo(torch.float32).min
    mask = (
        torch.full((len(embeddings), len(embeddings)), lowest)
        .triu(1)
        .masked_fill(dropped, lowest)[None, None]
    )
    for index, block in enumerate(model.model.language_model.layers):
        block.self_attn.register_forward_hook(average)
        if index >= layer:
            block.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
    theirs = model(inputs_embeds=embeddings[None]).logits[0, -4:]
    ours = reference.score(ids, pair, [*extra, 0]).distributions
    torch.testing.assert_close(ours, theirs.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_prompt_that_ends_in_a_pruned_token_is_refused(
    checkpoint: Path, images: dict[str, Image.Image]
) -> None:
    ids = Reference(checkpoint).prompt_ids("USER: <image>")
    assert Reference(checkpoint, {}).logits(ids, [images["half"]]).isfinite().all()
    (choice,) = Reference(checkpoint, {"fastv_layer": 2, "fastv_ratio": 0.0}).choices(ids, [images["half"]])
    ratio = 1 - (int((choice.importance > choice.importance[-1]).sum()) - 0.5) / PATCHES
    with pytest.raises(ValueError, match="ends in a pruned image token"):
        Reference(checkpoint, {"fastv_layer": 2, "fastv_ratio": round(ratio, 6)}).logits(
            ids, [images["half"]]
        )


# ---- the test data is not blind ----------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_answers_depend_on_image_merging_and_pruning(tmp_path: Path, kv_heads: int) -> None:
    path = write_checkpoint(tmp_path, seed=3, kv_heads=kv_heads)
    pictures = make_images(2)
    thresholds = pick_thresholds(path, list(pictures.values()), [0.6, 0.6, 0.6])
    ids = Reference(path).prompt_ids(prompt("What is in the image?"))
    stock = {k: Reference(path).logits(ids, [image]).log_softmax(-1) for k, image in pictures.items()}
    kinds = list(stock)
    for i, one in enumerate(kinds):
        for other in kinds[:i]:
            assert (stock[one] - stock[other]).abs().max() > 0.5, (one, other)
    for hybrid in (
        {"thresholds": thresholds},
        {"fastv_layer": 2, "fastv_ratio": 0.5},
        {"thresholds": thresholds, "fastv_layer": 1, "fastv_ratio": 0.5},
    ):
        reference = Reference(path, hybrid)
        for kind, image in pictures.items():
            moved = (reference.logits(ids, [image]).log_softmax(-1) - stock[kind]).abs().max()
            assert moved > 0.05, (hybrid, kind)


@pytest.mark.slow
def test_rounding_decides_nothing_for_decided_images(checkpoint: Path, thresholds: list[float]) -> None:
    """Float64 merges and prunes the same tokens, and its logits are within float32 rounding."""
    hybrid = {"thresholds": thresholds, "fastv_layer": 2, "fastv_ratio": 0.5}
    single, double = (Reference(checkpoint, hybrid, dtype=dtype) for dtype in (torch.float32, torch.float64))
    ids = single.prompt_ids(prompt("What is in the image?"))
    for image in decided_images(single, 6):
        assert single.encode(image)[1] == double.encode(image)[1]
        assert [c.kept for c in single.choices(ids, [image])] == [
            c.kept for c in double.choices(ids, [image])
        ]
        difference = single.logits(ids, [image]).double() - double.logits(ids, [image])
        assert difference.abs().max() < 1e-4


def test_checkpoints_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name, layers=1, hybrid={"fastv_layer": None})
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_processor_and_chat_template_load(checkpoint: Path, images: dict[str, Image.Image]) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    question = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    chat = [{"role": "user", "content": question}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == prompt("What is in the image?")
    chat += [{"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Where?"}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "USER: <image>\nWhat is in the image? ASSISTANT: A dog.</s>USER: Where? ASSISTANT:"
    plain = "Read the sign: 8 to 17, naïve café €!"
    assert (
        processor.tokenizer.decode(processor.tokenizer(plain)["input_ids"], skip_special_tokens=True) == plain
    )
