"""What an engine in this process does: its steps, and what it makes of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.checks.compare import Look
from vllm_hybrid.models import encoder_output


class Pictures:
    """Every picture that a model encodes, and what becomes of it in every prefill.

    Args:
        pixels: float32 [pictures, 3, height, width], the pictures as the reference preprocesses them.

    """

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels
        self._encoded: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._looks: list[tuple[int, Look]] = []

    def attach(self, model: Any) -> None:
        """Look at a model's pictures from here on."""
        embed = model.embed_multimodal

        def embedded(**kwargs: Any) -> Any:
            # The model takes the pixels out of its arguments.
            pixels = kwargs["pixel_values"]
            embeddings = embed(**kwargs)
            self._note(pixels, embeddings)
            return embeddings

        model.embed_multimodal = embedded
        model.watch_choices(self._chosen)

    def _note(self, pixels: Any, embeddings: Sequence[torch.Tensor]) -> None:
        for own, embedding in zip(pixels, embeddings, strict=True):
            distance = (self.pixels - own.float().cpu()).abs().flatten(1).mean(dim=1)
            (features,), owner, _ = encoder_output.decode([embedding])
            live = int(owner.max()) + 1
            self._encoded.append((int(distance.argmin()), owner[0].cpu(), features[:live].float().cpu()))

    def _chosen(self, images: Any, lower: Any, upper: Any) -> None:
        stands = (upper.row_of[images.patch_rows] >= 0).cpu()
        for owner, kept in zip(images.owner.cpu(), stands, strict=True):
            picture, _, features = next(
                encoded for encoded in reversed(self._encoded) if torch.equal(encoded[1], owner)
            )
            self._looks.append((picture, Look(owner, kept, features)))

    def take(self) -> dict[int, list[Look]]:
        """What prefills made of each picture since the last call, by number."""
        found: dict[int, list[Look]] = {}
        for picture, look in self._looks:
            found.setdefault(picture, []).append(look)
        self._encoded, self._looks = [], []
        return found


class Steps:
    """What an engine's steps are made of.

    Args:
        scheduler: the engine's.

    """

    def __init__(self, scheduler: Any) -> None:
        self.counts = self._none()
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            rows = output.num_scheduled_tokens.values()
            self.counts["steps"] += bool(rows)
            self.counts["mixed"] += any(n > 1 for n in rows) and any(n == 1 for n in rows)
            self.counts["preempted"] += len(output.preempted_req_ids or ())
            return output

        def updated(scheduler_output: Any, runner_output: Any, *args: Any, **kwargs: Any) -> Any:
            stats = getattr(runner_output, "cudagraph_stats", None)
            if stats is not None and "FULL" in stats.runtime_mode:
                self.counts["graphs"] += 1
                self.counts["padded"] += stats.num_paddings > 0
            return update(scheduler_output, runner_output, *args, **kwargs)

        scheduler.schedule, scheduler.update_from_output = scheduled, updated

    @staticmethod
    def _none() -> dict[str, int]:
        return dict.fromkeys(("steps", "mixed", "preempted", "graphs", "padded"), 0)

    def take(self) -> dict[str, int]:
        """Counts since the last call: steps; with a prompt and a decode; requests preempted; steps replayed
        from a graph; of those filled up to its size.
        """
        counts, self.counts = self.counts, self._none()
        return counts


class Squeeze:
    """Takes a pool's free blocks away, so that the next block a request needs is another's.

    Args:
        pool: the engine's block pool.

    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.held: list[Any] = []

    def hold(self) -> None:
        """Take all free blocks."""
        self.held += self.pool.get_new_blocks(self.pool.get_num_free_blocks())

    def release(self) -> None:
        """Give them back, and have nobody find what is cached: whoever was preempted starts over."""
        self.pool.free_blocks(self.held)
        self.pool.evict_blocks(set(range(1, self.pool.num_gpu_blocks)))
        self.held = []
