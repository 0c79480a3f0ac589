"""What the configuration hook refuses, sets and leaves alone; no engine is started."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.engines import STOCK, checkpoint
from vllm_hybrid.settings import (
    DEFAULT_BLOCK_SIZE,
    FLASHINFER_SAMPLER,
    HybridSettings,
    sample_without_flashinfer,
)

MERGES = {"thresholds": [0.9, 0.9, 0.9]}
PRUNES = {"fastv_layer": 2, "fastv_ratio": 0.5}


def configure(hybrid: Any, architecture: str | None = None, **options: Any) -> VllmConfig:
    """The configuration `vllm serve` would start with."""
    path = checkpoint(architecture=architecture) if architecture else checkpoint()
    usual: dict[str, Any] = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True}
    overrides = {} if architecture else {"hf_overrides": {"hybrid": hybrid}}
    return EngineArgs(model=str(path), **(usual | overrides | options)).create_engine_config()


@pytest.mark.parametrize(
    ("hybrid", "sentence"),
    [
        (
            {"thresholds": [0.9, 0.9]},
            "hybrid.thresholds has 2 entries, but the vision tower executes 3 layers",
        ),
        ({"fastv_layer": 8, "fastv_ratio": 0.5}, "hybrid.fastv_layer is 8, but the decoder has 8 layers"),
        ({"fastv_layer": 0, "fastv_ratio": 0.5}, "hybrid.fastv_layer is 0, but the decoder has 8 layers"),
        ({"fastv_ratio": 1}, "hybrid.fastv_ratio is 1; give a number from 0"),
        ({"fastv_ratio": -0.1}, "hybrid.fastv_ratio is -0.1; give a number from 0"),
        ({"ratio": 0.5}, "hybrid.ratio is not a known key"),
        ([0.9], r"hybrid is \[0.9\]; give an object"),
    ],
)
def test_a_wrong_section_is_refused(hybrid: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        configure(hybrid)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"enable_lora": True}, "LoRA adapters"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                }
            },
            "speculative decoding",
        ),
        ({"kv_cache_dtype": "fp8"}, "a quantised KV cache"),
        ({"disable_hybrid_kv_cache_manager": True}, "a disabled hybrid KV-cache manager"),
    ],
)
@pytest.mark.parametrize("hybrid", [MERGES, PRUNES], ids=["merging", "pruning"])
def test_an_unsupported_option_is_refused(hybrid: Any, options: dict[str, Any], feature: str) -> None:
    with pytest.raises(
        ValueError, match=f"{feature}.* is not supported with reduced image tokens; turn it off"
    ):
        configure(hybrid, **options)


def test_a_long_prefill_threshold_is_refused_only_where_tokens_are_pruned() -> None:
    with pytest.raises(ValueError, match="splitting prompts"):
        configure(PRUNES, long_prefill_token_threshold=700)
    configure(MERGES, long_prefill_token_threshold=700)


@pytest.mark.parametrize("hybrid", [MERGES, PRUNES], ids=["merging", "pruning"])
def test_blocks_are_small_unless_the_user_chose(hybrid: Any) -> None:
    assert configure(hybrid).cache_config.block_size == DEFAULT_BLOCK_SIZE
    assert configure(hybrid, block_size=32).cache_config.block_size == 32


def test_any_prompt_fits_in_one_step_where_tokens_are_pruned() -> None:
    options = {"max_num_batched_tokens": 1024, "max_num_seqs": 8}
    assert configure(PRUNES, **options).scheduler_config.max_num_batched_tokens == 2048 + 8
    assert configure(MERGES, **options).scheduler_config.max_num_batched_tokens == 1024
    enough = options | {"max_num_batched_tokens": 4096}
    assert configure(PRUNES, **enough).scheduler_config.max_num_batched_tokens == 4096


@pytest.mark.parametrize("hybrid", [None, {}, {"fastv_ratio": 0}, {"thresholds": None}])
def test_nothing_switched_on_leaves_vllms_settings_alone(hybrid: Any) -> None:
    ours, stock = configure(hybrid), configure(None, STOCK)
    for name in ("max_num_batched_tokens", "scheduler_cls", "disable_chunked_mm_input", "async_scheduling"):
        assert getattr(ours.scheduler_config, name) == getattr(stock.scheduler_config, name)
    assert ours.cache_config.block_size == stock.cache_config.block_size
    assert ours.parallel_config.worker_cls == stock.parallel_config.worker_cls


@pytest.fixture
def without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    # Set first, so that what a test leaves behind is undone.
    monkeypatch.setenv(FLASHINFER_SAMPLER, "0")
    monkeypatch.delenv(FLASHINFER_SAMPLER)
    return monkeypatch


def test_a_start_without_flashinfer_samples_without_it(without_flashinfer: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        sample_without_flashinfer()
        assert os.environ[FLASHINFER_SAMPLER] == "0"


def test_every_start_on_cuda_looks_for_flashinfer(without_flashinfer: pytest.MonkeyPatch) -> None:
    """Also with nothing switched on."""
    hf_config = configure(None).model_config.hf_config
    cuda = SimpleNamespace(is_cuda=lambda: True)
    without_flashinfer.setattr("vllm_hybrid.settings.current_platform", cuda)
    given: Any = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    HybridSettings.verify_and_update_config(given)
    assert os.environ[FLASHINFER_SAMPLER] == "0"


def test_asking_for_an_absent_flashinfer_is_refused(without_flashinfer: pytest.MonkeyPatch) -> None:
    without_flashinfer.setenv(FLASHINFER_SAMPLER, "1")
    with pytest.raises(ValueError, match="VLLM_USE_FLASHINFER_SAMPLER=1 asks for flashinfer, which is not"):
        sample_without_flashinfer()


def test_flashinfer_where_it_is_installed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv(FLASHINFER_SAMPLER, raising=False)
    sample_without_flashinfer()
    assert FLASHINFER_SAMPLER not in os.environ
