"""What the configuration hook refuses, sets and leaves alone; no engine is started."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.configurations import MERGES, PRUNES, configure
from tests.support.engines import STOCK, checkpoint
from tests.support.tiny_checkpoints import write_checkpoint
from vllm_hybrid.attention import select
from vllm_hybrid.config import HybridConfig
from vllm_hybrid.levels import Level, Levels
from vllm_hybrid.startup import overrides, settings
from vllm_hybrid.startup.settings import (
    DEFAULT_BLOCK_SIZE,
    FLASHINFER_SAMPLER,
    HybridSettings,
    describe,
    hybrid_config,
    sample_without_flashinfer,
)


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
        ({"levels": {"low": {"ratio": 0.5}}}, "hybrid.levels.low.ratio is not a known key"),
        (
            {"levels": {"low": {"fastv_ratio": 0.5}}, "level": "mid"},
            "hybrid.level is 'mid', .* use low or full",
        ),
        (
            {"fastv_ratio": 0.5, "detail": {"low": "mid"}},
            "hybrid.detail.low is 'mid', .* use default or full",
        ),
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


@pytest.mark.parametrize("hybrid", [MERGES, PRUNES], ids=["merging", "pruning"])
def test_a_kv_cache_in_fp8_is_served_by_the_kernels_for_gpus(
    hybrid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_HYBRID_ATTENTION", "triton")
    assert configure(hybrid, kv_cache_dtype="fp8").cache_config.cache_dtype == "fp8"
    for options, feature in (
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            r"a quantised KV cache \(--kv-cache-dtype fp8_e5m2\) other than fp8",
        ),
        ({"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "a KV cache of several dtypes"),
    ):
        with pytest.raises(ValueError, match=f"{feature}.* is not supported with reduced image tokens"):
            configure(hybrid, **options)


@pytest.mark.parametrize(("capability", "served"), [(80, False), (89, True), (90, True)])
def test_fp8_needs_a_device_that_converts_it(
    capability: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(is_cpu=lambda: False, has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr(select, "current_platform", device)
    monkeypatch.delenv("VLLM_HYBRID_ATTENTION", raising=False)
    assert select.serves_kv_dtype("fp8") == served
    assert select.serves_kv_dtype("bfloat16") and not select.serves_kv_dtype("nvfp4")


def test_kv_scales_for_each_head_are_refused() -> None:
    config = configure(MERGES)
    config.quant_config = SimpleNamespace(kv_cache_scheme={"strategy": "attn_head"})
    with pytest.raises(ValueError, match="scales for each head .* is not supported"):
        settings.check_options(config)
    config.quant_config = SimpleNamespace(kv_cache_scheme={"strategy": "tensor"})
    settings.check_options(config)


def test_a_long_prefill_threshold_is_refused_only_where_tokens_are_pruned() -> None:
    with pytest.raises(ValueError, match="splitting prompts"):
        configure(PRUNES, long_prefill_token_threshold=700)
    configure(MERGES, long_prefill_token_threshold=700)


@pytest.mark.parametrize("hybrid", [MERGES, PRUNES], ids=["merging", "pruning"])
def test_blocks_are_small_unless_the_user_chose(hybrid: Any) -> None:
    assert configure(hybrid).cache_config.block_size == DEFAULT_BLOCK_SIZE
    assert configure(hybrid, block_size=32).cache_config.block_size == 32


def test_any_prompt_fits_in_one_step_where_tokens_are_pruned() -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 1024, "max_num_seqs": 8}
    assert configure(PRUNES, **options).scheduler_config.max_num_batched_tokens == 2048 + 8
    assert configure(MERGES, **options).scheduler_config.max_num_batched_tokens == 1024
    enough = options | {"max_num_batched_tokens": 4096}
    assert configure(PRUNES, **enough).scheduler_config.max_num_batched_tokens == 4096


@pytest.mark.parametrize(
    "hybrid", [None, {}, {"fastv_ratio": 0}, {"thresholds": None}, {"levels": {"low": {}}}]
)
def test_nothing_switched_on_leaves_vllms_settings_alone(hybrid: Any) -> None:
    ours, stock = configure(hybrid), configure(None, STOCK)
    for name in ("max_num_batched_tokens", "scheduler_cls", "disable_chunked_mm_input", "async_scheduling"):
        assert getattr(ours.scheduler_config, name) == getattr(stock.scheduler_config, name)
    assert ours.cache_config.block_size == stock.cache_config.block_size
    assert ours.parallel_config.worker_cls == stock.parallel_config.worker_cls


@pytest.mark.parametrize("hybrid", [None, MERGES, PRUNES], ids=["off", "merging", "pruning"])
@pytest.mark.parametrize(
    ("heads", "asked", "mode"),
    [
        (3, None, "data"),
        (3, "weights", "data"),
        (3, "data", "data"),
        (2, None, "weights"),
        (2, "data", "data"),
    ],
)
def test_ranks_have_whole_towers_where_heads_do_not_divide(
    heads: int, asked: Any, mode: str, hybrid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(settings.logger, "info", lambda text, *values: said.append(text % values))
    path = checkpoint(vision_heads=heads, vision_hidden=96)
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    made = configure(hybrid, path=path, mm_encoder_tp_mode=asked, **options)
    assert made.model_config.multimodal_config.mm_encoder_tp_mode == mode
    found = [sentence for sentence in said if "--mm-encoder-tp-mode" in sentence]
    switched = mode != (asked or "weights")
    assert len(found) == switched
    assert all("set from weights to data" in one and "3 heads cannot be divided by 2" in one for one in found)


def test_a_language_model_whose_heads_do_not_divide_is_vllms_to_refuse() -> None:
    with pytest.raises(ValueError, match=r"Total number of attention heads \(4\) must be divisible by"):
        configure(MERGES, tensor_parallel_size=3, distributed_executor_backend="mp")


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
    given = configure(None)
    cuda = SimpleNamespace(is_cuda=lambda: True)
    without_flashinfer.setattr("vllm_hybrid.startup.settings.current_platform", cuda)
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


# ---- compilers ------------------------------------------------------------------------------------


def test_a_missing_compiler_is_refused_before_a_worker_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"'no-such-compiler' does not serve \(not found\).*vllm-hybrid doctor"
    ):
        configure(PRUNES)
    configure(None)
    monkeypatch.setenv(select.IMPLEMENTATION_ENV, "reference")
    configure(PRUNES)


@pytest.fixture
def lame_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A compiler that is there and fails."""
    compiler = tmp_path / "lame"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h' >&2\nexit 1\n")
    compiler.chmod(0o755)
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, str(compiler))
    return monkeypatch


def test_a_compiler_that_fails_is_refused_unless_all_is_compiled(lame_compiler: pytest.MonkeyPatch) -> None:
    lame_compiler.setattr("vllm_hybrid.attention.cpu.extension_is_compiled", lambda: True)
    configure(PRUNES)
    lame_compiler.setattr("vllm_hybrid.attention.cpu.extension_is_compiled", lambda: False)
    with pytest.raises(ValueError, match="does not serve .it cannot compile .fatal error: Python.h"):
        configure(PRUNES)


def test_on_cuda_a_compiler_that_fails_is_a_warning(lame_compiler: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    lame_compiler.setattr("vllm_hybrid.startup.settings.compiles_cpp", lambda: False)
    lame_compiler.setattr(
        "vllm_hybrid.startup.settings.current_platform", SimpleNamespace(is_cuda=lambda: True)
    )
    lame_compiler.setattr(settings.logger, "warning", lambda text, *values: said.append(text % values))
    settings.check_compiler()
    assert len(said) == 1 and "Triton may fail to compile" in said[0] and "Python.h" in said[0]


# ---- overrides ------------------------------------------------------------------------------------

LEVELS = {"low": [0.7] * 3, "high": [0.9] * 3}
LOW, HIGH = (tuple(values) for values in LEVELS.values())
STORED = {"thresholds": LEVELS, "default_level": "high", "fastv_layer": 3, "fastv_ratio": 0.5}


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with levels and pruning in its own section."""
    return write_checkpoint(tmp_path_factory.mktemp("levels") / "llava", hybrid=STORED)


def serve_arguments(path: Path, *arguments: str) -> VllmConfig:
    """The configuration `vllm serve PATH ARGUMENTS` would start with."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--model", str(path), "--dtype", "float32", "--max-model-len", "2048", *arguments]
    return EngineArgs.from_cli_args(parser.parse_args(given)).create_engine_config()


@pytest.mark.parametrize(
    ("override", "default", "layer"),
    [
        ({"fastv_ratio": 0}, Level("high", HIGH), 3),
        ({"fastv_ratio": None, "fastv_layer": None}, Level("high", HIGH), 2),
        ({"level": "low"}, Level("low", LOW, 0.5), 3),
        ({"level": "full"}, Level("full"), 3),
        ({"thresholds": None}, Level("default", None, 0.5), 3),
        ({"levels": {"mid": {"fastv_ratio": 0.25}}}, Level("mid", None, 0.25), 3),
        (None, Level("full"), 2),
    ],
)
def test_an_override_changes_the_keys_that_it_names(
    levels: Path, override: Any, default: Level, layer: int
) -> None:
    ours = serve_arguments(levels, "--hf-overrides", json.dumps({"hybrid": override}))
    for config in (
        ours,
        # As the processes of the engine get it, and as vLLM makes others from it.
        pickle.loads(pickle.dumps(ours)),
        dataclasses.replace(ours),
        EngineArgs(
            str(levels), dtype="float32", max_model_len=2048, hf_overrides={"hybrid": override}
        ).create_engine_config(),
    ):
        hybrid = hybrid_config(config.model_config.hf_config)
        assert hybrid.levels.default == default
        assert hybrid.fastv_layer == layer
        assert (config.scheduler_config.scheduler_cls is None) == (override is None)


def test_a_section_is_parsed_once_and_anew_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request asks for it."""
    parsed: list[Any] = []
    parse = HybridConfig.parse

    def noting(section: Any, **layers: int) -> HybridConfig:
        parsed.append(section)
        return parse(section, **layers)

    monkeypatch.setattr(HybridConfig, "parse", noting)
    section: dict[str, Any] = {"levels": {"low": {"fastv_ratio": 0.123}}, "fastv_layer": 3}
    hf_config = SimpleNamespace(
        hybrid=section,
        vision_config=SimpleNamespace(num_hidden_layers=4),
        vision_feature_layer=-2,
        text_config=SimpleNamespace(num_hidden_layers=8),
    )
    first = hybrid_config(cast(Any, hf_config))
    assert all(hybrid_config(cast(Any, hf_config)) is first for _ in range(3)) and len(parsed) == 1
    # Inside, as a whole, and what is equal but means something else.
    section["levels"]["low"]["fastv_ratio"] = 0.25
    assert hybrid_config(cast(Any, hf_config)).levels.named("low").fastv_ratio == 0.25
    hf_config.hybrid = {"fastv_ratio": 0.5, "fastv_layer": 1}
    assert hybrid_config(cast(Any, hf_config)).fastv_layer == 1
    hf_config.hybrid = {"fastv_ratio": 0.5, "fastv_layer": True}
    for _ in range(2):
        with pytest.raises(ValueError, match="hybrid.fastv_layer is True"):
            hybrid_config(cast(Any, hf_config))
    # The layers of a model count too.
    hf_config.hybrid, hf_config.text_config.num_hidden_layers = section, 3
    with pytest.raises(ValueError, match="hybrid.fastv_layer is 3, but the decoder has 3 layers"):
        hybrid_config(cast(Any, hf_config))


def test_the_line_at_start_names_what_ranks_where_something_is_pruned() -> None:
    half = Level("half", None, 0.5)
    by_end = HybridConfig(Levels((half,), half), fastv_rank="prompt_end")
    assert describe(by_end).endswith("ranked by the prompt's last position.")
    by_turn = dataclasses.replace(by_end, fastv_rank="turn_end", assistant_header=(319,))
    assert describe(by_turn).endswith("ranked by the end of the first assistant header behind it.")
    assert "ranked" not in describe(dataclasses.replace(by_turn, levels=Levels()))


def test_an_override_key_by_key_as_vllm_takes_it(levels: Path) -> None:
    options = ["--hf-overrides.hybrid.level", "low", "--hf-overrides.hybrid.fastv_ratio", "0.25"]
    hybrid = hybrid_config(serve_arguments(levels, *options).model_config.hf_config)
    assert (hybrid.levels.default, hybrid.fastv_layer) == (Level("low", LOW, 0.25), 3)


def test_a_key_of_one_level_as_vllm_takes_it(tmp_path: Path) -> None:
    section = {"levels": {"low": {"fastv_ratio": 0.9}, "high": {"fastv_ratio": 0.5}}, "default_level": "high"}
    path = write_checkpoint(tmp_path / "llava", hybrid=section)
    option = ["--hf-overrides.hybrid.levels.low.fastv_ratio", "0.75"]
    config = hybrid_config(serve_arguments(path, *option).model_config.hf_config)
    ratios = {level.name: level.fastv_ratio for level in config.levels}
    assert ratios == {"low": 0.75, "high": 0.5, "full": 0} and config.levels.default.name == "high"
    with pytest.raises(
        ValueError, match="hybrid.fastv_ratio is overridden, but hybrid.levels has one for each"
    ):
        serve_arguments(path, "--hf-overrides.hybrid.fastv_ratio", "0.25")


def test_hooks_that_run_twice_change_nothing(levels: Path) -> None:
    config = serve_arguments(levels, "--hf-overrides", '{"hybrid": {"level": "low", "fastv_layer": null}}')
    before = copy.deepcopy(config.model_config.hf_config.hybrid)
    HybridSettings.verify_and_update_model_config(config.model_config)
    HybridSettings.verify_and_update_config(config)
    assert config.model_config.hf_config.hybrid == before
    assert before == {"thresholds": LEVELS, "default_level": "high", "fastv_ratio": 0.5, "level": "low"}


def test_an_override_that_is_a_function_sees_the_checkpoints_section(levels: Path) -> None:
    def halved(hf_config: Any) -> Any:
        if hasattr(hf_config, "hybrid"):
            hf_config.hybrid = hf_config.hybrid | {"fastv_ratio": hf_config.hybrid["fastv_ratio"] / 2}
        return hf_config

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 2048, "hf_overrides": halved}
    config = EngineArgs(str(levels), **options).create_engine_config()
    assert config.model_config.hf_config.hybrid == STORED | {"fastv_ratio": 0.25}
    assert overrides.applied(config.model_config) == ["fastv_ratio: 0.5 -> 0.25"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            {"fastv_ratio": 0},
            "Levels: low merges, high merges, full keeps all. Pictures without a detail: high; detail low: "
            "low; detail high: high. Overridden: fastv_ratio: 0.5 -> 0.",
        ),
        (
            {"thresholds": [0.8, None, 0.9], "fastv_ratio": None},
            "Levels: default merges, full keeps all. Pictures without a detail: default; detail low: "
            "default; detail high: default. Overridden: thresholds: levels low, high -> 3 values, 0.8 to "
            "0.9; default_level: high -> unset; fastv_ratio: 0.5 -> unset.",
        ),
        (
            {"levels": {"small": {"thresholds": [0.8] * 3, "fastv_ratio": 0.75}}, "detail": {"low": "small"}},
            "Levels: small merges and drops 0.75, full keeps all. Pictures without a detail: small; detail "
            "low: small. FastV drops tokens after layer 3, ranked by the prompt's last position. Overridden: "
            "thresholds: levels low, high -> unset; "
            "default_level: high -> unset; fastv_ratio: 0.5 -> unset; levels: unset -> levels small; detail: "
            "unset -> low is small.",
        ),
        (
            None,
            "No merging, no pruning: vLLM's own LLaVA serves. Overridden: "
            "hybrid: thresholds, default_level, fastv_layer, fastv_ratio -> null.",
        ),
    ],
)
def test_the_start_up_line_says_what_is_on_and_what_was_overridden(
    levels: Path, override: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(settings.logger, "info", lambda text, *values: said.append(text % values))
    serve_arguments(levels, "--hf-overrides", json.dumps({"hybrid": override}))
    assert said[-1] == f"vllm-hybrid: {line}"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"ratio": None}, "hybrid.ratio is not a known key"),
        ({"ratio": 0.5}, "hybrid.ratio is not a known key"),
        ({"level": "mid"}, "hybrid.level is 'mid', which is no level; use low, high or full"),
        (
            {"thresholds": None, "level": "low"},
            "hybrid.level is 'low', which is no level; use default or full",
        ),
        (
            {"default_level": None},
            "hybrid.default_level is missing; set it to one of the levels low, high, full",
        ),
        ([0.9], r"hybrid is \[0.9\]; give an object"),
    ],
)
def test_a_wrong_override_is_refused(levels: Path, override: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        serve_arguments(levels, "--hf-overrides", json.dumps({"hybrid": override}))


# ---- broken checkpoints ---------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 13\n"


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def in_own_format(folder: Path) -> None:
    config: dict[str, Any] = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    config |= {"architectures": ["LlavaHybridForConditionalGeneration"], "hidden_size": 4096}
    (folder / "config.json").write_text(json.dumps(config))


def with_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(POINTER), "is a git-LFS pointer, not the"),
        (cut_weights, "model.safetensors is cut off or damaged"),
        (in_own_format, "is in LLaVA's own format; give the checkpoint in the format of llava-hf"),
        (with_more_layers, r"lacks the weight model\.vision_tower\.encoder\.layers\.4\."),
    ],
)
def test_a_broken_checkpoint_is_refused_at_start(
    damage: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "llava"
    shutil.copytree(checkpoint(), path)
    damage(path)
    with pytest.raises(ValueError, match=sentence):
        serve_arguments(path)


def test_what_an_override_calls_the_model_counts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "llava", architecture="SomebodysLlava")
    serve_arguments(path, "--hf-overrides", '{"architectures": ["LlavaHybridForConditionalGeneration"]}')


@pytest.mark.parametrize("place", ["text_config", "file", "option", "option and file"])
def test_quantised_weights_are_vllms_to_load(place: str, tmp_path: Path) -> None:
    """Their names and shapes are not the configuration's, wherever it is said that they are quantised."""
    path = tmp_path / "llava"
    shutil.copytree(checkpoint(), path)
    tensors = load_file(path / "model.safetensors")
    save_file(
        {name.replace("_proj.weight", "_proj.qweight"): tensors[name] for name in tensors},
        path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="lacks the weight"):
        serve_arguments(path)
    options = ["--dtype", "float16"]
    if place == "text_config":
        config = json.loads((path / "config.json").read_text())
        awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
        config["text_config"]["quantization_config"] = awq
        (path / "config.json").write_text(json.dumps(config))
    elif place == "file":
        content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (path / "hf_quant_config.json").write_text(json.dumps(content))
    elif place == "option":
        options += ["--quantization", "fp8"]
    else:
        awq = {"w_bit": 4, "q_group_size": 128, "zero_point": True}
        (path / "quant_config.json").write_text(json.dumps(awq))
        options += ["--quantization", "awq"]
    assert serve_arguments(path, *options).model_config.quantization is not None


def test_plain_weights_that_vllm_quantises_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "llava"
    shutil.copytree(checkpoint(), path)
    options = ["--dtype", "float16", "--quantization", "fp8_per_channel"]
    config = serve_arguments(path, *options)
    # vLLM itself looks only where nothing is quantised.
    assert config.load_config.model_loader_extra_config == {"enable_weights_track": True}
    with_more_layers(path)
    with pytest.raises(ValueError, match=r"lacks the weight model\.vision_tower\.encoder\.layers\.4\."):
        serve_arguments(path, *options)


def test_who_says_how_weights_are_loaded_is_heard() -> None:
    options = ["--dtype", "float16", "--quantization", "fp8_per_channel"]
    said = '{"enable_weights_track": false, "num_threads": 2}'
    config = serve_arguments(checkpoint(), *options, "--model-loader-extra-config", said)
    assert config.load_config.model_loader_extra_config == json.loads(said)
    assert serve_arguments(checkpoint()).load_config.model_loader_extra_config == {}


@pytest.mark.parametrize("name", ["int8_per_channel_weight_only", "online"])
def test_quantising_experts_alone_is_refused(name: str) -> None:
    """vLLM would start, with nothing quantised."""
    options: dict[str, Any] = {"dtype": "float16", "quantization": name}
    experts = {"moe": "int8_per_channel_weight_only"} if name == "online" else None
    with pytest.raises(ValueError, match=rf"quantising experts alone \(--quantization {name}\), which this"):
        configure(MERGES, **options, quantization_config=experts)
    linear = {"linear": "fp8_per_channel"}
    assert configure(MERGES, **options, quantization_config=linear).model_config.quantization == name


def test_weights_that_are_not_loaded_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "llava"
    shutil.copytree(checkpoint(), path)
    cut_weights(path)
    serve_arguments(path, "--load-format", "dummy")
    # Fewer layers than the file has are vLLM's to serve.
    shutil.copy(checkpoint() / "model.safetensors", path)
    fewer = serve_arguments(path, "--hf-overrides", '{"text_config": {"num_hidden_layers": 4}}')
    assert fewer.model_config.hf_config.text_config.num_hidden_layers == 4
