"""FastV's choice against a loop over images."""

import math
import random
from fractions import Fraction

import pytest
import torch

from vllm_hybrid.method.fastv import live_to_kept, select_tokens
from vllm_hybrid.method.row_plan import StepImages, plan_text_rows
from vllm_hybrid.models import step as step_module
from vllm_hybrid.models.step import Step

RATIOS = (0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 0.999)


def slow_choice(importance: list[float], lengths: list[int], ratios: list[float]) -> list[bool]:
    keep: list[bool] = []
    for length, ratio in zip(lengths, ratios, strict=True):
        own = importance[len(keep) : len(keep) + length]
        count = max(1, math.ceil(length - Fraction(str(ratio)) * length))
        best = sorted(range(length), key=lambda i: (-own[i], i))[:count]
        keep += [i in best for i in range(length)]
    return keep


def kept_of(lengths: torch.Tensor, ratios: list[float]) -> torch.Tensor:
    """How many tokens of each image stay."""
    kept = [live_to_kept(n, ratio) for n, ratio in zip(lengths.tolist(), ratios, strict=True)]
    return torch.tensor(kept)


def chosen(importance: torch.Tensor, lengths: list[int], ratio: float) -> torch.Tensor:
    """What stays where each image loses the same share."""
    each = torch.tensor(lengths)
    return select_tokens(importance, each, kept_of(each, [ratio] * len(lengths)))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_choice_is_that_of_a_loop(seed: int, ratio: float, values: int) -> None:
    """Few values of importance make many ties."""
    lengths = torch.randint(1, 40, (7,)).tolist()
    importance = torch.randint(values, (sum(lengths),)).float() / values
    keep = chosen(importance, lengths, ratio)
    assert keep.dtype == torch.bool
    assert keep.tolist() == slow_choice(importance.tolist(), lengths, [ratio] * 7)


@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_each_image_loses_its_own_share(draw: random.Random, seed: int, values: int) -> None:
    for _ in range(20):
        lengths = torch.randint(1, 40, (draw.randrange(1, 9),))
        ratios = [draw.choice(RATIOS) for _ in lengths]
        importance = torch.randint(values, (int(lengths.sum()),)).float() / values
        keep = select_tokens(importance, lengths, kept_of(lengths, ratios))
        assert keep.tolist() == slow_choice(importance.tolist(), lengths.tolist(), ratios)


def test_as_many_stay_as_are_asked_for(seed: int) -> None:
    lengths = torch.randint(1, 577, (200,))
    kept = (lengths * torch.rand(200)).long() + 1
    keep = select_tokens(torch.rand(int(lengths.sum())), lengths, kept)
    assert [int(part.sum()) for part in keep.split(lengths.tolist())] == kept.tolist()


def test_ties_go_to_the_earlier_token() -> None:
    keep = chosen(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0]), [4, 3], 0.5)
    assert keep.tolist() == [True, True, False, False, False, True, True]


def test_a_row_that_must_live_is_kept() -> None:
    """Infinite importance is how a caller protects a row."""
    importance = torch.tensor([5.0, 4.0, 3.0, math.inf])
    assert chosen(importance, [4], 0.75).tolist() == [False, False, False, True]


@pytest.mark.parametrize("ratio", [0.5, 0.999])
def test_one_live_token_is_kept(ratio: float) -> None:
    assert chosen(torch.zeros(3), [1, 1, 1], ratio).tolist() == [True] * 3


def test_ratio_zero_keeps_all(seed: int) -> None:
    assert chosen(torch.rand(30), [10, 20], 0.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(seed: int, dtype: torch.dtype) -> None:
    """Rounding to 16 bits makes ties; they count as such."""
    importance = torch.rand(53).to(dtype)
    expected = slow_choice(importance.double().tolist(), [50, 3], [0.6, 0.3])
    lengths = torch.tensor([50, 3])
    assert select_tokens(importance, lengths, kept_of(lengths, [0.6, 0.3])).tolist() == expected


def test_images_do_not_influence_each_other(seed: int) -> None:
    lengths, ratios = torch.tensor([9, 30, 1, 17]), [0.5, 0.9, 0.5, 0.0]
    importance = torch.rand(57)
    alone = [
        chosen(part, [len(part)], ratio)
        for part, ratio in zip(importance.split(lengths.tolist()), ratios, strict=True)
    ]
    assert torch.equal(select_tokens(importance, lengths, kept_of(lengths, ratios)), torch.cat(alone))


# ---- a step ---------------------------------------------------------------------------------------

PATCHES = 12
# Of the levels of a step's images, by number.
LEVEL_RATIOS = (0.0, 0.25, 0.5, 0.9)


def random_step(draw: random.Random) -> Step:
    """Requests of text and images, each image with any live tokens and at any level."""
    starts, first_rows = [0], list[int]()
    while len(starts) < 4 or not first_rows:
        row = starts[-1] + draw.randrange(4)
        for _ in range(draw.randrange(4)):
            first_rows.append(row)
            row += PATCHES + draw.choice([0, 0, 1, 3])
        starts.append(row + draw.choice([0, 1, 5]))
    live = [draw.randrange(1, PATCHES + 1) for _ in first_rows]
    owner = torch.stack(
        [
            torch.cat([torch.arange(n), torch.randint(n, (PATCHES - n,))])[torch.randperm(PATCHES)]
            for n in live
        ]
    )
    level = torch.randint(len(LEVEL_RATIOS), (len(live),))
    token_ids = torch.zeros(starts[-1], dtype=torch.int32)
    images = StepImages.of(first_rows, owner, level, LEVEL_RATIOS, token_ids)
    assert images.counts == live
    assert images.ratios == [LEVEL_RATIOS[number] for number in level.tolist()]
    return Step(torch.arange(starts[-1]), starts, images, plan_text_rows(starts[-1]))


def test_a_step_keeps_of_each_image_what_its_level_leaves(
    draw: random.Random, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "sum_over_ranks", lambda part: part)
    for _ in range(60):
        step = random_step(draw)
        images, lower = step.images, step.lower_rows()
        assert images is not None
        importance = torch.randint(5, lower.rows.shape).float()
        asked = importance.clone()
        # The row at a prompt's end answers for it, also where it belongs to an image of which tokens go.
        asked[lower.row_of[[query.row for query in step.ranking_queries]]] = math.inf
        wanted = torch.ones(lower.rows.shape[0], dtype=torch.bool)
        for image, ratio in enumerate(images.ratios):
            own = lower.image == image
            length = int(own.sum())
            wanted[own] = torch.tensor(slow_choice(asked[own].tolist(), [length], [ratio]))
            assert images.kept_counts[image] == int(wanted[own].sum())
        upper = step.upper_rows(lower, importance, heads=4)
        assert torch.equal(upper.rows, lower.rows[wanted])
        for image, ratio in enumerate(images.ratios):
            if ratio == 0:
                assert torch.equal(
                    upper.stored_at[upper.image == image], lower.stored_at[lower.image == image]
                )
