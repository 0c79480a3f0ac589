"""Processes that train one model together: each computes the gradients of a share of every batch.

A process with one thread does not wait for slower threads inside every operation, only once a step, which
is what makes a second core worth having on a machine with other work.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing


@dataclass(frozen=True)
class Team:
    """This process's number and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; each calls it with a tensor of the same shape."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor


def run_team(size: int, work: Callable[[Team], None]) -> None:
    """Run ``work`` in ``size`` processes, this one being the first, and wait for all of them."""
    torch.set_num_threads(1)
    if size == 1:
        work(Team())
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        fork = multiprocessing.get_context("fork")
        others = [
            fork.Process(target=_join, args=(Team(rank, size), meeting, work)) for rank in range(1, size)
        ]
        for other in others:
            other.start()
        _join(Team(0, size), meeting, work)
        for other in others:
            other.join()


def _join(team: Team, meeting: str, work: Callable[[Team], None]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Members may be stopped and continued by whoever needs the machine.
    patience = datetime.timedelta(days=7)
    distributed.init_process_group(
        "gloo", f"file://{meeting}", rank=team.rank, world_size=team.size, timeout=patience
    )
    try:
        work(team)
    finally:
        distributed.destroy_process_group()
