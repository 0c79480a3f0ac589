"""What vLLM decides after the plugin's settings have looked at the configuration is looked at again."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import CUDAGraphMode, ECTransferConfig, KVTransferConfig, VllmConfig
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.configurations import MERGES, PRUNES, configure
from tests.support.engines import STOCK
from vllm_hybrid.models.llava import LlavaHybridForConditionalGeneration
from vllm_hybrid.startup import settings


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"kv_offloading_size": 1.0}, r"KV offloading \(--kv-offloading-size 1.0\)"),
        ({"mm_encoder_only": True}, r"a server of encoded images \(--mm-encoder-only\)"),
        ({"ubatch_size": 2}, r"micro-batching \(--enable-dbo, --ubatch-size\)"),
        ({"enable_prompt_embeds": True}, r"prompts given as embeddings \(--enable-prompt-embeds\)"),
    ],
)
@pytest.mark.parametrize("hybrid", [MERGES, PRUNES], ids=["merging", "pruning"])
def test_options_that_act_through_others_are_refused(
    hybrid: Any, options: dict[str, Any], feature: str
) -> None:
    with pytest.raises(
        ValueError, match=f"{feature} is not supported with reduced image tokens; turn it off"
    ):
        configure(hybrid, **options)


def test_a_front_end_that_asks_no_input_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match=r"front end in Rust \(VLLM_USE_RUST_FRONTEND=1\) is not supported"):
        configure(MERGES)


def decide(config: VllmConfig, decision: str) -> None:
    """Change a finished configuration as vLLM might, had an option asked for it."""
    if decision == "KV transfer":
        config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    elif decision == "encoder-cache transfer":
        config.ec_transfer_config = ECTransferConfig()
    elif decision == "no hybrid KV-cache manager":
        config.scheduler_config.disable_hybrid_kv_cache_manager = True
    elif decision == "context parallelism":
        config.parallel_config.decode_context_parallel_size = 2
    elif decision == "a quantised KV cache":
        config.cache_config.cache_dtype = "fp8_e4m3"
    elif decision == "another scheduler":
        config.scheduler_config.scheduler_cls = "vllm.v1.core.sched.scheduler.Scheduler"
    elif decision == "another worker":
        config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    else:
        raise ValueError(decision)


@pytest.mark.parametrize(
    "decision",
    [
        "KV transfer",
        "encoder-cache transfer",
        "no hybrid KV-cache manager",
        "context parallelism",
        "a quantised KV cache",
        "another scheduler",
        "another worker",
    ],
)
def test_a_late_decision_is_refused_before_an_engine_and_before_a_model(decision: str) -> None:
    config = configure(PRUNES)
    settings.check_options(config)
    decide(config, decision)
    with pytest.raises(ValueError, match="is not supported with reduced image tokens; turn it off"):
        InputProcessor(config)
    with pytest.raises(ValueError, match="is not supported with reduced image tokens; turn it off"):
        LlavaHybridForConditionalGeneration(vllm_config=config)


def test_late_graphs_of_prefill_steps_are_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    config = configure(PRUNES)
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, device_name="cuda")
    monkeypatch.setattr(settings, "current_platform", cuda)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY):
        config.compilation_config.cudagraph_mode = mode
        settings.check_options(config)
    for mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL):
        config.compilation_config.cudagraph_mode = mode
        with pytest.raises(ValueError, match=f"CUDA graphs of prefill steps .cudagraph_mode {mode.name}"):
            settings.check_options(config)


@pytest.mark.parametrize("architecture", [None, STOCK])
def test_where_nothing_is_reduced_everything_is_vllms_own_affair(architecture: str | None) -> None:
    config = configure(None, architecture, enable_prompt_embeds=True, kv_offloading_size=1.0)
    assert config.kv_transfer_config is not None
    assert not settings.reduces(config)
