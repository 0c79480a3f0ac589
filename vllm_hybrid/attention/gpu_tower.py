"""Attention and merging of the vision tower on a GPU; the host chooses all shapes and waits for nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_hybrid.attention.interface import DeviceTower
from vllm_hybrid.attention.triton_kernels import tower_merge
from vllm_hybrid.attention.triton_kernels.tower_attention import tower_attention
from vllm_hybrid.method.device_tokens import DeviceTokens


class GpuTower(DeviceTower):
    """The tower's operations as Triton kernels."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: DeviceTokens, scale: float
    ) -> torch.Tensor:
        return tower_attention(query, key, value, tokens.size, tokens.starts, scale)

    def metric(self, key: torch.Tensor) -> torch.Tensor:
        return tower_merge.metric(key)

    def merge(
        self,
        tokens: DeviceTokens,
        added: torch.Tensor,
        metric: torch.Tensor,
        threshold: torch.Tensor,
        capacity: int,
    ) -> DeviceTokens:
        done, images = tokens.merges, tokens.images
        bounds = tokens.bounds[done + 1]
        plan = tower_merge.plan_merge(metric, threshold, tokens.starts, bounds, tokens.index[done], capacity)
        hidden, size = tower_merge.join_rows(tokens.hidden, added, tokens.size, plan, bounds[images:])
        return replace(tokens, hidden=hidden, size=size, merges=done + 1)

    def owners(self, tokens: DeviceTokens, patches: int) -> torch.Tensor:
        return tower_merge.owners(tokens.bounds, tokens.index, tokens.images, patches)
