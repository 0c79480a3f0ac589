"""Lower and upper stack under vLLM's own compile backend, against the same layers run one by one.

A program of its own, because what it tests is the compile cache that processes share. It reads a list of
starts, each a set of variables, as JSON, makes a process for each, and prints each stack's largest error.
Layers are plain torch, as is attention, behind a custom operation at which vLLM splits the graph, as it does
at its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from vllm_hybrid.models.llama import make_stacks

WIDTH = 64
LAYERS = 5
SPLIT = 2
_OPERATION = "hybrid_tests::attend"

torch.library.define(_OPERATION, "(Tensor query, Tensor(a!) out) -> ()")


@torch.library.impl(_OPERATION, "CPU")
def _attend(query: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(query * 2)


@torch.library.register_fake(_OPERATION)
def _attend_shapes(query: torch.Tensor, out: torch.Tensor) -> None:
    return None


class Layer(nn.Module):
    """A decoder layer's shape: a residual, a norm, attention, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outward = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attend(positions, hidden, residual)[:2]

    def attend(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        normed = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
        query = self.inward(normed) + positions[:, None]
        out = torch.empty_like(query)
        torch.ops.hybrid_tests.attend(query, out)
        return torch.relu(self.outward(out)), residual, query


class RankingLayer(Layer):
    """One that also hands out part of what it attended with."""

    def forward(  # type: ignore[override]
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, residual, query = self.attend(positions, hidden, residual)
        return hidden, residual, query[:, : WIDTH // 2]


def run_layers(
    layers: list[nn.Module], positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """What the last layer gives."""
    found: tuple[torch.Tensor, ...] = ()
    for layer in layers:
        found = layer(positions, hidden, residual)
        hidden, residual = found[:2]
    return found


def error(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))


def errors() -> dict[str, float]:
    """The largest absolute error of each stack over steps of several sizes."""
    torch.manual_seed(0)
    config = VllmConfig(
        compilation_config=CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE,
            cudagraph_mode=CUDAGraphMode.NONE,
            splitting_ops=[_OPERATION],
            backend="inductor",
        )
    )
    compilation = config.compilation_config
    # vLLM's CPU platform asks for another mode; CUDA's is this one. The fusions it adds are CUDA's.
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.backend = "inductor"
    compilation.splitting_ops, compilation.compile_sizes = [_OPERATION], []
    for name, wanted in vars(compilation.pass_config).items():
        if name.startswith(("fuse_", "enable_")) and wanted:
            setattr(compilation.pass_config, name, False)
    layers = [RankingLayer() if i == SPLIT - 1 else Layer() for i in range(LAYERS)]
    plain = [Layer() for _ in range(LAYERS)]
    worst = {"lower": 0.0, "upper": 0.0, "whole": 0.0}
    with set_current_vllm_config(config), torch.inference_mode():
        stacks: tuple[Any, ...] = make_stacks(config, "model", layers, SPLIT)
        stacks += make_stacks(config, "model", plain, LAYERS)
        assert not any(stack.do_not_compile for stack in stacks)
        lower, upper, whole = stacks
        for rows in (64, 40):
            kept = slice(0, rows // 2)
            positions, hidden = torch.arange(rows), torch.randn(rows, WIDTH)
            below = run_layers(list(layers[:SPLIT]), positions, hidden, None)
            above = run_layers(list(layers[SPLIT:]), positions[kept], below[0][kept], below[1][kept])
            all_of_them = run_layers(list(plain), positions, hidden, None)
            with set_forward_context(None, config, num_tokens=rows):
                got = lower(positions, hidden)
                worst["lower"] = max(worst["lower"], error(got, below))
                got = upper(positions[kept], below[0][kept].clone(), below[1][kept].clone())
                worst["upper"] = max(worst["upper"], error(got, above))
                worst["whole"] = max(worst["whole"], error(whole(positions, hidden), all_of_them))
    return worst


def start(environment: dict[str, str]) -> None:
    """Compile, or find again what an earlier start compiled, and print the errors."""
    os.environ |= environment
    print("ERRORS " + json.dumps(errors()), flush=True)


if __name__ == "__main__":
    # Forked, since importing vLLM takes longer than what is tested, and has computed nothing so far.
    processes = multiprocessing.get_context("fork")
    for environment in json.load(sys.stdin):
        process = processes.Process(target=start, args=(environment,))
        process.start()
        process.join()
