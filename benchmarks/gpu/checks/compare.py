"""What an engine did with its requests against the tests' reference, aspect by aspect.

Merged sets, kept sets, log-probabilities and tokens are looked at apart, and what follows from an earlier
aspect is looked at twice: against the reference, and against the reference given what the engine did before.
In bf16 the tower merges otherwise than in float32, so there only the second says whether the language model
is right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.support.engines import Ask, ServingReference, image_key
from tests.support.reference import Asked, Choice


@dataclass
class Look:
    """What an engine made of a picture in one prefill.

    Attributes:
        owner: int64 [patches], the live token that holds each patch.
        kept: bool [patches], whether that token lives on behind FastV's layer.
        features: float32 [live tokens, hidden], what the language model was given.

    """

    owner: torch.Tensor
    kept: torch.Tensor
    features: torch.Tensor

    @property
    def members(self) -> list[list[int]]:
        """The patches of each live token."""
        return [(self.owner == token).nonzero()[:, 0].tolist() for token in range(self.features.shape[0])]

    @property
    def kept_tokens(self) -> list[int]:
        """The live tokens that live on, ascending."""
        return self.owner[self.kept].unique().tolist()


@dataclass
class Answer:
    """What an engine answered to a request.

    Attributes:
        prompt_ids: the prompt as it counts it.
        tokens: the new tokens.
        logprobs: the reported log-probabilities of each step, by token.
        looks: for each of the request's pictures what was made of it, in every prefill.

    """

    prompt_ids: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    looks: list[list[Look]]


@dataclass(frozen=True)
class Tolerance:
    """What may differ.

    Attributes:
        sets: whether merged and kept sets have to be the reference's.
        logprob: worst difference of a log-probability; None: it is reported and not judged.
        given: the same, given the engine's own live tokens and kept ones.
        given_median: the median of those.
        importance: how far below the least important kept token, as a share of it, one may be that the engine
            keeps, given the engine's own live tokens.

    """

    sets: bool
    logprob: float | None
    given: float
    given_median: float
    importance: float


# Float32: the tests' own on a CPU. Bf16 holds 8 bits of a number: on the same requests a CPU engine, whose
# kernels are others, differs by up to 0.10, by 0.016 in the median, and keeps tokens that are up to 1.2 % too
# unimportant. Twice that is allowed, of the median half as much again: scores that are 5 % too large bring
# it to 0.033.
TOLERANCES = {
    "float32": Tolerance(sets=True, logprob=1e-3, given=1e-3, given_median=1e-4, importance=1e-3),
    "bfloat16": Tolerance(sets=False, logprob=None, given=0.2, given_median=0.025, importance=0.025),
}


class NotingReference(ServingReference):
    """The reference, which keeps FastV's choices of the last request it was asked about."""

    def __init__(self, checkpoint: str | Path, hybrid: Mapping[str, Any]) -> None:
        super().__init__(checkpoint, hybrid)
        self.wanted: list[Choice] = []

    def _prune(self, rows: Any, importance: torch.Tensor) -> tuple[Any, list[Choice]]:
        pruned, self.wanted = super()._prune(rows, importance)
        return pruned, self.wanted


class GivenReference(NotingReference):
    """The reference from where an engine took another way: it is told live tokens and kept ones."""

    def __init__(self, plain: NotingReference) -> None:
        self.__dict__.update(plain.__dict__)
        self._encoded = {}
        self.kept: list[list[int]] = []

    def tell(self, images: Sequence[Asked], looks: Sequence[Look]) -> None:
        """What the engine made of a request's pictures."""
        for image, look in zip(images, looks, strict=True):
            self._encoded[image_key(image)] = (look.features, look.members)
        self.kept = [look.kept_tokens for look in looks]

    def _prune(self, rows: Any, importance: torch.Tensor) -> tuple[Any, list[Choice]]:
        """Keep what the engine kept, and note what should have been."""
        super()._prune(rows, importance)
        stay, seen = [], [0] * len(self.kept)
        for row, image in enumerate(rows.image_of):
            if image is None or seen[image] in self.kept[image]:
                stay.append(row)
            if image is not None:
                seen[image] += 1
        positions = [rows.positions[row] for row in stay]
        image_of = [rows.image_of[row] for row in stay]
        pruned = replace(rows, hidden=rows.hidden[stay], positions=positions, image_of=image_of)
        return pruned, self.wanted


def other_sets(owner: torch.Tensor, members: Sequence[Sequence[int]]) -> int:
    """How many patches share a live token with other patches than the reference's members say."""
    wanted = torch.empty_like(owner)
    for token, patches in enumerate(members):
        wanted[list(patches)] = token
    together, should = (x[:, None] == x[None, :] for x in (owner, wanted))
    return int((together != should).any(dim=1).sum())


def other_kept(look: Look, members: Sequence[Sequence[int]], choice: Choice) -> int:
    """How many patches live on that should not, or the other way round."""
    wanted = torch.zeros_like(look.kept)
    for token in choice.kept:
        wanted[list(members[token])] = True
    return int((wanted != look.kept).sum())


def too_unimportant(kept: Sequence[int], choice: Choice) -> float:
    """How far the least important of the kept tokens is below the least important that should be kept.

    As a share of the latter; infinite where another number of tokens is kept. 0 for the right choice.
    """
    if len(kept) != len(choice.kept):
        return float("inf")
    least = float(choice.importance[choice.kept].min())
    return max(0.0, (least - float(choice.importance[list(kept)].min())) / least)


def gaps(answer: Answer, distributions: torch.Tensor) -> list[float]:
    """Absolute difference of every reported log-probability; infinite where one is no number."""
    return [
        gap if math.isfinite(gap := abs(logprob - float(row[token]))) else math.inf
        for row, reported in zip(distributions, answer.logprobs, strict=True)
        for token, logprob in reported.items()
    ]


class Comparison:
    """Differences of the answers to the requests of a case, gathered request by request.

    Args:
        reference: of the checkpoint and section served.
        tolerance: what may differ.

    """

    def __init__(self, reference: NotingReference, tolerance: Tolerance) -> None:
        self.reference = reference
        self.given = GivenReference(reference)
        self.tolerance = tolerance
        self.prompts_equal = True
        self.merged: list[int] = []
        self.kept: list[int] = []
        self.importance: list[float] = []
        self.gaps: list[float] = []
        self.given_gaps: list[float] = []
        # By how much less likely than the likeliest a chosen token is, given the engine's own sets.
        self.behind: list[float] = []
        self.tokens = 0
        self.other_tokens = 0

    def add(self, ask: Ask, answer: Answer, tokens: int) -> None:
        """Compare one request.

        Args:
            ask: the request.
            answer: what came.
            tokens: how many new ones were asked for.

        """
        ids = self.reference.prompt_ids(ask.text)
        self.prompts_equal &= answer.prompt_ids == ids and len(answer.tokens) == tokens
        if not self.prompts_equal:
            return
        plain = self.reference.score(ids, ask.images, answer.tokens).distributions
        merged, kept = self._sets(ask, answer)
        off = gaps(answer, plain)
        self.merged += merged
        self.kept += kept
        self.gaps += off
        given = plain
        # Where the sets are the reference's and what follows too, the second look would be the same.
        differs = any(merged) or any(kept) or max(off, default=0.0) > self.tolerance.given
        # A request that had to start over has looked at its pictures several times; what counts is the last.
        if differs and ask.images and all(answer.looks):
            self.given.tell(ask.images, [looks[-1] for looks in answer.looks])
            given = self.given.score(ids, ask.images, answer.tokens).distributions
            for chosen, choice in zip(self.given.kept, self.given.wanted, strict=True):
                self.importance.append(too_unimportant(chosen, choice))
        self.given_gaps += gaps(answer, given)
        self.tokens += len(answer.tokens)
        self.other_tokens += int((plain.argmax(dim=-1) != torch.tensor(answer.tokens)).sum())
        own = given[range(len(answer.tokens)), answer.tokens]
        self.behind += (given.amax(dim=-1) - own).tolist()

    def _sets(self, ask: Ask, answer: Answer) -> tuple[list[int], list[int]]:
        """Patches in other merged sets, and in other kept sets, of every look at a picture."""
        merged, kept = [], []
        for image, choice, looks in zip(ask.images, self.reference.wanted, answer.looks, strict=True):
            members = self.reference.encode(image)[1]
            # A picture that no prefill showed is as wrong as one can be.
            unseen = [self.reference.patches] if not looks else []
            merged += [other_sets(look.owner, members) for look in looks] + unseen
            kept += [other_kept(look, members, choice) for look in looks] + unseen
        return merged, kept

    def result(self) -> dict[str, Any]:
        """The differences, and ``agrees`` by aspect; None where an aspect is reported and not judged."""
        allowed = self.tolerance
        if not self.prompts_equal:
            return {"agrees": {"prompt and length": False}}
        most = {name: max(getattr(self, name), default=0.0) for name in ("gaps", "given_gaps", "behind")}
        importance = max(self.importance, default=0.0)
        median = statistics.median(self.given_gaps)
        agrees = {
            "prompt and length": True,
            "merged": not any(self.merged) if allowed.sets else None,
            "kept": not any(self.kept) if allowed.sets else None,
            "kept, given the merged": importance <= allowed.importance,
            "logprobs": None if allowed.logprob is None else most["gaps"] <= allowed.logprob,
            "logprobs, given the sets": most["given_gaps"] <= allowed.given
            and median <= allowed.given_median,
            # A token that is no longer the likeliest is one of two nearly as likely.
            "tokens": most["behind"] <= 2 * allowed.given,
        }
        return {
            "merged": {"pictures": len(self.merged), **_count(self.merged)},
            "kept": {"pictures": len(self.kept), **_count(self.kept), "too_unimportant": importance},
            "logprobs": {"worst": most["gaps"], "median": statistics.median(self.gaps)},
            "logprobs_given_sets": {"worst": most["given_gaps"], "median": median},
            "tokens": {
                "count": self.tokens,
                "not_the_likeliest": self.other_tokens,
                "behind": most["behind"],
            },
            "agrees": agrees,
        }


def _count(patches: Sequence[int]) -> dict[str, int]:
    return {"different": sum(p > 0 for p in patches), "most_patches": max(patches, default=0)}


def same_answers(first: Sequence[Answer], second: Sequence[Answer]) -> bool:
    """Whether two runs gave the same tokens and log-probabilities, to the last bit."""
    return [(a.tokens, a.logprobs) for a in first] == [(a.tokens, a.logprobs) for a in second]
