"""What a server of ours loads on one platform loads nothing of the other's.

vLLM's CPU worker turns CUDA streams, events and pinned memory of its whole process into no-ops when it is
imported. Each check therefore runs in a fresh interpreter and looks at what is imported beyond stock vLLM.
"""

from __future__ import annotations

import json

import pytest

from tests.support.fresh_process import found_by

CHECK = """
import importlib, json, os, sys
import torch
before = (torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream, torch.Tensor.record_stream,
          torch.Tensor.pin_memory, torch.accelerator.synchronize)
stock, ours, attention = json.loads(sys.argv[1])
for name in stock:
    importlib.import_module(name)
known = set(sys.modules)
for name in ours:
    importlib.import_module(name)
os.environ["VLLM_HYBRID_ATTENTION"] = attention
from types import SimpleNamespace
from vllm_hybrid.attention.select import select_attention
model = SimpleNamespace(dtype=torch.bfloat16, get_head_size=lambda: 128)
select_attention(SimpleNamespace(model_config=model))
after = (torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream, torch.Tensor.record_stream,
         torch.Tensor.pin_memory, torch.accelerator.synchronize)
print("LOADED " + json.dumps([sorted(set(sys.modules) - known), [a is b for a, b in zip(before, after)]]))
"""
SHARED = ["vllm.v1.engine.core", "vllm.model_executor.models.llava", "vllm.model_executor.models.clip"]
STOCK = {
    "cuda": [*SHARED, "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner"],
    "cpu": [*SHARED, "vllm.v1.worker.cpu_worker"],
}
LIBRARY = [
    "vllm_hybrid_plugin",
    "vllm_hybrid.registration",
    "vllm_hybrid.models.llava",
    "vllm_hybrid.engine.scheduler",
]


def loaded(platform: str, worker: str, attention: str) -> tuple[list[str], list[bool]]:
    """Modules that the library adds to stock vLLM's, and which of torch's functions are still themselves."""
    work = json.dumps([STOCK[platform], [*LIBRARY, worker], attention])
    (modules, same), _ = found_by(CHECK, "LOADED ", work)
    return modules, same


def parts(modules: list[str], package: str) -> list[str]:
    """Last parts of the names of a package's modules."""
    return [name.rsplit(".", 1)[1] for name in modules if name.startswith(f"{package}.")]


@pytest.mark.engine
def test_a_cuda_process_loads_nothing_for_cpus() -> None:
    modules, same = loaded("cuda", "vllm_hybrid.engine.cuda_worker", "triton")
    assert "cuda_worker" in parts(modules, "vllm_hybrid") and "gpu" in parts(modules, "vllm_hybrid")
    assert not [name for name in parts(modules, "vllm") if name.startswith("cpu_")]
    assert not {"cpu_worker", "cpu_dense"} & set(parts(modules, "vllm_hybrid"))
    assert all(same), "importing the library changed torch's CUDA functions"


@pytest.mark.engine
def test_a_cpu_process_loads_nothing_for_cuda() -> None:
    modules, _ = loaded("cpu", "vllm_hybrid.engine.cpu_worker", "cpu")
    assert {"cpu_worker", "cpu", "cpu_dense"} <= set(parts(modules, "vllm_hybrid"))
    assert not {"cuda_worker", "gpu", "triton_kernels"} & set(parts(modules, "vllm_hybrid"))
    assert not [name for name in modules if name.startswith(("triton", "vllm.v1.worker.gpu."))]


@pytest.mark.parametrize(("platform", "module"), [("cuda", "cuda_worker"), ("cpu", "cpu_worker")])
def test_the_settings_name_the_platform_s_worker(
    platform: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from tests.support.configurations import configure
    from vllm_hybrid.config import HybridConfig
    from vllm_hybrid.startup import settings

    configuration = configure({"fastv_ratio": 0.5})
    platforms = SimpleNamespace(is_cuda=lambda: platform == "cuda")
    monkeypatch.setattr(settings, "current_platform", platforms)
    settings._complete(configuration, HybridConfig())
    assert configuration.parallel_config.worker_cls.split(".")[:3] == ["vllm_hybrid", "engine", module]
