"""What the CUDA worker has done at the right time: graphs of the tower captured, kernels compiled."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_hybrid.attention.gpu import GpuAttention
from vllm_hybrid.engine.cuda_worker import HybridCUDAWorker
from vllm_hybrid.method.device_tokens import DeviceTokens
from vllm_hybrid.models.llava import _captures_tower
from vllm_hybrid.models.tower_graphs import TowerGraphs, TowerInputs

# Behind supports_modality, which says no.
NOT_ASKED = {"execute"}


class Nothing:
    """A graph of nothing."""

    def replay(self) -> None:
        pass


def graphs(captured: list[tuple[int, Any]], images: int = 3) -> TowerGraphs:
    """Graphs that note what is captured into which pool."""

    def record(run: Any, pool: Any) -> Any:
        result = run()
        captured.append((result[0].images, pool))
        return Nothing(), result

    def run(pixels: torch.Tensor, thresholds: torch.Tensor, rows: Any) -> Any:
        assert rows == [12 * len(pixels)]
        tokens = DeviceTokens.start(pixels.flatten(2).mT, len(thresholds))
        return tokens, torch.zeros(len(pixels), 3, dtype=torch.int64)

    def make_inputs(images: int) -> TowerInputs:
        return TowerInputs(torch.zeros(images, 3, 2, 2), torch.zeros(5, images))

    return TowerGraphs(run, make_inputs, lambda images: [[12 * images]], images, record)


def test_the_largest_graph_comes_first_and_all_share_a_pool() -> None:
    captured: list[tuple[int, Any]] = []
    made = graphs(captured)
    made.capture("pool")
    assert captured == [(3, "pool"), (2, "pool"), (1, "pool")]


def test_inputs_are_written_where_the_graph_reads_them() -> None:
    made = graphs([])
    made.capture(None)
    pixels, thresholds = torch.randn(2, 3, 2, 2), torch.rand(5, 2)
    replayed = made.encode(pixels, thresholds.tolist(), None)
    assert replayed is not None
    inputs = made._captured[2][0].inputs
    assert torch.equal(inputs.pixels, pixels) and torch.equal(inputs.thresholds, thresholds)
    assert made.encode(torch.randn(4, 3, 2, 2), torch.rand(5, 4).tolist(), None) is None


def test_vllm_asks_its_encoder_runner_s_graphs_for_nothing_else() -> None:
    source = inspect.getsource(EncoderRunner)
    asked = set(re.findall(r"manager\.(\w+)\(", source))
    assert {"capture", "clear", "is_captured", "supports_modality"} <= asked
    assert {name for name in asked - NOT_ASKED if not hasattr(TowerGraphs, name)} == set()
    assert not graphs([]).supports_modality("image")


@pytest.mark.parametrize("asked", [True, False])
def test_the_worker_has_vllm_s_encoder_runner_capture_them(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graphs([]) if asked else None
    encoder_runner = SimpleNamespace(cudagraph_manager=None)
    runner = SimpleNamespace(
        model_state=SimpleNamespace(encoder_runner=encoder_runner),
        get_model=lambda: SimpleNamespace(tower_graphs=made),
    )
    monkeypatch.setattr(Worker, "load_model", lambda self: setattr(self, "model_runner", runner))
    object.__new__(HybridCUDAWorker).load_model()
    assert encoder_runner.cudagraph_manager is made


def test_kernels_are_compiled_before_vllm_reports_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda self: done.append("reports"))
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: self._maybe_activate_jit_monitor())
    monkeypatch.setattr("vllm_hybrid.engine.worker.warm_up", lambda *_: done.append("compiles"))
    worker = object.__new__(HybridCUDAWorker)
    active = SimpleNamespace(active=True, levels=())
    monkeypatch.setattr("vllm_hybrid.engine.worker.hybrid_config", lambda hf_config: active)
    model = SimpleNamespace(
        patches=4,
        language_model=SimpleNamespace(model=SimpleNamespace(attention_ops=GpuAttention)),
    )
    worker.model_runner = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=None)),
        get_model=lambda: model,
    )
    worker.compile_or_warm_up_model()
    assert done == ["compiles", "reports"]


@pytest.mark.parametrize(
    ("option", "cuda", "eager", "wanted"),
    [
        (True, True, False, True),
        (False, True, False, False),
        (True, False, False, False),
        (True, True, True, False),
    ],
)
def test_graphs_are_made_where_vllm_s_option_says_so(
    option: bool, cuda: bool, eager: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: cuda)
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=option),
        model_config=SimpleNamespace(enforce_eager=eager),
    )
    assert _captures_tower(config) is wanted
