"""What the server's configuration must be for reduced image tokens, checked and set before it starts.

vLLM calls :class:`HybridSettings` by architecture name. Whatever would give wrong answers is refused
here in one sentence; what has to differ from vLLM's defaults is set here, and only where something is
switched on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig
from vllm.config import CUDAGraphMode, ModelConfig, SchedulerConfig, VllmConfig
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES, QuantizationConfigArgs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_hybrid.attention.select import compiles_cpp, serves_kv_dtype
from vllm_hybrid.checkpoint.llava import ARCHITECTURE, check_format, check_shape, merging_layers, read_config
from vllm_hybrid.checkpoint.weights import check_weights
from vllm_hybrid.config import PROMPT_END, TURN_END, HybridConfig
from vllm_hybrid.environment.compilers import c_compiler, cpp_compiler
from vllm_hybrid.environment.faults import ADVICE
from vllm_hybrid.environment.last_words import announced
from vllm_hybrid.levels import HIGH, LOW, Level
from vllm_hybrid.startup import overrides

# vLLM shows what its own loggers and those below them say.
logger = init_logger(f"vllm.{__name__}")

DEFAULT_BLOCK_SIZE = 16
FLASHINFER_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
RUST_FRONT_END = "VLLM_USE_RUST_FRONTEND"
SCHEDULER = "vllm_hybrid.engine.scheduler.make_scheduler"
WORKERS = {
    "cpu": "vllm_hybrid.engine.cpu_worker.HybridCPUWorker",
    "cuda": "vllm_hybrid.engine.cuda_worker.HybridCUDAWorker",
}
# Ways of loading that read safetensors files where there are any.
CHECKED_FORMATS = ("auto", "hf", "safetensors")
# A key of vLLM's --model-loader-extra-config.
TRACKS_WEIGHTS = "enable_weights_track"
# Of each, what it means; a process has one model, or a few one after the other.
_REMEMBERED_SECTIONS = 16
GRAPH_MODES = ("default", "NONE", "FULL_DECODE_ONLY")
RANKED_BY = {
    PROMPT_END: "the prompt's last position",
    TURN_END: "the end of the first assistant header behind it",
}


def num_patches(hf_config: PretrainedConfig) -> int:
    """Patches, and so prompt positions, of one image."""
    side = hf_config.vision_config.image_size // hf_config.vision_config.patch_size
    return side * side


def hybrid_config(hf_config: PretrainedConfig) -> HybridConfig:
    """The checkpoint's (or --hf-overrides') ``hybrid`` section, validated.

    Raises:
        ValueError: a key or value is wrong; the message names it.

    """
    section = pickle.dumps(getattr(hf_config, "hybrid", None))
    return _parsed(section, merging_layers(hf_config), hf_config.text_config.num_hidden_layers)


# Every request asks. Kept by what a section says, not by whose it is: configurations can be written to, and
# have no hash.
@functools.lru_cache(maxsize=_REMEMBERED_SECTIONS)
def _parsed(section: bytes, vision_layers: int, decoder_layers: int) -> HybridConfig:
    return HybridConfig.parse(
        pickle.loads(section), vision_layers=vision_layers, decoder_layers=decoder_layers
    )


class HybridSettings(VerifyAndUpdateConfig):
    """vLLM's hooks for a model that needs its own configuration."""

    @staticmethod
    @announced
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Let an override of the ``hybrid`` section change the keys that it names, and no others.

        Raises:
            ValueError: the override has an unknown key.

        """
        overrides.apply(model_config)

    @staticmethod
    @announced
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check and complete the configuration.

        Raises:
            ValueError: the checkpoint or an option cannot be served; one sentence says which and why.

        """
        model_config = vllm_config.model_config
        check_shape(model_config.hf_config)
        hybrid = hybrid_config(model_config.hf_config)
        check_files(vllm_config)
        _demand_all_weights(vllm_config)
        if current_platform.is_cuda():
            sample_without_flashinfer()
        give_ranks_whole_towers(vllm_config)
        if hybrid.active:
            check_options(vllm_config)
            check_compiler()
            _complete(vllm_config, hybrid)
        logger.info("vllm-hybrid: %s", describe(hybrid, overrides.applied(model_config)))


def check_files(vllm_config: VllmConfig) -> None:
    """Refuse a checkpoint's folder whose files vLLM would fail on, or take for another model's.

    A checkpoint that vLLM downloads is not there yet, and weights of other kinds than safetensors, or none,
    are vLLM's own business.

    Raises:
        ValueError: the first fault, in one sentence.

    """
    model_config = vllm_config.model_config
    source = Path(model_config.hf_config_path or model_config.model)
    if source.is_dir():
        # What an override calls the model counts, not what its configuration does.
        served = {
            "architectures": [model_config.architecture],
            "model_type": model_config.hf_config.model_type,
        }
        check_format(source, read_config(source) | served)
    folder = Path(model_config.model)
    if vllm_config.load_config.load_format in CHECKED_FORMATS and any(folder.glob("*.safetensors")):
        # What vLLM quantises itself is plain in the checkpoint.
        quantised = model_config.quantization not in (None, *ONLINE_QUANT_SHORTHAND_NAMES)
        check_weights(folder, model_config.hf_config, quantised=quantised)


def _demand_all_weights(vllm_config: VllmConfig) -> None:
    """Have vLLM's loader end the start where a quantised checkpoint lacks a weight.

    By itself it looks only where nothing is quantised. An int8 checkpoint whose configuration leaves a part
    out by a name that this model does not have would have that part's weights cut to integers, and serve.
    """
    load = vllm_config.load_config
    extra = load.model_loader_extra_config
    quantised = vllm_config.model_config.quantization is not None
    if quantised and load.load_format in CHECKED_FORMATS and isinstance(extra, dict):
        load.model_loader_extra_config = {TRACKS_WEIGHTS: True} | extra


def check_compiler() -> None:
    """See that what has yet to be compiled can be, which a worker would only find out later.

    Raises:
        ValueError: the C++ attention cannot be compiled, and was not before.

    """
    if compiles_cpp():
        from vllm_hybrid.attention.cpu import extension_is_compiled

        compiler = cpp_compiler()
        if compiler.gap and not (compiler.is_there and extension_is_compiled()):
            raise ValueError(
                f"the CPU attention is C++, and its compiler {compiler.name!r} does not serve "
                f"({compiler.gap}): {compiler.remedy}; {ADVICE}"
            )
    elif current_platform.is_cuda() and (compiler := c_compiler()).gap:
        # What Triton compiled before lies in its cache, so this need be no fault.
        logger.warning(
            "vllm-hybrid: Triton may fail to compile, for its C compiler %r does not serve (%s): %s; %s",
            compiler.name,
            compiler.gap,
            compiler.remedy,
            ADVICE,
        )


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


def give_ranks_whole_towers(vllm_config: VllmConfig) -> None:
    """Have every rank hold all of the vision tower where its heads cannot be divided among them.

    Each then encodes its share of the pictures. vLLM would fail when it builds the tower, whose heads it
    divides unless ``--mm-encoder-tp-mode`` is ``data``. The language model's heads are vLLM's to check.
    """
    model = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    heads = model.hf_config.vision_config.num_attention_heads
    if heads % ranks == 0 or model.multimodal_config.mm_encoder_tp_mode == "data":
        return
    logger.info(
        "vllm-hybrid: --mm-encoder-tp-mode set from weights to data, because the vision tower's %d heads "
        "cannot be divided by %d: each rank has the whole tower and encodes its share of the pictures.",
        heads,
        ranks,
    )
    model.multimodal_config.mm_encoder_tp_mode = "data"


def _graph_mode(vllm_config: VllmConfig) -> str:
    mode = vllm_config.compilation_config.cudagraph_mode
    return "default" if mode is None else mode.name


def describe(hybrid: HybridConfig, overridden: Sequence[str] = ()) -> str:
    """What is switched on, by level, what a picture's ``detail`` means, and what was overridden."""
    sentences = ["No merging, no pruning: vLLM's own LLaVA serves."]
    if hybrid.active:
        said = [f"without a detail: {hybrid.levels.default.name}"]
        meant = dict(hybrid.levels.details)
        said += [f"detail {detail}: {meant[detail]}" for detail in (LOW, HIGH) if detail in meant]
        sentences = [
            f"Levels: {', '.join(f'{level.name} {_does(level)}' for level in hybrid.levels)}.",
            f"Pictures {'; '.join(said)}.",
        ]
    if hybrid.prunes:
        rank = RANKED_BY[hybrid.fastv_rank]
        sentences.append(f"FastV drops tokens after layer {hybrid.fastv_layer}, ranked by {rank}.")
    if overridden:
        sentences.append(f"Overridden: {'; '.join(overridden)}.")
    return " ".join(sentences)


def _does(level: Level) -> str:
    """What a level does with a picture's tokens."""
    parts = ["merges"] if level.merges else []
    if level.prunes:
        parts.append(f"drops {level.fastv_ratio:g}")
    return " and ".join(parts) or "keeps all"


def reduces(vllm_config: VllmConfig) -> bool:
    """Whether a configuration is of our architecture with anything switched on."""
    model = vllm_config.model_config
    return model is not None and model.architecture == ARCHITECTURE and hybrid_config(model.hf_config).active


@announced
def check_options(vllm_config: VllmConfig) -> None:
    """Refuse options that would be wrong with reduced image tokens.

    :class:`HybridSettings` asks first, and an engine again once vLLM has decided everything.

    Raises:
        ValueError: an option cannot be served; one sentence says which and why.

    """
    for problem in unsupported_options(vllm_config, hybrid_config(vllm_config.model_config.hf_config)):
        raise ValueError(problem)


def unsupported_options(vllm_config: VllmConfig, hybrid: HybridConfig) -> list[str]:
    """Every option that is set and would be wrong with reduced image tokens, a sentence each.

    Some options name others, which vLLM sets only later, so both are looked at; and all are looked at again
    when everything is decided (:func:`check_options`).
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    cache, model = vllm_config.cache_config, vllm_config.model_config
    transfer = (vllm_config.kv_transfer_config, getattr(vllm_config, "ec_transfer_config", None))
    refused = {
        "LoRA adapters (--enable-lora)": vllm_config.lora_config is not None,
        f"pipeline parallelism (--pipeline-parallel-size {parallel.pipeline_parallel_size})": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "a disabled hybrid KV-cache manager (--disable-hybrid-kv-cache-manager)": bool(
            scheduler.disable_hybrid_kv_cache_manager
        ),
        f"KV offloading (--kv-offloading-size {cache.kv_offloading_size})": (
            cache.kv_offloading_size is not None
        ),
        "KV or encoder-cache transfer (--kv-transfer-config, --ec-transfer-config)": any(
            t is not None for t in transfer
        ),
        "decode or prefill context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batching (--enable-dbo, --ubatch-size)": bool(parallel.use_ubatching),
        f"a quantised KV cache (--kv-cache-dtype {cache.cache_dtype}) other than fp8 on a GPU of compute "
        "capability 8.9 or later": not serves_kv_dtype(cache.cache_dtype),
        "a KV cache of several dtypes (--kv-cache-dtype-skip-layers)": bool(cache.kv_cache_dtype_skip_layers),
        "a KV cache with scales for each head (kv_cache_scheme of the checkpoint)": _scales_heads(
            vllm_config
        ),
        f"quantising experts alone (--quantization {model.quantization}), which this model does not have,": (
            _quantises_experts_alone(model)
        ),
        "prompts given as embeddings (--enable-prompt-embeds)": bool(model.enable_prompt_embeds),
        # Its requests reach the engine unchecked. vLLM's own view of the environment may be frozen.
        f"vLLM's front end in Rust ({RUST_FRONT_END}=1)": os.environ.get(RUST_FRONT_END, "0")
        not in ("", "0"),
        "a server of encoded images (--mm-encoder-only)": bool(vllm_config.is_mm_encoder_only),
        f"the {model.runner_type} runner (--runner)": model.runner_type != "generate",
        "an encoder cache manager of your own (--ec-manager-config)": (
            vllm_config.ec_manager_config.encoder_cache_manager_cls is not None
        ),
        f"a scheduler of your own (--scheduler-cls {scheduler.scheduler_cls})": scheduler.scheduler_cls
        not in (None, SCHEDULER),
        f"a worker of your own (--worker-cls {parallel.worker_cls})": parallel.worker_cls
        not in ("auto", *WORKERS.values()),
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


def _scales_heads(vllm_config: VllmConfig) -> bool:
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    return scheme is not None and scheme.get("strategy") == "attn_head"


def _quantises_experts_alone(model: ModelConfig) -> bool:
    """Whether vLLM is to quantise plain weights, but those of no linear layer."""
    asked = model.quantization_config
    online = model.quantization in ONLINE_QUANT_SHORTHAND_NAMES
    return online and isinstance(asked, QuantizationConfigArgs) and asked.linear is None and not asked.targets


def _complete(vllm_config: VllmConfig, hybrid: HybridConfig) -> None:
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    if not cache.user_specified_block_size:
        # Only whole blocks inside a hole can be given back, so blocks should be small.
        cache.block_size = DEFAULT_BLOCK_SIZE
        cache.user_specified_block_size = True
    # An image's hole is known only once all of it is there.
    scheduler.disable_chunked_mm_input = True
    _make_room_in_a_step(vllm_config, hybrid)
    if current_platform.is_cuda():
        # A step with images computes fewer rows than vLLM counts, which is what its other graphs go by.
        if vllm_config.compilation_config.cudagraph_mode is None:
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        vllm_config.parallel_config.worker_cls = WORKERS["cuda"]
    else:
        vllm_config.parallel_config.worker_cls = WORKERS["cpu"]
    scheduler.scheduler_cls = SCHEDULER


def _make_room_in_a_step(vllm_config: VllmConfig, hybrid: HybridConfig) -> None:
    """Raise limits under which what has to be computed in one step would wait for ever.

    An image is computed in one step; where tokens are pruned with all up to the position that ranks it, which
    may be the prompt's last, and without chunked prefill any prompt is. Beside it every running request may
    decode.
    """
    scheduler = vllm_config.scheduler_config
    what, length = "an image", num_patches(vllm_config.model_config.hf_config)
    if hybrid.prunes or not scheduler.enable_chunked_prefill:
        what, length = "any prompt", vllm_config.model_config.max_model_len
    room = length + scheduler.max_num_seqs
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        _raise_limit(scheduler, name, room, f"{what} fits in one step")
    if scheduler.long_prefill_token_threshold:
        _raise_limit(scheduler, "long_prefill_token_threshold", length, f"{what} fits in one step")
    scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, room)
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, room)


def _raise_limit(scheduler: SchedulerConfig, name: str, least: int, purpose: str) -> None:
    """Raise one of the scheduler's limits, and say so; one that is not set stays so."""
    limit = getattr(scheduler, name)
    if limit is None or limit >= least:
        return
    logger.info("vllm-hybrid: %s raised from %d to %d, so that %s.", name, limit, least, purpose)
    setattr(scheduler, name, least)
