"""How many rows the host grants the tower's layers before it knows how many tokens will be left.

What images of one kind (one level) needed is learned from the read at the end of every batch: after each
layer, the tokens of an image on average. A later batch of n images gets n times the average over the last
batches, plus what the farthest of those was above it, as a sum of independent pictures would be (by the root
of how many they are), and a little on top. This is a guess about pictures. A batch that needs more is
run again with a row for every token, which is always enough. Then nothing is guessed for one batch, after the
next such failure for two, then four and so on up to 64: pictures chosen to fail cost a second run in one of
65 batches, after the first few.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

WINDOW = 64
# Batches of a kind that have to be known before one is guessed: how far pictures differ shows late.
FEWEST = 16
SLACK = 17 / 16
# Rows are a multiple of this share of a batch's unmerged tokens, so that few shapes occur.
STEPS = 64
LONGEST_PAUSE = 64
# Batches without a failure after which a pause gets shorter again.
TRUSTED_AFTER = 64

# Share of an image's tokens that buckets of rows leave behind the last layer.
BUCKETS = (1.0, 1 / 2, 1 / 3, 1 / 4)

# How many images of a kind a batch had, and their mean tokens after each layer.
_Batch = tuple[int, np.ndarray]


class TowerCapacity:
    """Rows for the layers of coming batches, learned from past ones.

    Attributes:
        batches: those that were granted fewer rows than there could have been tokens.
        reruns: those of them that needed more.

    """

    def __init__(self) -> None:
        self.batches = 0
        self.reruns = 0
        self._seen: dict[Hashable, deque[_Batch]] = {}
        self._pause = 1
        self._paused = 0
        self._held = 0

    def rows(self, kinds: Sequence[Hashable], length: int, layers: int) -> list[int] | None:
        """Rows after each layer for a batch.

        Args:
            kinds: of every image, what decides about its merging.
            length: tokens of an unmerged image.
            layers: layers of the tower.

        Returns:
            Never more than a layer before; None where the batch is to have a row for every token.

        """
        if self._paused > 0:
            self._paused -= 1
            return None
        if any(len(self._seen.get(kind, ())) < FEWEST for kind in kinds):
            return None
        unmerged = len(kinds) * length
        wanted = sum(_wanted(self._seen[kind], images) for kind, images in Counter(kinds).items())
        return grant(wanted, unmerged)

    def learn(self, kinds: Sequence[Hashable], lengths: Sequence[Sequence[int]]) -> None:
        """Take in what a batch needed.

        Args:
            kinds: of every image.
            lengths: after each layer, tokens of every image.

        """
        for kind in set(kinds):
            own = [image for image, its_kind in enumerate(kinds) if its_kind == kind]
            mean = np.array(lengths)[:, own].mean(axis=1)
            self._seen.setdefault(kind, deque(maxlen=WINDOW)).append((len(own), mean))

    def count(self, overflowed: bool) -> None:
        """Note how a batch that had been granted fewer rows went."""
        self.batches += 1
        if overflowed:
            self.reruns += 1
            self._paused, self._held = self._pause, 0
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return
        self._held += 1
        if self._held == TRUSTED_AFTER:
            self._pause, self._held = max(1, self._pause // 2), 0


def row_buckets(images: int, length: int, layers: int) -> list[list[int]]:
    """Rows for the layers of batches of which the shapes are to be known beforehand.

    Calibrated thresholds merge about as many tokens in each layer, so the rows of a bucket fall on a line, on
    top of which comes the slack of any batch.

    Args:
        images: in a batch.
        length: tokens of an unmerged image.
        layers: layers of the tower.

    Returns:
        For each bucket rows after each layer; the first has a row for every token.

    """
    unmerged = images * length
    done = np.arange(1, layers + 1) / layers
    return [grant(np.ceil(unmerged * (1 - (1 - left) * done)), unmerged) for left in BUCKETS]


def grant(tokens: ArrayLike, unmerged: int) -> list[int]:
    """Rows after each layer for the tokens that are expected there: a little more, rounded up.

    Args:
        tokens: of all images of a batch, after each layer.
        unmerged: tokens of the batch before the first.

    Returns:
        Never more than ``unmerged``, nor than a layer before.

    """
    step = -(-unmerged // STEPS)
    rows = np.ceil(np.asarray(tokens) * SLACK / step).astype(int) * step
    return np.minimum.accumulate(np.minimum(rows, unmerged)).tolist()


def _wanted(seen: Sequence[_Batch], images: int) -> np.ndarray:
    """Tokens that some images of one kind are expected to have at most, after each layer."""
    counts = np.array([count for count, _ in seen])[:, None]
    means = np.stack([mean for _, mean in seen])
    average = (counts * means).sum(axis=0) / counts.sum()
    farthest = ((means - average) * np.sqrt(counts)).max(axis=0)
    return images * average + np.sqrt(images) * farthest
