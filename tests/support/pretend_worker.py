"""A worker without a model: it carries out a scheduler's steps on a memory of tags and checks every read.

Each position that a model would keep keys for has a tag that says what should be stored there: everything it
depends on. A step writes the tags of its positions through the block tables it was sent and then reads all
positions up to its end back, so that a block that was given away too early, or twice, shows as a wrong tag.
Nothing here knows how the scheduler decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from tests.support.reference import keep_count
from vllm_hybrid.engine.scheduler import FOREIGN_PAGES, LIVE_COUNTS


@dataclass
class Tagged:
    """What one request has in memory.

    Attributes:
        ids: token ids of the prompt and of all answers so far.
        spans: first position and identifier of each image.
        tables: block ids of each tier.
        prompt_length: positions of the prompt.
        tags: [tiers, positions], what is to be stored for each position.
        used: [tiers, positions], whether a position's slot is used.

    """

    ids: list[int]
    spans: list[tuple[int, str]]
    tables: list[list[int]]
    prompt_length: int
    tags: NDArray[np.int64]
    used: NDArray[np.bool_]

    def forget(self, length: int) -> None:
        """Keep the first positions only."""
        del self.ids[length:]
        self.tags, self.used = self.tags[:, :length], self.used[:, :length]


class PretendWorker:
    """Carries out steps.

    Args:
        block_sizes: tokens per block of each tier, lower first.
        num_blocks: blocks of the pool.
        patches: positions of an image.
        ratio: share of live tokens the upper tier drops.
        live: live tokens by image identifier.

    Attributes:
        silent: images whose counts are not told.
        lost: requests of which it says that a page holds another's data.

    """

    def __init__(
        self, block_sizes: Sequence[int], num_blocks: int, patches: int, ratio: float, live: dict[str, int]
    ) -> None:
        self.block_sizes = list(block_sizes)
        # One memory for all tiers, as on a device: a block that two of them hold is overwritten.
        self.memory = np.zeros((num_blocks, max(block_sizes)), dtype=np.int64)
        self.patches, self.ratio, self.live = patches, ratio, live
        self.requests: dict[str, Tagged] = {}
        self.encoded: set[str] = set()
        self.silent: set[str] = set()
        self.lost: set[str] = set()

    def slots(self, image: str) -> list[int]:
        """Slots an image needs in each tier."""
        live = self.live[image]
        return [live, keep_count(live, self.ratio)][: len(self.block_sizes)]

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Carry a step out.

        Args:
            output: what the scheduler decided.

        Returns:
            One new token for every request that has caught up: the number of its position. With them the
            live counts of the images that were encoded, but for those of ``silent``.

        """
        begins = self._take_in(output)
        counts = self._encode(output)
        stretches = {
            name: (begins[name], begins[name] + number)
            for name, number in output.num_scheduled_tokens.items()
        }
        for name, (begin, end) in stretches.items():
            self._check_stretch(name, begin, end)
            self._write(name, begin, end)
        for name, (_, end) in stretches.items():
            self._read(name, end)
        result = ModelRunnerOutput(
            req_ids=list(stretches),
            req_id_to_index={name: i for i, name in enumerate(stretches)},
            sampled_token_ids=[self._sample(name, end) for name, (_, end) in stretches.items()],
        )
        if counts:
            setattr(result, LIVE_COUNTS, counts)
        if self.lost & stretches.keys():
            setattr(result, FOREIGN_PAGES, sorted(self.lost & stretches.keys()))
        return result

    def _take_in(self, output: SchedulerOutput) -> dict[str, int]:
        """Update block tables; returns where each request's stretch begins."""
        begins = {}
        for name in output.finished_req_ids:
            self.requests.pop(name, None)
        self.encoded -= set(output.free_encoder_mm_hashes)
        for new in output.scheduled_new_reqs:
            self.requests[new.req_id] = self._tagged(new)
            begins[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            begins[name] = cached.num_computed_tokens[i]
            request, blocks = self.requests[name], cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                assert blocks is not None
                request.tables = [list(table) for table in blocks]
                # Tokens that the scheduler did not take are sampled again.
                request.forget(request.prompt_length + cached.num_output_tokens[i])
            elif blocks is not None:
                for table, fresh in zip(request.tables, blocks, strict=True):
                    table.extend(fresh)
        return begins

    def _tagged(self, new: Any) -> Tagged:
        """A request that the scheduler names for the first time."""
        tiers, ids = len(self.block_sizes), list(new.prompt_token_ids)
        request = Tagged(
            ids,
            spans=[(feature.mm_position.offset, feature.identifier) for feature in new.mm_features],
            tables=[list(table) for table in new.block_ids],
            prompt_length=len(ids),
            tags=np.zeros((tiers, 0), dtype=np.int64),
            used=np.zeros((tiers, 0), dtype=bool),
        )
        self._tag(request)
        for start, image in request.spans:
            for tier, slots in enumerate(self.slots(image)):
                request.used[tier, start + slots : start + self.patches] = False
        if request.spans:
            # What the upper tier keeps from the first image on depends on the whole prompt.
            request.tags[1:, request.spans[0][0] :] ^= request.tags[0, -1]
        return request

    def _tag(self, request: Tagged) -> None:
        """Tag the positions that have none yet by everything up to them."""
        before = request.tags.shape[1]
        known = int(request.tags[0, -1]) if before else 1
        images = dict(request.spans)
        fresh = []
        for position in range(before, len(request.ids)):
            known = hash((known, request.ids[position], images.get(position)))
            fresh.append(known)
        tags = np.tile(np.array(fresh, dtype=np.int64), (len(self.block_sizes), 1))
        request.tags = np.concatenate([request.tags, tags], axis=1)
        request.used = np.concatenate([request.used, np.ones_like(tags, dtype=bool)], axis=1)

    def _encode(self, output: SchedulerOutput) -> dict[str, int]:
        """Encode the step's images; returns the live counts that are told."""
        new = {
            self.requests[name].spans[i][1]
            for name, indices in output.scheduled_encoder_inputs.items()
            for i in indices
        }
        self.encoded |= new
        return {image: self.live[image] for image in sorted(new - self.silent)}

    def _check_stretch(self, name: str, begin: int, end: int) -> None:
        """No image is cut, each is encoded, and where tokens are pruned it comes with the prompt's end."""
        request = self.requests[name]
        for start, image in request.spans:
            stop = start + self.patches
            assert not (start < begin < stop or start < end < stop), (
                f"{name}: image {start}..{stop} is split by a step over {begin}..{end}"
            )
            if not begin <= start < end:
                continue
            assert image in self.encoded, f"{name}: image {image} is computed, but not encoded"
            assert self.ratio == 0 or end == request.prompt_length, (
                f"{name}: a step with an image ends at {end}, the prompt at {request.prompt_length}"
            )

    def _places(self, name: str, tier: int, begin: int, end: int) -> tuple[Any, NDArray[np.int64]]:
        """Where a stretch of a request lies in memory, and its tags there."""
        request, size = self.requests[name], self.block_sizes[tier]
        positions = begin + np.nonzero(request.used[tier, begin:end])[0]
        blocks = np.array(request.tables[tier])[positions // size]
        assert (blocks > 0).all(), f"{name}: positions without a block"
        return (blocks, positions % size), request.tags[tier, positions] ^ tier

    def _write(self, name: str, begin: int, end: int) -> None:
        for tier in range(len(self.block_sizes)):
            places, tags = self._places(name, tier, begin, end)
            self.memory[places] = tags

    def _read(self, name: str, end: int) -> None:
        for tier in range(len(self.block_sizes)):
            places, tags = self._places(name, tier, 0, end)
            assert (self.memory[places] == tags).all(), f"{name}: tier {tier} holds another's data"

    def _sample(self, name: str, end: int) -> list[int]:
        request = self.requests[name]
        if end < len(request.ids):
            return []
        request.ids.append(len(request.ids))
        self._tag(request)
        return [request.ids[-1]]
