"""The positions that rank images: on the host and on the device, against a slow reading of the definition."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from vllm_hybrid.method.ranking import header_end_rows, ranking_positions
from vllm_hybrid.method.row_plan import StepImages, plan_text_rows
from vllm_hybrid.models.step import Step


def slowly(token_ids: Sequence[int], image_ends: Sequence[int], header: Sequence[int], end: int) -> list[int]:
    """For each image the last position of the first header behind it, as the definition reads."""
    found = []
    for image_end in image_ends:
        wholly = [
            last
            for last in range(end)
            if header and image_end <= last - len(header) + 1
            if all(token_ids[last - len(header) + 1 + i] == token for i, token in enumerate(header))
        ]
        found.append(min(wholly, default=end - 1))
    return found


def test_by_hand() -> None:
    #      0  1  2  3  4  5  6  7  8  9
    ids = [5, 0, 0, 1, 2, 5, 0, 0, 1, 2]
    assert ranking_positions(ids, [3, 8], [1, 2], 10) == [4, 9]
    assert ranking_positions(ids, [3, 8], [1, 2], 9) == [4, 8]
    assert ranking_positions(ids, [3, 8], [2], 10) == [4, 9]
    assert ranking_positions(ids, [4], [1, 2], 10) == [9]
    assert ranking_positions(ids, [3, 8], [7], 10) == [9, 9]
    assert ranking_positions(ids, [3, 8], [], 10) == [9, 9]
    assert ranking_positions(ids, [10], [1, 2], 10) == [9]
    assert ranking_positions(ids, [], [1, 2], 10) == []


def test_host_and_device_read_the_definition(draw: random.Random) -> None:
    """Few different ids, so that headers are frequent, overlap each other and cross every border."""
    for _ in range(1500):
        ids = [draw.randrange(3) for _ in range(draw.randrange(1, 30))]
        header = [draw.randrange(3) for _ in range(draw.randrange(4))]
        image_ends = sorted(draw.randrange(1, len(ids) + 1) for _ in range(draw.randrange(4)))
        end = draw.randrange(max(image_ends, default=1), len(ids) + 1)
        wanted = slowly(ids, image_ends, header, end)
        assert ranking_positions(ids, image_ends, header, end) == wanted
        if header:
            rows = header_end_rows(
                torch.tensor(ids).int(), torch.tensor(image_ends).long(), torch.tensor(header)
            )
            assert [min(row, end - 1) for row in rows.tolist()] == wanted
            missing = [row for row, last in zip(rows.tolist(), wanted, strict=True) if row >= len(ids)]
            assert set(missing) <= {len(ids)}


PATCHES, IMAGE, HEADER = 4, 9, (1, 2)


def step_of(requests: list[list[int]], header: Sequence[int], kept: Sequence[int] = ()) -> Step:
    """A step of whole requests, given by their token ids; PATCHES ids IMAGE in a row are an image.

    Of the images whose numbers are in ``kept`` no token is dropped.
    """
    ids = [token for request in requests for token in request]
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + len(request))
    places = [row for row, token in enumerate(ids) if token == IMAGE]
    owner = torch.arange(PATCHES).expand(len(places) // PATCHES, -1)
    level = torch.tensor([int(image not in kept) for image in range(len(owner))], dtype=torch.int64)
    images = StepImages.of(places[::PATCHES], owner, level, [0.0, 0.5], torch.tensor(ids), header)
    return Step(torch.arange(len(ids)), starts, images, plan_text_rows(len(ids)))


def ranked(step: Step) -> list[tuple[int, int, int]]:
    return [(query.request, query.first_row, query.row) for query in step.ranking_queries]


IMG = [IMAGE] * PATCHES


@pytest.mark.parametrize(
    ("requests", "turns", "ends"),
    [
        ([[5, *IMG, 6, 1, 2]], [(0, 1, 7)], [(0, 1, 7)]),
        ([[*IMG, 1, 2, 7, *IMG, 8, 1, 2]], [(0, 0, 5), (0, 7, 13)], [(0, 0, 13)]),
        # Both images belong to the first turn; what follows ranks nothing.
        ([[*IMG, 3, *IMG, 1, 2, 7, 1, 2]], [(0, 0, 10)], [(0, 0, 13)]),
        # An image before the header of another one, and one that ends its request.
        ([[*IMG, 1, 2, *IMG]], [(0, 0, 5), (0, 6, 9)], [(0, 0, 9)]),
        # The header of the next request, and one that only both together make.
        ([[*IMG, 3], [5, 1, 2], [*IMG, 1, 2, 4]], [(0, 0, 4), (2, 8, 13)], [(0, 0, 4), (2, 8, 14)]),
        ([[*IMG, 1], [2, *IMG, 1, 2]], [(0, 0, 4), (1, 6, 11)], [(0, 0, 4), (1, 6, 11)]),
        ([[3], [*IMG]], [(1, 1, 4)], [(1, 1, 4)]),
    ],
)
def test_a_step_s_ranking_queries(
    requests: list[list[int]], turns: list[tuple[int, int, int]], ends: list[tuple[int, int, int]]
) -> None:
    assert ranked(step_of(requests, HEADER)) == turns
    assert ranked(step_of(requests, ())) == ends
    assert ranked(step_of(requests, HEADER, kept=range(9))) == []


@pytest.mark.parametrize(
    ("kept", "turns", "ends"),
    [
        ([0], [(0, 7, 13), (1, 15, 20)], [(0, 7, 13), (1, 15, 20)]),
        ([1], [(0, 0, 5), (1, 15, 20)], [(0, 0, 13), (1, 15, 20)]),
        ([2], [(0, 0, 5), (0, 7, 13)], [(0, 0, 13)]),
        ([0, 2], [(0, 7, 13)], [(0, 7, 13)]),
    ],
)
def test_images_that_lose_nothing_have_no_ranking_query(
    kept: list[int], turns: list[tuple[int, int, int]], ends: list[tuple[int, int, int]]
) -> None:
    requests = [[*IMG, 1, 2, 7, *IMG, 8, 1, 2], [5, *IMG, 1, 2]]
    assert ranked(step_of(requests, HEADER, kept)) == turns
    assert ranked(step_of(requests, (), kept)) == ends


def test_a_step_of_text_ranks_nothing() -> None:
    assert Step(torch.arange(3), [0, 3], None, plan_text_rows(3)).ranking_queries == []


def test_a_step_ranks_where_its_prompts_say(draw: random.Random) -> None:
    """Whole prompts, several in a step, and some images of which nothing is dropped."""
    for _ in range(300):
        requests, wanted, before = list[list[int]](), list[int](), 0
        for _ in range(draw.randrange(1, 4)):
            ids = list[int]()
            for _ in range(draw.randrange(5)):
                ids += draw.choice([IMG, [*HEADER], [draw.randrange(5)], [1, 1, 2]])
            ids.append(draw.randrange(5))
            places = [position for position, token in enumerate(ids) if token == IMAGE]
            image_ends = [last + 1 for last in places[PATCHES - 1 :: PATCHES]]
            wanted += [before + row for row in ranking_positions(ids, image_ends, HEADER, len(ids))]
            before += len(ids)
            requests.append(ids)
        if not wanted:
            continue
        kept = [image for image in range(len(wanted)) if draw.random() < 0.3]
        step = step_of(requests, HEADER, kept)
        queries = step.ranking_queries
        assert step.images is not None
        images = list(zip(step.images.first_rows, wanted, strict=True))
        pruned = [image for number, image in enumerate(images) if number not in kept]
        assert sorted({row for _, row in pruned}) == [query.row for query in queries]
        for first_row, row in pruned:
            covering = [q.row for q in queries if q.first_row <= first_row <= q.row]
            assert covering == [row]
