"""Encoder outputs carry owners and levels exactly, and the model knows their live tokens."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vllm_hybrid.levels import MOST_LEVELS
from vllm_hybrid.models import encoder_output
from vllm_hybrid.models.llava import LlavaHybridForConditionalGeneration


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("patches", [576, 2880])
def test_features_owners_and_levels_come_back(patches: int, dtype: torch.dtype, seed: int) -> None:
    features = torch.randn(3, patches, 7).to(dtype)
    owner = torch.stack([torch.randperm(patches) for _ in range(3)])
    level = torch.randint(MOST_LEVELS, (3,))
    outputs = encoder_output.encode(features, owner, level)
    encoder_output.check(outputs, patches, 7)
    found, found_owner, found_level = encoder_output.decode(outputs)
    assert torch.equal(torch.stack(found), features) and torch.equal(found_owner, owner)
    assert found_level.dtype == torch.int64 and torch.equal(found_level, level)


def test_every_number_of_a_level_survives_bf16() -> None:
    level = torch.arange(MOST_LEVELS)
    owner = torch.zeros(MOST_LEVELS, 2, dtype=torch.int64)
    outputs = encoder_output.encode(torch.zeros(MOST_LEVELS, 2, 1).bfloat16(), owner, level)
    assert torch.equal(encoder_output.decode(outputs)[2], level)


def test_what_is_no_whole_output_is_refused() -> None:
    (whole,) = encoder_output.encode(torch.zeros(1, 6, 4), torch.zeros(1, 6).long(), torch.zeros(1).long())
    with pytest.raises(RuntimeError, match=r"image pieces of \[4\] rows, not whole images of 6"):
        encoder_output.check([whole[:4]], 6, 4)
    with pytest.raises(RuntimeError, match=r"encoder outputs of width \[4\], not 7"):
        encoder_output.check([whole[:, :4]], 6, 4)


def test_live_tokens_are_known_of_outputs_made_here_and_read_of_others(seed: int) -> None:
    model = LlavaHybridForConditionalGeneration.__new__(LlavaHybridForConditionalGeneration)
    model._live_counts = WeakTensorKeyDictionary()
    live = [1, 4, 6]
    owner = torch.stack([torch.randint(n, (6,)).index_fill(0, torch.tensor([2]), n - 1) for n in live])
    # What is known is not read again: a wrong number would come back.
    made = torch.zeros(3, 6, 4), owner, torch.tensor([1, 0, 2])
    known = model._remember(encoder_output.encode(*made), [11, 12, 13])
    others = encoder_output.encode(*made)
    assert model.live_counts([others[2], known[0], others[0], known[2], others[1]]) == [6, 11, 1, 13, 4]
    assert model.live_counts(known) == [11, 12, 13]
    assert len(model._live_counts) == 6
    del known, others
    gc.collect()
    assert len(model._live_counts) == 0
