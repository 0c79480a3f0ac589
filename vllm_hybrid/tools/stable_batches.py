"""Random batches of named things that hardly change when one of the things comes or goes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def stable_batches(names: Sequence[str], batch_size: int, seed: int) -> list[list[int]]:
    """Part named things into batches at random.

    Each batch in turn takes those of the things left that a hash of name, seed and batch puts first. If one
    thing is taken away, the next in line takes its place; that one leaves a gap in a random later batch, and
    so on: of B batches about log(B) change, the same ones as if the thing had never been there.

    Args:
        names: one for each thing; their order does not matter.
        batch_size: things in a batch; the last two share what is left for them.
        seed: another one gives other batches.

    Returns:
        For each batch the numbers of its things.

    """
    hashes = np.array([_hash(name) for name in names], np.uint64)
    left = np.arange(len(names))
    batches = []
    for number, size in enumerate(_sizes(len(names), batch_size)):
        keys = _scrambled(hashes[left] ^ np.uint64(_hash(f"{seed} {number}")))
        first = np.argpartition(keys, size - 1)[:size]
        first = first[np.argsort(keys[first])]
        batches.append(left[first].tolist())
        left = np.delete(left, first)
    return batches


def _sizes(things: int, batch_size: int) -> list[int]:
    """Full batches, but that the last two are alike where the last would not be full."""
    full, rest = divmod(things, batch_size)
    if rest == 0:
        return [batch_size] * full
    if full == 0:
        return [rest]
    shared = batch_size + rest
    return [*[batch_size] * (full - 1), shared - shared // 2, shared // 2]


def _hash(text: str) -> int:
    # File names need not be Unicode.
    name = text.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def _scrambled(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: values that differ in any bit come to differ in half of them."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
