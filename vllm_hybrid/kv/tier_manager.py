"""The blocks of one tier: holes given back, and prefixes shared between prompts in spite of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_group_id
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request


@dataclass(eq=False)
class ImageCopy:
    """An image's tokens in the pages of one tier, all from one step, for every request that shares them.

    The same image, encoded or pruned again in another batch, may merge or keep another token where a choice
    was near a tie. Blocks of two copies must therefore never stand in one block table.

    Attributes:
        live: the image's live tokens, as they were when the step was processed; None until then.
        used: slots that its tokens fill; None as long as ``live`` is.
        hole: numbers of the blocks that lie wholly in its hole, which no block table holds any more.
        tail: the block with its last slot, where text follows in it and the prefix cache has it.
        offered: whether it was offered to the prefix cache, and no other copy of the image in its place.

    """

    live: int | None = None
    used: int | None = None
    hole: range = range(0)
    tail: KVCacheBlock | None = None
    offered: bool = False


@dataclass(frozen=True)
class Match:
    """Cached blocks that begin as a request does.

    Attributes:
        blocks: the blocks, null blocks for those in holes. Of the last one only a part may match; there is
            none for positions at the end that lie in a hole.
        end: positions that match: up to an end at which prompts are compared, or the end of an image.
        copies: the copies of images among them, by first position.

    """

    blocks: list[KVCacheBlock]
    end: int
    copies: dict[int, ImageCopy]


class TierManager(FullAttentionManager):
    """Blocks of one tier.

    Three things differ from vLLM's manager. Blocks wholly inside an image's hole go back to the pool early; a
    prompt that finds the image in the prefix cache gets the null block in their place. A block that holds
    image tokens is found only together with the others of its :class:`ImageCopy`. And a prefix may end
    inside a block, where prompts are compared by less than a block, and where an image ends: the request gets
    a copy of the block, whose rest is its own to write.
    """

    # vLLM's lookup inside blocks knows no holes; :meth:`match` does it.
    supports_fine_grained_hash_lookup = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By request and first position of an image.
        self.copies: dict[str, dict[int, ImageCopy]] = {}
        # By block and first position of an image: the copies a cached block holds tokens of.
        self._copies_in: dict[int, dict[int, ImageCopy]] = {}
        # How many positions of a request were offered to the prefix cache, where any were.
        self._offered: dict[str, int] = {}
        # Blocks that the step being scheduled writes to, and up to where earlier steps filled them.
        self._filled_before: dict[int, int] = {}

    @property
    def _unit(self) -> int:
        """Positions between two ends at which prompts are compared."""
        return self.block_pool.hash_block_size

    def new_step_starts(self) -> None:
        """What earlier steps write is there when the next one runs."""
        self._filled_before.clear()

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's, forgetting what was known about the request."""
        self.copies.pop(request_id, None)
        self._offered.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def copy_of(self, request_id: str, start: int) -> ImageCopy:
        """The copy that a request has of its image at ``start``; a new one where it shares none."""
        return self.copies.setdefault(request_id, {}).setdefault(start, ImageCopy())

    # Finding a prefix

    def match(self, request: Request, limit: int) -> Match:
        """Cached blocks that begin as a request does, for up to ``limit`` positions.

        The match may end inside an image, or in a block that is still being written: see :meth:`longest`.
        """
        size, unit = self.block_size, self._unit
        copies: dict[int, ImageCopy] = {}
        blocks: list[KVCacheBlock] = []
        while (len(blocks) + 1) * size <= limit:
            block = self._find(request, len(blocks), (len(blocks) + 1) * size, copies)
            if block is None:
                break
            blocks.append(block)
        end = len(blocks) * size
        for inner in range(min(limit, end + size - 1) // unit * unit, end, -unit):
            block = self._find(request, len(blocks), inner, copies)
            if block is not None:
                return Match([*blocks, block], inner, copies)
        return self._to_image_end(request, Match(blocks, end, copies), limit)

    def _to_image_end(self, request: Request, match: Match, limit: int) -> Match:
        """A match that ends in an image's last block, as far as the image goes.

        Positions of one image cannot differ, so nothing has to be compared.
        """
        image = image_around(request, match.end)
        if image is None:
            return match
        start, end = image.offset, image.offset + image.length
        if end > limit or end - match.end >= self.block_size:
            return match
        copy = match.copies[start]
        if copy.used is not None and start + copy.used <= match.end:
            return Match(match.blocks, end, match.copies)
        tail = self._cached_tail(copy, start)
        return match if tail is None else Match([*match.blocks, tail], end, match.copies)

    def _cached_tail(self, copy: ImageCopy, start: int) -> KVCacheBlock | None:
        """The block with an image's last slot, unless it was evicted, and may be another's since then.

        Also the other tier's, of which this manager is told nothing: both take their blocks from one pool.
        """
        tail = copy.tail
        if tail is None or tail.block_hash is None:
            return None
        is_ours = get_group_id(tail.block_hash) == self.kv_cache_group_id
        return tail if is_ours and self._copies_in.get(tail.block_id, {}).get(start) is copy else None

    def longest(self, match: Match, limit: int) -> int:
        """How many positions of a match, up to ``limit``, can be taken over in this step.

        A block of which a part is taken is copied before the step runs, so the part must have been written
        by then. Blocks taken whole are read after the step has written them.
        """
        limit = min(limit, match.end)
        number, inside = divmod(limit, self.block_size)
        # Of a hole nothing is copied; a prefix that ends inside an image is the caller's to cut.
        if inside == 0 or number == len(match.blocks) or match.blocks[number].is_null:
            return limit
        filled = self._filled_before.get(match.blocks[number].block_id, limit)
        return limit if filled >= limit else max(limit - inside, filled // self._unit * self._unit)

    def most_blocks(self, blocks: Sequence[KVCacheBlock], length: int, positions: int) -> int:
        """Blocks that a request holds at most when it computes all of its positions.

        Args:
            blocks: what it shares.
            length: positions that it shares.
            positions: all of them.

        """
        absent = sum(block.is_null for block in blocks)
        return -(-positions // self.block_size) - absent + self._has_partial_local_hit(blocks, length)

    def take(self, request_id: str, match: Match, length: int) -> list[KVCacheBlock]:
        """The blocks of the first ``length`` positions of a match; the request shares their images now."""
        self.copies[request_id] = {start: copy for start, copy in match.copies.items() if start < length}
        return match.blocks[: -(-length // self.block_size)]

    def _has_partial_local_hit(
        self, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int
    ) -> bool:
        """Whether a prefix ends inside the last of its blocks, which then has to be copied."""
        return len(new_computed_blocks) * self.block_size > num_local_computed_tokens

    def _find(
        self, request: Request, number: int, end: int, copies: dict[int, ImageCopy]
    ) -> KVCacheBlock | None:
        """The cached block for a request's positions from its block ``number``'s first up to ``end``.

        Args:
            request: the request.
            number: of the block in the request's table.
            end: one past the last position, a multiple of the unit.
            copies: the copies that the blocks before it hold; those of this one are added.

        Returns:
            A block that continues those copies, the null block where it lies wholly in their holes, None
            where the prefix cache has no such block.

        """
        starts = self._images_in(request, number, end)
        if any(number in copies[start].hole for start in starts if start in copies):
            return self._null_block
        starts = [start for start in starts if self._may_fill(copies.get(start), start, number)]
        block = self._cached(request, end)
        if block is None:
            return None
        held = self._copies_in.get(block.block_id, {})
        if any(start not in held or copies.get(start, held[start]) is not held[start] for start in starts):
            return None
        copies.update({start: held[start] for start in starts})
        return block

    def _may_fill(self, copy: ImageCopy | None, start: int, number: int) -> bool:
        """Whether a copy of the image at ``start`` may have tokens in a block, and not only unused slots."""
        return copy is None or copy.used is None or number * self.block_size < start + copy.used

    def _cached(self, request: Request, end: int) -> KVCacheBlock | None:
        """The block that the prefix cache has for a request's positions up to ``end``."""
        found = self.block_pool.get_cached_block(
            request.block_hashes[end // self._unit - 1], [self.kv_cache_group_id]
        )
        return found[0] if found else None

    def _images_in(self, request: Request, number: int, end: int) -> list[int]:
        """First positions of the images with positions in block ``number``, as far as ``end``."""
        first, end = number * self.block_size, min((number + 1) * self.block_size, end)
        places = [feature.mm_position for feature in request.mm_features]
        return [p.offset for p in places if p.offset < end and p.offset + p.length > first]

    # Offering blocks to others

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer a request's blocks to other prompts, up to the position that this step computes last.

        Where the prefix cache has another copy of an image, it keeps that one, unless this request's
        reaches further. Text behind an image fits either.
        """
        name = request.request_id
        offered = self._offered.get(name, self.num_cached_block.get(name, 0) * self.block_size)
        end = num_tokens // self._unit * self._unit
        if end <= offered:
            return
        self._offered[name] = end
        numbers = range(self._first_to_offer(request, offered), -(-end // self.block_size))
        images = {n: starts for n in numbers if (starts := self._images_in(request, n, end))}
        others = self._in_another_copy(request, images, end)
        if others is None:
            self._displace_copies(request, images, end)
        self._offer(request, [number for number in numbers if number not in (others or ())], end)
        self.num_cached_block[name] = max(self.num_cached_block.get(name, 0), end // self.block_size)

    def _first_to_offer(self, request: Request, offered: int) -> int:
        """Number of the first block to offer when positions up to ``offered`` were.

        It goes back to the first block of an image whose copy is not offered, but may have to be: its
        blocks are found all or none.
        """
        number = offered // self.block_size
        while number:
            starts = self._images_in(request, number, (number + 1) * self.block_size)
            hidden = [
                start
                for start in starts
                if start < number * self.block_size and not self.copy_of(request.request_id, start).offered
            ]
            if not hidden:
                break
            number = min(hidden) // self.block_size
        return number

    def _in_another_copy(self, request: Request, images: dict[int, list[int]], end: int) -> list[int] | None:
        """Blocks of a request that the prefix cache has, of another copy of their images.

        Args:
            request: the request.
            images: the images in each block that holds some, by the block's number.
            end: virtual position up to which the request is computed.

        Returns:
            All blocks with image tokens, by number; None where one is missing. Blocks that hold text behind
            the image and perhaps, as long as the count is unknown, tokens are not asked for.

        """
        own = self.copies.get(request.request_id, {})
        copies = {start: copy for start, copy in own.items() if copy.offered}
        ends_of = {f.mm_position.offset: _end(f) for f in request.mm_features}
        there = []
        for number, starts in images.items():
            last = (number + 1) * self.block_size
            filled = [
                start
                for start in starts
                if last <= ends_of[start]
                or start not in copies
                or (copies[start].used is not None and self._may_fill(copies[start], start, number))
            ]
            ends = self._ends_in(request, number, end)
            if not filled or not ends:
                continue
            if self._find(request, number, ends[0], copies) is None:
                return None
            there.append(number)
        return there

    def _displace_copies(self, request: Request, images: dict[int, list[int]], end: int) -> None:
        """Take other copies of these images out of the prefix cache, to offer the request's own."""
        table = self.req_to_blocks[request.request_id]
        for number, starts in images.items():
            own = {start: self.copy_of(request.request_id, start) for start in starts}
            for copy in own.values():
                copy.offered = True
            if table[number].is_null:
                continue
            for position in self._ends_in(request, number, end):
                before = {
                    start: copy
                    for start, copy in own.items()
                    if start < position and self._may_fill(copy, start, number)
                }
                while (other := self._cached(request, position)) is not None:
                    held = self._copies_in.get(other.block_id, {})
                    if all(held.get(start) is copy for start, copy in before.items()):
                        break
                    self._withdraw(other)

    def _withdraw(self, block: KVCacheBlock) -> None:
        """Take a block out of the prefix cache; whoever holds it keeps it."""
        for copy in self._copies_in.pop(block.block_id, {}).values():
            copy.offered = False
        self.block_pool.evict_blocks({block.block_id})

    def _offer(self, request: Request, numbers: Sequence[int], end: int) -> None:
        """Have the prefix cache find some blocks of a request, at every end up to ``end``."""
        table, size = self.req_to_blocks[request.request_id], self.block_size
        numbers = [number for number in numbers if not table[number].is_null]
        for number in numbers:
            block = table[number]
            self._note_copies(request, number, end)
            if (number + 1) * size > request.num_computed_tokens:
                self._filled_before.setdefault(block.block_id, request.num_computed_tokens)
        whole = {
            number
            for number in numbers
            if (number + 1) * size <= end and table[number].block_hash_num_tokens != (number + 1) * size
        }
        if whole:
            stretch = range(min(whole), max(whole) + 1)
            self.block_pool.cache_full_blocks(
                request=request,
                blocks=table,
                num_cached_blocks=stretch.start,
                num_full_blocks=stretch.stop,
                block_size=size,
                kv_cache_group_id=self.kv_cache_group_id,
                block_mask=[number in whole for number in stretch],
            )
        for number in numbers:
            # vLLM drops a block's shorter entries when it gets a longer one, so the longest goes first.
            for position in self._ends_in(request, number, end):
                if position % size:
                    self.block_pool.cache_partial_block(
                        request, table[number], position, self.kv_cache_group_id, size
                    )

    def _note_copies(self, request: Request, number: int, end: int) -> None:
        """Remember of which images a request's block holds tokens, as far as ``end``."""
        block = self.req_to_blocks[request.request_id][number]
        starts = self._images_in(request, number, end)
        copies = {start: self.copy_of(request.request_id, start) for start in starts}
        self._copies_in.pop(block.block_id, None)
        if copies:
            self._copies_in[block.block_id] = copies
        for feature in request.mm_features:
            start = feature.mm_position.offset
            if start in copies and _end(feature) // self.block_size == number:
                # One that is there already was written earlier, so that it can be copied earlier.
                copies[start].tail = self._cached_tail(copies[start], start) or block

    def _ends_in(self, request: Request, number: int, end: int) -> list[int]:
        """Where a prefix may end in block ``number``, up to ``end``, the last position first.

        Its own end is among them also inside an image, because the blocks behind it follow from it.
        """
        first, last = number * self.block_size, (number + 1) * self.block_size
        ends = range(min(last, end), first, -self._unit)
        return [end for end in ends if end == last or image_around(request, end) is None]

    def withdraw_unwritten(self, request_id: str) -> None:
        """Have nobody find the blocks that this step was to write for a request, and will not."""
        for block in self.req_to_blocks.get(request_id, ()):
            if block.block_id in self._filled_before:
                self._withdraw(block)

    # Holes

    def settle(self, copy: ImageCopy, live: int, start: int, used: int, length: int) -> None:
        """Note what a copy of an image turned out to be.

        Args:
            copy: the copy; it is changed.
            live: live tokens of the image.
            start: its first virtual position.
            used: slots that its tokens fill in this tier.
            length: its positions.

        """
        copy.live, copy.used = live, used
        copy.hole = range(-(-(start + used) // self.block_size), (start + length) // self.block_size)

    def give_back(self, request_id: str, start: int) -> int:
        """Free a request's blocks that lie wholly inside the hole of its image at ``start``.

        Returns:
            How many blocks nobody holds any more; 0 when they were given back before, or never taken.

        """
        hole, table = self.copy_of(request_id, start).hole, self.req_to_blocks[request_id]
        # Nothing in them is ever read again, so they are not worth keeping for later prompts.
        self.block_pool.evict_blocks({table[n].block_id for n in hole if not table[n].is_null})
        free_before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, hole.start, hole.stop)
        return self.block_pool.get_num_free_blocks() - free_before


def _end(feature: MultiModalFeatureSpec) -> int:
    """One past the last position of an image."""
    return feature.mm_position.offset + feature.mm_position.length


def image_around(request: Request, end: int) -> PlaceholderRange | None:
    """Place of the image that a prefix up to ``end`` would cut; None where it cuts none."""
    places = (feature.mm_position for feature in request.mm_features)
    return next((p for p in places if p.offset < end < p.offset + p.length), None)
