"""FastV's choice against a loop over images."""

import math
from fractions import Fraction

import pytest
import torch

from vllm_hybrid.method.fastv import live_to_kept, select_tokens

RATIOS = (0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 0.999)


def slow_choice(importance: list[float], lengths: list[int], ratio: float) -> list[bool]:
    keep: list[bool] = []
    for length in lengths:
        own = importance[len(keep) : len(keep) + length]
        count = max(1, math.ceil(length - Fraction(str(ratio)) * length))
        best = sorted(range(length), key=lambda i: (-own[i], i))[:count]
        keep += [i in best for i in range(length)]
    return keep


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_choice_is_that_of_a_loop(seed: int, ratio: float, levels: int) -> None:
    """Few levels of importance make many ties."""
    lengths = torch.randint(1, 40, (7,))
    importance = torch.randint(levels, (int(lengths.sum()),)).float() / levels
    keep = select_tokens(importance, lengths, ratio)
    assert keep.dtype == torch.bool
    assert keep.tolist() == slow_choice(importance.tolist(), lengths.tolist(), ratio)


def test_every_count_is_the_schedulers(seed: int) -> None:
    """The worker's table and the scheduler's function agree for every n an image can have."""
    for ratio in RATIOS:
        for n in range(1, 577):
            keep = select_tokens(torch.rand(n), torch.tensor([n]), ratio)
            assert int(keep.sum()) == live_to_kept(n, ratio)


def test_ties_go_to_the_earlier_token() -> None:
    keep = select_tokens(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0]), torch.tensor([4, 3]), 0.5)
    assert keep.tolist() == [True, True, False, False, False, True, True]


def test_a_row_that_must_live_is_kept() -> None:
    """Infinite importance is how a caller protects a row."""
    importance = torch.tensor([5.0, 4.0, 3.0, math.inf])
    assert select_tokens(importance, torch.tensor([4]), 0.75).tolist() == [False, False, False, True]


@pytest.mark.parametrize("ratio", [0.5, 0.999])
def test_one_live_token_is_kept(ratio: float) -> None:
    assert select_tokens(torch.zeros(3), torch.tensor([1, 1, 1]), ratio).tolist() == [True] * 3


def test_ratio_zero_keeps_all(seed: int) -> None:
    assert select_tokens(torch.rand(30), torch.tensor([10, 20]), 0.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(seed: int, dtype: torch.dtype) -> None:
    """Rounding to 16 bits makes ties; they count as such."""
    lengths = torch.tensor([50, 3])
    importance = torch.rand(53).to(dtype)
    expected = slow_choice(importance.double().tolist(), lengths.tolist(), 0.6)
    assert select_tokens(importance, lengths, 0.6).tolist() == expected


def test_images_do_not_influence_each_other(seed: int) -> None:
    lengths = torch.tensor([9, 30, 1, 17])
    importance = torch.rand(57)
    alone = [
        select_tokens(part, torch.tensor([len(part)]), 0.5) for part in importance.split(lengths.tolist())
    ]
    assert torch.equal(select_tokens(importance, lengths, 0.5), torch.cat(alone))
