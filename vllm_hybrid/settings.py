"""What the server's configuration must be for reduced image tokens, checked and set before it starts.

vLLM calls :class:`HybridSettings` by architecture name. Whatever would give wrong answers is refused
here in one sentence; what has to differ from vLLM's defaults is set here, and only where something is
switched on.
"""

from __future__ import annotations

import importlib.util
import os

from transformers import PretrainedConfig
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from . import request_checks
from .checkpoint import check_shape, merging_layers
from .config import HybridConfig

# vLLM shows what its own loggers and those below them say.
logger = init_logger(f"vllm.{__name__}")

DEFAULT_BLOCK_SIZE = 16
FLASHINFER_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
GRAPH_MODES = ("default", "NONE", "FULL_DECODE_ONLY")


def num_patches(hf_config: PretrainedConfig) -> int:
    """Patches, and so prompt positions, of one image."""
    side = hf_config.vision_config.image_size // hf_config.vision_config.patch_size
    return side * side


def hybrid_config(hf_config: PretrainedConfig) -> HybridConfig:
    """The checkpoint's (or --hf-overrides') ``hybrid`` section, validated.

    Raises:
        ValueError: a key or value is wrong; the message names it.

    """
    return HybridConfig.parse(
        getattr(hf_config, "hybrid", None),
        vision_layers=merging_layers(hf_config),
        decoder_layers=hf_config.text_config.num_hidden_layers,
    )


class HybridSettings(VerifyAndUpdateConfig):
    """vLLM's hook for a model that needs its own configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check and complete the configuration.

        Raises:
            ValueError: the checkpoint or an option cannot be served; one sentence says which and why.

        """
        hf_config = vllm_config.model_config.hf_config
        check_shape(hf_config)
        hybrid = hybrid_config(hf_config)
        if current_platform.is_cuda():
            sample_without_flashinfer()
        if not hybrid.active:
            logger.info("vllm-hybrid: no merging, no pruning: vLLM's own LLaVA serves.")
            return
        for problem in unsupported_options(vllm_config, hybrid):
            raise ValueError(problem)
        _complete(vllm_config, hybrid)
        request_checks.activate()
        logger.info("vllm-hybrid: %s", describe(hybrid))


def sample_without_flashinfer() -> None:
    """Have vLLM sample with its own kernels where FlashInfer is not installed.

    vLLM's CUDA sampler imports FlashInfer, which not every installation has, unless
    VLLM_USE_FLASHINFER_SAMPLER says otherwise; set here, all processes of the server inherit it.

    Raises:
        ValueError: the environment asks for FlashInfer's sampler, which is not there.

    """
    if importlib.util.find_spec("flashinfer") is not None:
        return
    # Not vLLM's view of the environment, which is frozen once an engine has run in this process.
    asked = os.environ.setdefault(FLASHINFER_SAMPLER, "0")
    if asked != "0":
        raise ValueError(
            f"{FLASHINFER_SAMPLER}={asked} asks for flashinfer, which is not installed; install "
            "flashinfer-python or unset the variable"
        )
    logger.info("vllm-hybrid: flashinfer is not installed; vLLM's own kernels sample.")


def _graph_mode(vllm_config: VllmConfig) -> str:
    mode = vllm_config.compilation_config.cudagraph_mode
    return "default" if mode is None else mode.name


def describe(hybrid: HybridConfig) -> str:
    """One line that says what is switched on."""
    parts = []
    if hybrid.merges:
        level = f" (level {hybrid.level})" if hybrid.level else ""
        parts.append(f"merging in the vision tower{level}, virtual unmerging")
    if hybrid.prunes:
        parts.append(
            f"FastV pruning after layer {hybrid.fastv_layer} of {hybrid.fastv_ratio:g} of an image's tokens"
        )
    return ", ".join(parts) + "."


def unsupported_options(vllm_config: VllmConfig, hybrid: HybridConfig) -> list[str]:
    """Every option that is set and would be wrong with reduced image tokens, a sentence each."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    transfer = (vllm_config.kv_transfer_config, getattr(vllm_config, "ec_transfer_config", None))
    dtype = vllm_config.cache_config.cache_dtype
    refused = {
        "LoRA adapters (--enable-lora)": vllm_config.lora_config is not None,
        f"pipeline parallelism (--pipeline-parallel-size {parallel.pipeline_parallel_size})": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "a disabled hybrid KV-cache manager (--disable-hybrid-kv-cache-manager)": bool(
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "KV or encoder-cache transfer (--kv-transfer-config, --ec-transfer-config)": any(
            t is not None for t in transfer
        ),
        "decode or prefill context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batching (--enable-dbo)": bool(parallel.enable_dbo),
        f"a quantised KV cache (--kv-cache-dtype {dtype})": dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        f"the {vllm_config.model_config.runner_type} runner (--runner)": (
            vllm_config.model_config.runner_type != "generate"
        ),
        f"a scheduler of your own (--scheduler-cls {scheduler.scheduler_cls})": scheduler.scheduler_cls
        is not None,
        f"a worker of your own (--worker-cls {parallel.worker_cls})": parallel.worker_cls != "auto",
        f"the {current_platform.device_name} platform": not (
            current_platform.is_cpu() or current_platform.is_cuda()
        ),
        "vLLM's V1 model runner on CUDA (VLLM_USE_V2_MODEL_RUNNER=0)": (
            current_platform.is_cuda() and not vllm_config.use_v2_model_runner
        ),
        f"CUDA graphs of prefill steps (cudagraph_mode {_graph_mode(vllm_config)})": (
            current_platform.is_cuda() and _graph_mode(vllm_config) not in GRAPH_MODES
        ),
        f"splitting prompts (--long-prefill-token-threshold {scheduler.long_prefill_token_threshold})": (
            hybrid.prunes and scheduler.long_prefill_token_threshold > 0
        ),
    }
    return [
        f"{feature} is not supported with reduced image tokens; turn it off, or serve the full model with "
        """--hf-overrides '{"hybrid": null}'"""
        for feature, is_set in refused.items()
        if is_set
    ]


def _complete(vllm_config: VllmConfig, hybrid: HybridConfig) -> None:
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    if not cache.user_specified_block_size:
        # Only whole blocks inside a hole can be given back, so blocks should be small.
        cache.block_size = DEFAULT_BLOCK_SIZE
        cache.user_specified_block_size = True
    # An image's hole is known only once all of it is there.
    scheduler.disable_chunked_mm_input = True
    if hybrid.prunes:
        _fit_prompts_in_a_step(vllm_config)
    if current_platform.is_cuda():
        # A step with images computes fewer rows than vLLM counts, which is what its other graphs go by.
        if vllm_config.compilation_config.cudagraph_mode is None:
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        vllm_config.parallel_config.worker_cls = "vllm_hybrid.cuda_worker.HybridCUDAWorker"
    else:
        vllm_config.parallel_config.worker_cls = "vllm_hybrid.cpu_worker.HybridCPUWorker"
    scheduler.scheduler_cls = "vllm_hybrid.scheduler.make_scheduler"


def _fit_prompts_in_a_step(vllm_config: VllmConfig) -> None:
    """FastV ranks by the last prompt position, so a prompt with images is prefilled in one step."""
    scheduler = vllm_config.scheduler_config
    needed = vllm_config.model_config.max_model_len + scheduler.max_num_seqs
    if scheduler.max_num_batched_tokens >= needed:
        return
    logger.info(
        "vllm-hybrid: max_num_batched_tokens raised from %d to %d, so that any prompt fits in one step.",
        scheduler.max_num_batched_tokens,
        needed,
    )
    scheduler.max_num_batched_tokens = needed
    scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, needed)
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, needed)
