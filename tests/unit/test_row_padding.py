"""Numbers of rows that products are given: few of them, little more than needed, and the same results."""

from __future__ import annotations

import torch

from vllm_hybrid.models.row_padding import bucket_size, map_row_chunks, pad_to_bucket


def test_rounding_adds_less_than_an_eighth_and_leaves_few_numbers() -> None:
    rounded = [bucket_size(rows) for rows in range(1, 20000)]
    for rows, number in enumerate(rounded, start=1):
        assert rows <= number < rows * 1.125
        assert bucket_size(number) == number
    assert rounded[:64] == list(range(1, 65))
    assert len(set(rounded[64:])) < 70
    assert bucket_size(0) == 0


def test_an_index_is_filled_up_with_rows_that_exist() -> None:
    picked = torch.arange(7, 1000, 3)
    filled = pad_to_bucket(picked)
    assert filled.shape[0] == bucket_size(len(picked)) > len(picked)
    assert torch.equal(filled[: len(picked)], picked)
    assert set(filled[len(picked) :].tolist()) == {7}
    few = torch.arange(5)
    assert pad_to_bucket(few) is few


def test_blocks_give_what_all_rows_at_once_give() -> None:
    weight = torch.randn(6, 9)
    seen = []

    def function(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape[0])
        return rows @ weight

    for count in (0, 1, 128, 1024, 2345):
        rows = torch.randn(count, 6)
        torch.testing.assert_close(map_row_chunks(function, rows), rows @ weight)
    assert seen == [0, 128, 128, 1024, 1024, 1024, 384]
