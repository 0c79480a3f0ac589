"""What the benchmark asks and changes inside vLLM's worker, by ``collective_rpc``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch


class InWorker:
    """Methods that vLLM adds to its worker class; their names have a prefix of their own."""

    vllm_config: Any
    model_runner: Any

    def bench_watch(self) -> None:
        """Count from here on every picture that is encoded, and its live tokens where they are reduced."""
        model = self.model_runner.get_model()
        encode = model.embed_multimodal
        self.bench_pictures = 0
        self.bench_counts: list[int] = []

        def encoded(**inputs: Any) -> Any:
            made = encode(**inputs)
            self.bench_pictures += len(made)
            return made

        model.embed_multimodal = encoded
        if not hasattr(model, "live_counts"):
            return
        report = model.live_counts

        def reported(*args: Any) -> list[int]:
            counts = report(*args)
            self.bench_counts += counts
            return counts

        model.live_counts = reported

    def bench_take(self) -> dict[str, Any]:
        """``pictures`` encoded and live ``counts`` reported since the last call."""
        taken = {"pictures": self.bench_pictures, "counts": self.bench_counts}
        self.bench_pictures, self.bench_counts = 0, []
        return taken

    def bench_set_thresholds(self, thresholds: Sequence[float | None]) -> None:
        """Other thresholds for a running model's default level: one start serves all of one ratio."""
        model = self.model_runner.get_model()
        levels = model.hybrid.levels
        changed = dataclasses.replace(levels.default, thresholds=tuple(thresholds))
        others = tuple(changed if level == levels.default else level for level in levels)
        levels = dataclasses.replace(levels, all=others, default=changed)
        model.hybrid = dataclasses.replace(model.hybrid, levels=levels)

    def bench_facts(self) -> dict[str, Any]:
        """What was really chosen: attention by layer, block sizes, graphs, memory.

        Returns:
            ``decoder_attention`` and ``tower_attention``, names with the number of layers that have them;
            ``block_sizes`` of the KV-cache groups; ``compile_mode``, ``graph_mode`` and ``graph_sizes``;
            ``tower_graphs``, whether the tower was captured;
            ``model_runner``; ``reserved_bytes`` of device memory, None without a device.

        """
        compilation = self.vllm_config.compilation_config
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        cuda = self.vllm_config.device_config.device_type == "cuda"
        return {
            "decoder_attention": _count(_decoder_attention(compilation.static_forward_context)),
            "tower_attention": _count(_tower_attention(self.model_runner.get_model())),
            "block_sizes": [group.kv_cache_spec.block_size for group in groups],
            "layers_of_groups": [len(group.layer_names) for group in groups],
            "compile_mode": _name(compilation.mode),
            "graph_mode": _name(compilation.cudagraph_mode),
            "graph_sizes": list(compilation.cudagraph_capture_sizes or []),
            "tower_graphs": _tower_graphs(self.model_runner),
            "model_runner": "V2" if self.vllm_config.use_v2_model_runner else "V1",
            "prefix_caching": self.vllm_config.cache_config.enable_prefix_caching,
            "async_scheduling": self.vllm_config.scheduler_config.async_scheduling,
            "step_tokens": self.vllm_config.scheduler_config.max_num_batched_tokens,
            "reserved_bytes": torch.cuda.memory_reserved() if cuda else None,
        }


def _tower_graphs(runner: Any) -> bool:
    """Whether vLLM's encoder runner has captured graphs; its V1 runner is not asked."""
    encoder = getattr(getattr(runner, "model_state", None), "encoder_runner", None)
    manager = getattr(encoder, "cudagraph_manager", None)
    return manager is not None and bool(manager.is_captured())


def _decoder_attention(layers: dict[str, Any]) -> list[str]:
    """Name of every decoder layer's attention, with the version of FlashAttention where it has one."""
    found = []
    for layer in layers.values():
        if not hasattr(layer, "get_attn_backend"):
            continue
        version = getattr(getattr(layer, "impl", None), "vllm_flash_attn_version", None)
        name = layer.get_attn_backend().get_name()
        found.append(name if version is None else f"{name} {version}")
    return found


def _tower_attention(model: torch.nn.Module) -> list[str]:
    """Name of every tower layer's attention, with the version of FlashAttention where it has one.

    ``PACKED`` is the plugin's own over merged tokens, which goes past vLLM's.
    """
    found = []
    hybrid = getattr(model, "hybrid", None)
    packed = hybrid is not None and hybrid.active
    for module in model.modules():
        if type(module).__name__ == "MMEncoderAttention":
            if packed:
                found.append("PACKED")
                continue
            version = getattr(module, "_fa_version", None)
            name = _name(module.attn_backend)
            found.append(name if version is None else f"{name} {version}")
    return found


def _count(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _name(choice: Any) -> str:
    return getattr(choice, "name", str(choice))
