"""Muon for the hidden matrices, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tools.demo_training.team import Team

# Muon's steps are scaled to the size of AdamW's, so that one rate serves both.
_ADAMW_SHARE = 0.4


class Optimizer:
    """Steps of both optimizers at a common rate, on gradients averaged over a team."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], team: Team) -> None:
        """Take the parameters to train; the matrices of layers and projector go to Muon."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            hidden = parameter.ndim == 2 and (".layers." in name or "projector" in name)
            (matrices if hidden else others).append(parameter)
        self._parameters = matrices + others
        self._team = team
        self._muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, rate: float, stop: bool = False) -> bool:
        """Average the team's gradients, clip them to norm 1, update at the rate, forget the gradients.

        Returns:
            Whether any of the team asked to ``stop`` after this step.

        """
        stop = self._average(stop)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, share in ((self._muon, 1.0), (self._adamw, _ADAMW_SHARE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return stop

    def _average(self, stop: bool) -> bool:
        if self._team.size == 1:
            return stop
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([float(stop)])])
        self._team.sum(flat)
        parts = flat[:-1].div_(self._team.size).split([p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return bool(flat[-1] > 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything to continue from."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def rate_at(step: int, steps: int, peak: float, warm_up: int = 50, decay: float = 0.3) -> float:
    """The learning rate of a step: up, flat, and down to zero in a straight line over the last share."""
    falling = max(1.0, decay * steps)
    return peak * min(1.0, (step + 1) / warm_up, max(0.0, (steps - step) / falling))
