"""How many rows the host grants the tower's layers before it knows how many tokens will be left.

What images of one kind (one level) needed is learned from the read at the end of every batch: after each
layer, the tokens of an image on average over the batch. A later batch gets, for each of its images, the most
of that over the last batches and an eighth on top. This is a guess about pictures. A batch that needs more is
run again with a row for every token, which is always enough. Then nothing is guessed for one batch, after the
next such failure for two, then four and so on up to 64: pictures chosen to fail cost a second run in one of
65 batches, after the first few.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Sequence

WINDOW = 64
SLACK = 9 / 8
# Rows are a multiple of this share of a batch's unmerged tokens, so that few shapes occur.
STEPS = 32
LONGEST_PAUSE = 64
# Batches without a failure after which a pause gets shorter again.
TRUSTED_AFTER = 64


class TowerCapacity:
    """Rows for the layers of coming batches, learned from past ones.

    Attributes:
        batches: those that were granted fewer rows than there could have been tokens.
        reruns: those of them that needed more.

    """

    def __init__(self) -> None:
        self.batches = 0
        self.reruns = 0
        self._means: dict[Hashable, deque[list[float]]] = {}
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
        if any(kind not in self._means for kind in kinds):
            return None
        unmerged = len(kinds) * length
        step = -(-unmerged // STEPS)
        granted, rows = [], unmerged
        for layer in range(layers):
            wanted = sum(
                count * max(means[layer] for means in self._means[kind])
                for kind, count in Counter(kinds).items()
            )
            rows = min(rows, math.ceil(wanted * SLACK / step) * step)
            granted.append(rows)
        return granted

    def learn(self, kinds: Sequence[Hashable], lengths: Sequence[Sequence[int]]) -> None:
        """Take in what a batch needed.

        Args:
            kinds: of every image.
            lengths: after each layer, tokens of every image.

        """
        for kind in set(kinds):
            own = [image for image, its_kind in enumerate(kinds) if its_kind == kind]
            means = [sum(row[image] for image in own) / len(own) for row in lengths]
            self._means.setdefault(kind, deque(maxlen=WINDOW)).append(means)

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
