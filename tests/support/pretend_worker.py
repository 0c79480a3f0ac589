"""A worker without a model: it carries out a scheduler's steps on a memory of tags and checks every read.

Each position that a model would keep keys for has a tag that says what should be stored there: everything it
depends on. A step writes the tags of its positions through the block tables it was sent and then reads all
positions up to its end back, so that a block that was given away too early, or twice, shows as a wrong tag.
As with a model, what is shared is in memory alone: how many slots an image fills is read from its first slot,
and all of its slots have to come from one writing. Nothing here knows how the scheduler decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from tests.support.reference import keep_count
from vllm_hybrid.engine.scheduler import FOREIGN_PAGES, LIVE_COUNTS
from vllm_hybrid.frontend.beam_steps import PROMPT_TOKENS


@dataclass
class Tagged:
    """What one request has in memory.

    Attributes:
        ids: token ids of the prompt and of all answers so far.
        spans: first position and identifier of each image.
        tables: block ids of each tier.
        prompt_length: positions of the prompt.
        searched_length: of those, what a beam search has not appended.
        ranked_at: the position that ranks each image.
        tags: [tiers, positions], what is to be stored for each position.

    """

    ids: list[int]
    spans: list[tuple[int, str]]
    tables: list[list[int]]
    prompt_length: int
    searched_length: int
    ranked_at: list[int]
    tags: NDArray[np.int64]

    def forget(self, length: int) -> None:
        """Keep the first positions only."""
        del self.ids[length:]
        self.tags = self.tags[:, :length]


class PretendWorker:
    """Carries out steps.

    Args:
        block_sizes: tokens per block of each tier, lower first.
        num_blocks: blocks of the pool.
        patches: positions of an image.
        ratio_of: gives the share of live tokens that the upper tier drops, by image identifier.
        live_of: gives the live tokens, by image identifier.
        header: tokens behind an image whose last one ranks it; empty where the prompt's last one does.

    Attributes:
        silent: images whose counts are not told.
        tells: whether any counts are told.
        lost: requests of which it says that a page holds another's data.
        reduces: whether images may have fewer tokens than positions; otherwise they are as text.
        unsteady: whether every other encoding of an image has one live token less.
        written: tier, writing and image of all images that the last step wrote.
        hits: positions that each request found in memory when it was first scheduled.

    """

    def __init__(
        self,
        block_sizes: Sequence[int],
        num_blocks: int,
        patches: int,
        ratio_of: Callable[[str], float],
        live_of: Callable[[str], int],
        header: Sequence[int] = (),
    ) -> None:
        self.block_sizes = list(block_sizes)
        # One memory for all tiers, as on a device: a block that two of them hold is overwritten.
        self.memory = np.zeros((num_blocks, max(block_sizes)), dtype=np.int64)
        # Beside each slot: the writing it comes from, and how many slots the image there fills.
        self.writing = np.zeros_like(self.memory)
        self.filled = np.zeros_like(self.memory)
        self.patches, self.ratio_of, self.live_of, self.header = patches, ratio_of, live_of, list(header)
        self.requests: dict[str, Tagged] = {}
        self.encoded: dict[str, int] = {}
        self.encodings: Counter[str] = Counter()
        self.writings = 0
        self.written: list[tuple[int, int, str]] = []
        self.reduces = True
        self.unsteady = False
        self.silent: set[str] = set()
        self.tells = True
        self.lost: set[str] = set()
        self.hits: dict[str, int] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Carry a step out.

        Args:
            output: what the scheduler decided.

        Returns:
            One new token for every request that has caught up: the number of its position. With them the
            live counts of the images that were encoded, but for those of ``silent``.

        """
        self._copy_blocks(output)
        self.written = []
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

    def _copy_blocks(self, output: SchedulerOutput) -> None:
        copies = output.kv_cache_block_copies
        if copies:
            source, target = np.array(copies).T
            for slots in (self.memory, self.writing, self.filled):
                slots[target] = slots[source]

    def _take_in(self, output: SchedulerOutput) -> dict[str, int]:
        """Update block tables; returns where each request's stretch begins."""
        begins = {}
        for name in output.finished_req_ids:
            self.requests.pop(name, None)
        for image in output.free_encoder_mm_hashes:
            self.encoded.pop(image, None)
        for new in output.scheduled_new_reqs:
            self.requests[new.req_id] = self._tagged(new)
            begins[new.req_id] = self.hits[new.req_id] = new.num_computed_tokens
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
        ids = list(new.prompt_token_ids)
        spans = [(feature.mm_position.offset, feature.identifier) for feature in new.mm_features]
        # A step of a beam search is ranked as the searched prompt is.
        prompt = ids[: (new.sampling_params.extra_args or {}).get(PROMPT_TOKENS, len(ids))]
        request = Tagged(
            ids,
            spans,
            tables=[list(table) for table in new.block_ids],
            prompt_length=len(ids),
            searched_length=len(prompt),
            ranked_at=[self._ranked_at(prompt, start) for start, _ in spans],
            tags=np.zeros((len(self.block_sizes), 0), dtype=np.int64),
        )
        self._tag(request)
        for (start, image), last in zip(spans, request.ranked_at, strict=True):
            if self.ratio_of(image):
                # What the upper tier keeps of an image depends on all up to the position that ranks it.
                request.tags[1:, start:] ^= hash((start, int(request.tags[0, last])))
        return request

    def _ranked_at(self, ids: list[int], start: int) -> int:
        """The last position of the first header behind an image, or of the prompt."""
        length = len(self.header)
        for end in range(start + self.patches + length, len(ids) + 1):
            if length and ids[end - length : end] == self.header:
                return end - 1
        return len(ids) - 1

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
        if before and request.spans:
            tags[1:] ^= int(request.tags[0, before - 1] ^ request.tags[-1, before - 1])
        request.tags = np.concatenate([request.tags, tags], axis=1)

    def _encode(self, output: SchedulerOutput) -> dict[str, int]:
        """Encode the step's images; returns the live counts that are told."""
        new = {
            self.requests[name].spans[i][1]
            for name, indices in output.scheduled_encoder_inputs.items()
            for i in indices
        }
        for image in new:
            self.encodings[image] += 1
            less = self.unsteady and self.encodings[image] % 2 == 0
            self.encoded[image] = max(self.live_of(image) - less, 1)
        return {image: self.encoded[image] for image in sorted(new - self.silent) if self.tells}

    def _check_stretch(self, name: str, begin: int, end: int) -> None:
        """No image is cut, each is encoded, and where tokens are pruned it comes with what ranks it."""
        request = self.requests[name]
        for (start, image), last in zip(request.spans, request.ranked_at, strict=True):
            if not self.reduces:
                break
            stop = start + self.patches
            assert not (start < begin < stop or start < end < stop), (
                f"{name}: image {start}..{stop} is split by a step over {begin}..{end}"
            )
            if not begin <= start < end:
                continue
            assert image in self.encoded, f"{name}: image {image} is computed, but not encoded"
            if self.ratio_of(image):
                by_prompt_end = last == request.searched_length - 1
                assert end == last + 1 if by_prompt_end else end > last, (
                    f"{name}: a step with an image ends at {end}, and {last} ranks it"
                )

    # Memory

    def slots_of(self, name: str, tier: int, image: int) -> tuple[int, int]:
        """Of an image that a request has in memory: which writing it is from, and how many slots it fills."""
        request, size = self.requests[name], self.block_sizes[tier]
        start, _ = request.spans[image]
        place = request.tables[tier][start // size], start % size
        return int(self.writing[place]), int(self.filled[place])

    def _spans(self, name: str) -> list[tuple[int, str]]:
        """Images of a request of which memory says how many slots they fill."""
        return self.requests[name].spans if self.reduces else []

    def _used(self, name: str, tier: int, end: int) -> NDArray[np.bool_]:
        """bool [end]: which positions have slots in a tier, by what memory says of the images."""
        used = np.ones(end, dtype=bool)
        for number, (start, _) in enumerate(self._spans(name)):
            if start < end:
                _, filled = self.slots_of(name, tier, number)
                assert 0 < filled <= self.patches, f"{name}: the image at {start} has {filled} tokens"
                used[start + filled : start + self.patches] = False
        return used

    def _places(self, name: str, tier: int, positions: NDArray[np.int64]) -> Any:
        """Where positions of a request lie in memory."""
        size = self.block_sizes[tier]
        blocks = np.array(self.requests[name].tables[tier])[positions // size]
        assert (blocks > 0).all(), f"{name}: positions without a block"
        return blocks, positions % size

    def _write(self, name: str, begin: int, end: int) -> None:
        request = self.requests[name]
        for tier in range(len(self.block_sizes)):
            for start, image in self._spans(name):
                if begin <= start < end:
                    live = self.encoded[image]
                    filled = keep_count(live, self.ratio_of(image)) if tier else live
                    self.writings += 1
                    self.written.append((tier, self.writings, image))
                    places = self._places(name, tier, np.arange(start, start + filled))
                    self.writing[places] = self.writings
                    self.filled[places] = filled
            positions = begin + np.nonzero(self._used(name, tier, end)[begin:])[0]
            self.memory[self._places(name, tier, positions)] = request.tags[tier, positions] ^ tier

    def _read(self, name: str, end: int) -> None:
        request = self.requests[name]
        for tier in range(len(self.block_sizes)):
            positions = np.nonzero(self._used(name, tier, end))[0]
            tags = request.tags[tier, positions] ^ tier
            assert (self.memory[self._places(name, tier, positions)] == tags).all(), (
                f"{name}: tier {tier} holds another's data"
            )
            for number, (start, _) in enumerate(self._spans(name)):
                if start < end:
                    writing, filled = self.slots_of(name, tier, number)
                    places = self._places(name, tier, np.arange(start, start + filled))
                    assert (self.writing[places] == writing).all(), f"{name}: tier {tier} mixes two writings"

    def _sample(self, name: str, end: int) -> list[int]:
        request = self.requests[name]
        if end < len(request.ids):
            return []
        request.ids.append(len(request.ids))
        self._tag(request)
        return [request.ids[-1]]
