"""Page facts fit the KV cache they describe, and attention refuses a step that was not planned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_hybrid.attention import backend
from vllm_hybrid.attention.backend import HybridImpl, HybridMetadata
from vllm_hybrid.models.step import TierPages

PATCHES = 576
HEADS, BLOCK, WIDTH = 2, 16, 8


def cache(storage: torch.Tensor, blocks: int, block: int = BLOCK, heads: int = HEADS) -> torch.Tensor:
    """A layer's pages [blocks, heads, block, WIDTH] in layout BLNHC at the start of a storage."""
    pages = storage[: blocks * block * heads * WIDTH].view(blocks, block, heads, WIDTH)
    return pages.permute(0, 2, 1, 3)


@pytest.mark.parametrize(
    "larger", [{"blocks": 64}, {"blocks": 8, "block": 8}, {"blocks": 4, "block": 8, "heads": 4}]
)
def test_a_cache_of_another_shape_at_the_same_address_gets_facts_of_its_own(larger: dict[str, int]) -> None:
    """vLLM captures graphs on a small cache, frees it, and may get its address again for the real one."""
    storage = torch.zeros(64 * HEADS * BLOCK * WIDTH)
    pages = TierPages(PATCHES)
    pages.bind(cache(storage, 4))
    small = pages.facts
    real = cache(storage, **larger)
    pages.bind(real)
    assert pages.facts is not None and pages.facts is not small
    blocks, _, block_size, _ = real.shape
    assert pages.facts.shape[:2] == (blocks + 1, block_size) and pages.block_size == block_size


def test_the_same_cache_keeps_its_facts() -> None:
    storage = torch.zeros(4 * HEADS * BLOCK * WIDTH)
    pages = TierPages(PATCHES)
    pages.bind(cache(storage, 4))
    facts = pages.facts
    pages.bind(cache(storage, 4))
    assert pages.facts is facts


def test_facts_go_with_a_copied_block() -> None:
    """All are read before any is written: a block may be copied and written to in one step."""
    pages = TierPages(PATCHES)
    pages.bind(cache(torch.zeros(6 * HEADS * BLOCK * WIDTH), 6))
    assert pages.facts is not None
    with torch.inference_mode():
        pages.facts.copy_(torch.arange(pages.facts.numel()).view_as(pages.facts))
    before = pages.facts.clone()
    pages.copy_facts([(1, 4), (4, 2)])
    after = dict(enumerate(pages.facts)) | {4: before[4], 2: before[2]}
    assert torch.equal(pages.facts[4], before[1]) and torch.equal(pages.facts[2], before[4])
    assert all(torch.equal(after[block], before[block]) for block in range(len(before)))


def test_attention_refuses_a_step_whose_rows_were_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HYBRID_ATTENTION", "reference")
    configuration = SimpleNamespace(model_config=SimpleNamespace(max_model_len=8))
    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: configuration)
    layer = HybridImpl(2, 4, 0.5)
    rows = torch.ones(3, 2, 4)
    metadata = HybridMetadata(common=None)
    with pytest.raises(RuntimeError, match="before its rows were planned"):
        layer.forward(None, rows, rows, rows, torch.zeros(0), metadata, rows.clone())
    profiled = layer.forward(None, rows, rows, rows, torch.zeros(0), None, rows.clone())
    assert not profiled.any()
