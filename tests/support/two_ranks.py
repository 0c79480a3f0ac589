"""An engine with two CPU ranks, and what each rank chose; run as a program by its test.

An engine with several ranks takes vLLM's process groups of its process down when it ends, so it has a process
of its own and leaves the test's engines alone. Reads `Work` from a folder, writes `Found` into it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support.engines import Ask, serve
from tests.support.paths import ROOT

RANKS = 2
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # vLLM gives each rank a NUMA node of its own, and most machines have one. One thread a rank, free to run
    # where there is room, is what a small machine can bear: ranks spin while they wait for each other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class ImageChoice(NamedTuple):
    """What a rank made of one image: the live token that holds each patch, and the tokens FastV kept."""

    owner: tuple[int, ...]
    kept: tuple[int, ...]


class Batch(NamedTuple):
    """A batch of images: how many, how many this rank's tower encoded, and a digest of the outputs."""

    images: int
    own: int
    outputs: str


@dataclass
class Work:
    """What to serve and ask. `rounds` come one after the other; each request is answered in `tokens` tokens.

    `apart` asks for all of it again, with every rank left to score by its own heads.
    """

    checkpoint: Path
    hybrid: dict[str, Any]
    rounds: list[list[Ask]]
    tokens: int
    apart: bool = False

    @property
    def asks(self) -> list[Ask]:
        """All requests."""
        return [ask for asks in self.rounds for ask in asks]


@dataclass
class Found:
    """Answers as vLLM gives them; of each rank its choices, its batches, and the heads that its tower has.

    `apart` and `apart_outputs` are the choices and answers, of one token, of ranks that score by their own
    heads.
    """

    outputs: list[Any]
    choices: list[list[ImageChoice]]
    batches: list[list[Batch]]
    tower_heads: list[int]
    apart_outputs: list[Any] = field(default_factory=list)
    apart: list[list[ImageChoice]] = field(default_factory=list)


class RankView:
    """Mixed into each rank's worker by vLLM (`worker_extension_cls`), for `collective_rpc` to call."""

    model_runner: Any

    def watch_choices(self) -> None:
        """Remember the choices of all later steps."""
        self.seen_choices: list[ImageChoice] = []
        self.model_runner.get_model().watch_choices(self.see_choice)

    def see_choice(self, images: Any, lower: Any, upper: Any) -> None:
        """Called by the model in every step with images."""
        for owner, rows in zip(images.owner, images.patch_rows, strict=True):
            kept = owner[upper.row_of[rows] >= 0].unique()
            self.seen_choices.append(ImageChoice(tuple(owner.tolist()), tuple(kept.tolist())))

    def take_choices(self) -> list[ImageChoice]:
        """The choices since the last call."""
        taken, self.seen_choices = self.seen_choices, []
        return taken

    def watch_tower(self) -> None:
        """Remember the batches of all later steps."""
        self.seen_batches: list[Batch] = []
        model = self.model_runner.get_model()
        encode, embed = model.vision_tower.vision_model.embeddings.forward, model.embed_multimodal
        own = 0

        def counted(pixels: torch.Tensor) -> torch.Tensor:
            nonlocal own
            own += len(pixels)
            return encode(pixels)

        def noted(**inputs: Any) -> Any:
            nonlocal own
            own = 0
            outputs = embed(**inputs)
            digest = hashlib.sha256()
            for output in outputs:
                digest.update(output.contiguous().numpy().tobytes())
            self.seen_batches.append(Batch(len(outputs), own, digest.hexdigest()))
            return outputs

        model.vision_tower.vision_model.embeddings.forward, model.embed_multimodal = counted, noted

    def take_batches(self) -> list[Batch]:
        """The batches since the last call."""
        taken, self.seen_batches = self.seen_batches, []
        return taken

    def tower_heads(self) -> int:
        """Heads of the vision tower that this rank has."""
        tower = self.model_runner.get_model().vision_tower.vision_model
        return tower.encoder.layers[0].self_attn.num_heads_per_partition

    def score_by_own_heads(self) -> None:
        """Leave FastV's importances unreduced from now on."""
        from vllm_hybrid.models import step

        step.sum_over_ranks = lambda part: part


def answer(work: Work) -> Found:
    """Serve with two ranks, in this process and two others."""
    served = serve(
        work.hybrid,
        work.checkpoint,
        tensor_parallel_size=RANKS,
        distributed_executor_backend="mp",
        worker_extension_cls=f"{RankView.__module__}.{RankView.__qualname__}",
        # Not all requests fit into the first step, so that later ones prefill next to decodes.
        max_num_seqs=16,
        max_num_batched_tokens=2048 + 16,
    )
    assert len(served.llm.collective_rpc("watch_choices")) == RANKS
    served.llm.collective_rpc("watch_tower")
    outputs = [output for asks in work.rounds for output in served.generate(asks, work.tokens)]
    choices = served.llm.collective_rpc("take_choices")
    batches, heads = (served.llm.collective_rpc(name) for name in ("take_batches", "tower_heads"))
    found = Found(outputs, choices, batches, heads)
    if work.apart:
        served.llm.collective_rpc("score_by_own_heads")
        # What is found there was chosen before.
        assert served.llm.reset_prefix_cache()
        found.apart_outputs = served.generate(work.asks, 1)
        found.apart = served.llm.collective_rpc("take_choices")
    return found


def answer_in_own_process(work: Work, folder: Path) -> Found:
    """`answer`, called from a test.

    Raises:
        RuntimeError: the process failed; the message is the end of what it wrote.

    """
    (folder / "work").write_bytes(pickle.dumps(work))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.two_ranks", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return pickle.loads((folder / "found").read_bytes())


def main(arguments: Sequence[str]) -> None:
    """Answer the work in a folder."""
    # As a module of its own name, not __main__: the ranks and the test know its classes by that name.
    from tests.support import two_ranks

    folder = Path(arguments[0])
    found = two_ranks.answer(pickle.loads((folder / "work").read_bytes()))
    (folder / "found").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
