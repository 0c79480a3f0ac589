"""Batches encoded in shares: every rank has the whole batch in the end, whatever shares come to."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from tests.support.rank_threads import RankThreads
from vllm_hybrid.method.token_merging import LiveTokens
from vllm_hybrid.models.picture_shares import Ranks, no_tokens, share_out

PATCHES, CHANNELS = 9, 4


def encoded(images: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each image features [live, C] and owners [P], of which every live token has a patch."""
    made = []
    for live in random.choices(range(1, PATCHES + 1), k=images):
        owner = torch.cat([torch.arange(live), torch.randint(live, (PATCHES - live,))])
        made.append((torch.randn(live, CHANNELS).to(dtype), owner[torch.randperm(PATCHES)]))
    return made


def together(made: list[tuple[torch.Tensor, torch.Tensor]]) -> LiveTokens:
    """What a tower returns for these images."""
    counts = [len(features) for features, _ in made]
    return LiveTokens(
        features=torch.cat([features for features, _ in made]),
        image=torch.tensor([image for image, count in enumerate(counts) for _ in range(count)]),
        index=torch.tensor([index for count in counts for index in range(count)]),
        owner=torch.stack([owner for _, owner in made]),
        counts=counts,
    )


def sharing(
    images: int, dtype: torch.dtype, encode: Callable[[int, slice], LiveTokens]
) -> Callable[[Ranks], LiveTokens]:
    """A rank's work, which encodes its share of a batch by ``encode(rank, share)``."""
    nothing = no_tokens(PATCHES, torch.zeros(CHANNELS, dtype=dtype))
    return lambda ranks: share_out(lambda share: encode(ranks.own, share), images, nothing, ranks)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_neighbours_and_as_many_as_elsewhere_or_one_more(size: int) -> None:
    for images in range(1, 4 * size):
        shares = Ranks(size, 0, torch.clone).shares(images)
        assert len(shares) == size
        assert [image for share in shares for image in range(images)[share]] == list(range(images))
        counts = [share.stop - share.start for share in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "images"), [(2, 1), (2, 2), (2, 5), (3, 1), (3, 2), (3, 7)])
def test_every_rank_has_the_whole_batch(size: int, images: int, dtype: torch.dtype, seed: int) -> None:
    made, asked = encoded(images, dtype), list[int]()

    def encode(rank: int, share: slice) -> LiveTokens:
        asked.extend(range(images)[share])
        return together(made[share])

    group, wanted = RankThreads(size), together(made)
    for found in group.run(sharing(images, dtype, encode)):
        assert found.counts == wanted.counts and found.features.dtype == dtype
        for name in ("features", "image", "index", "owner"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert sorted(asked) == list(range(images))
    # Of a rank without a share too.
    assert group.exchanges == [2] * size


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (lambda ranks: ranks.own and ranks.gather(torch.zeros(2)), r"ranks \[0\] never came to exchange 0"),
        (lambda ranks: ranks.gather(torch.zeros(1 + ranks.own)), "exchange 0 with unlike tensors"),
        (
            lambda ranks: ranks.gather(torch.zeros(1, dtype=(torch.float32, torch.float16)[ranks.own])),
            "exchange 0 with unlike tensors",
        ),
        (lambda ranks: ranks.gather(torch.zeros(1, dtype=torch.int64)), "exchange 0 with whole numbers"),
    ],
    ids=["absent", "shape", "dtype", "whole numbers"],
)
def test_ranks_that_do_not_come_alike_are_noticed(work: Callable[[Ranks], object], sentence: str) -> None:
    """Of the ranks above, which real ones would wait for, or take for what they are not."""
    with pytest.raises(RuntimeError, match=sentence):
        RankThreads(2).run(work)
