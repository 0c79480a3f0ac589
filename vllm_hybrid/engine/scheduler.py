"""vLLM's scheduler, taught which blocks of a request are holes.

Requests keep their virtual lengths, so scheduling is vLLM's. Three things are added: an image is never
split over steps, an image that will be pruned is computed in one step with the position that ranks it,
and after the step that filled an image the blocks inside its holes go back to the pool.

No request waits for ever. Encoder-cache entries are held only for images of steps that are under way, so all
of them come free; a running request that finds the cache full is served before those behind it; and the
settings make a step hold at least one image, or one pruned prompt, beside all requests that decode.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_hybrid.engine.cost import KVBytes, cost_of
from vllm_hybrid.frontend.beam_steps import prompt_tokens
from vllm_hybrid.frontend.metrics import of_level
from vllm_hybrid.frontend.picture_levels import level_of
from vllm_hybrid.frontend.request_cost import COST, asks_cost
from vllm_hybrid.kv.prefix_keys import ranked_block_hasher
from vllm_hybrid.kv.shared_prefix import SharedPrefixManager
from vllm_hybrid.kv.tier_manager import ImageCopy, TierManager
from vllm_hybrid.kv.tiers import LowerTierSpec, Tier
from vllm_hybrid.levels import Level
from vllm_hybrid.method.fastv import live_to_kept
from vllm_hybrid.method.ranking import ranking_positions
from vllm_hybrid.startup.settings import hybrid_config

# vLLM shows what its own loggers and those below them say.
logger = init_logger(f"vllm.{__name__}")

# A mixin over whichever scheduler it is combined with; for the type checker it is one of them.
_Scheduler: Any = Scheduler if TYPE_CHECKING else object

# What a worker attaches to a step's output (see :mod:`vllm_hybrid.engine.worker`): live tokens by image,
# and the requests whose pages held another request's data.
LIVE_COUNTS = "hybrid_live_counts"
FOREIGN_PAGES = "hybrid_foreign_pages"
_REMEMBERED_IMAGES = 1 << 20


class Filling(NamedTuple):
    """An image that a step computes.

    Attributes:
        image: its identifier.
        start: its first virtual position in the request.
        length: its positions.
        key: of the block in which it begins; None where the request has no key for that.
        copies: what is filled with it, by tier.

    """

    image: str
    start: int
    length: int
    key: BlockHash | None
    copies: dict[Tier, ImageCopy]


class HoleReclaim(_Scheduler):
    """Mixed into vLLM's schedulers, before them."""

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hf_config = self.vllm_config.model_config.hf_config
        self.hybrid = hybrid_config(hf_config)
        self.tier_managers: dict[Tier, TierManager] = {
            Tier.LOWER if isinstance(manager.kv_cache_spec, LowerTierSpec) else Tier.UPPER: manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, TierManager)
        }
        SharedPrefixManager.take_over(self.kv_cache_manager)
        # Kept longer than the encoder cache keeps features: a cached image is not counted again.
        self.live_counts: OrderedDict[str, int] = OrderedDict()
        # By step under way, the images that it computes.
        self.fillings: dict[int, list[Filling]] = {}
        # Per request the live tokens of each image whose hole went back.
        self.given_back: dict[str, dict[int, int]] = {}
        # Per request with images that are pruned, the position that ranks each.
        self.ranked_at: dict[str, list[int]] = {}
        # Requests whose images are in the totals, also while they wait to be computed again.
        self.counted: set[str] = set()
        # Of the step being scheduled, while it is: whether the encoder cache was too full for a request's
        # next image, the images that it is to encode, and the keys of those that it computes.
        self.is_scheduling = False
        self.begun: set[BlockHash] = set()
        self.encodings_are_short = False
        self.promised: set[str] = set()
        self.kv_bytes = KVBytes.of(self.kv_cache_config, self.vllm_config)
        self.totals: Counter[str] = Counter()
        self.reported: Counter[str] = Counter()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step, without encodings that it promises and then takes back."""
        self.encodings_are_short = False
        self.promised.clear()
        self.begun.clear()
        admissible = self.max_num_active_reqs
        self.is_scheduling = True
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.is_scheduling = False
            self.max_num_active_reqs = admissible
        self._keep_promises(output)
        if filled := self._filled_by(output):
            self.fillings[id(output)] = filled
        return output

    def _filled_by(self, output: SchedulerOutput) -> list[Filling]:
        """The images that a step computes, with the copy that it fills in each tier."""
        filled = []
        for name, number in output.num_scheduled_tokens.items():
            request = self.requests[name]
            end = request.num_computed_tokens
            for feature in _images_beginning(request, end - number, end):
                start, length = feature.mm_position.offset, feature.mm_position.length
                copies = {tier: m.copy_of(name, start) for tier, m in self.tier_managers.items()}
                key = self._image_key(request, start)
                filled.append(Filling(feature.identifier, start, length, key, copies))
        return filled

    def _settle(self, filling: Filling) -> None:
        """Note how many tokens an image has in the copies that a step has filled.

        Also where the request is gone: others may share what it filled. Later steps may encode the picture
        again, or another one that a client gives the same identifier.
        """
        live = self.live_counts.get(filling.image)
        if live is None:
            return
        ratio = level_of(filling.image, self.hybrid.levels).fastv_ratio
        for tier, copy in filling.copies.items():
            used = live_to_kept(live, 0 if tier is Tier.LOWER else ratio)
            self.tier_managers[tier].settle(copy, live, filling.start, used, filling.length)

    def add_request(self, request: Request) -> None:
        """vLLM's, with blocks named by all that pruned images depend on."""
        if self.cache_config.enable_prefix_caching and any(map(self._is_pruned, request.mm_features)):
            request.block_hashes.clear()
            request._block_hasher = self._block_hasher
            request.update_block_hashes()
        super().add_request(request)

    @cached_property
    def _block_hasher(self) -> Callable[[Request], list[BlockHash]]:
        """What names the blocks of requests with images that are pruned."""
        hash_function = get_hash_fn_by_name(self.cache_config.prefix_caching_hash_algo)
        return ranked_block_hasher(self.hash_block_size, hash_function, self._ranking_positions)

    def _level(self, image: MultiModalFeatureSpec) -> Level:
        """The level of an image."""
        return level_of(image.identifier, self.hybrid.levels)

    def _is_pruned(self, image: MultiModalFeatureSpec) -> bool:
        """Whether tokens of an image are ranked and dropped."""
        return self._level(image).prunes

    def _ranking_positions(self, request: Request) -> list[int]:
        """The position that ranks each image of a request; its own last one where nothing is dropped."""
        name = request.request_id
        if name not in self.ranked_at:
            ends = [f.mm_position.offset + f.mm_position.length for f in request.mm_features]
            ranked_at = ranking_positions(
                request.prompt_token_ids or [], ends, self.hybrid.ranking_header, prompt_tokens(request)
            )
            self.ranked_at[name] = [
                position if self._is_pruned(image) else end - 1
                for image, position, end in zip(request.mm_features, ranked_at, ends, strict=True)
            ]
        return self.ranked_at[name]

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """vLLM's; what a step was to write and now will not is found by nobody."""
        if self.is_scheduling:
            for manager in self.tier_managers.values():
                manager.withdraw_unwritten(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """vLLM's choice of images to encode, on a stretch of the prompt that may be computed at once.

        vLLM pins the cached images of a stretch for the request. Whatever lies behind the stretch that is
        granted is let go again: a request that computes nothing would keep others from the cache.
        """
        held = set(self.encoder_cache_manager.get_cached_input_ids(request))
        wanted = self._whole(request, num_computed_tokens, num_new_tokens)
        if self._will_find_image(request, num_computed_tokens):
            wanted = 0
        while True:
            result = super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, wanted, encoder_compute_budget, shift_computed_tokens
            )
            granted = self._whole(request, num_computed_tokens, result[1])
            self._note_shortage(request, num_computed_tokens + result[1], wanted - result[1], result[2])
            if granted == result[1]:
                self.begun |= self._image_keys(request, num_computed_tokens, num_computed_tokens + granted)
                if granted == 0 and request.status != RequestStatus.RUNNING:
                    self._admit_no_more()
                return result
            self._let_go(request, held)
            wanted = granted

    def _will_find_image(self, request: Request, computed: int) -> bool:
        """Whether a waiting request's next image is being computed for another one, and then shared.

        Of an image that is still being written, or of which nobody told yet how many tokens it has, not all
        may be taken, and the request would compute it once more. It waits for a step, or for two where the
        scheduler runs ahead.
        """
        if request.status == RequestStatus.RUNNING:
            return False
        if not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return False
        ahead = _images_beginning(request, computed, request.num_tokens)
        if not ahead:
            return False
        first = ahead[0].mm_position.offset
        keys = self._image_keys(request, first, first + 1)
        under_way = (filling.key for filled in self.fillings.values() for filling in filled)
        return not keys.isdisjoint(self.begun) or not keys.isdisjoint(under_way)

    def _image_keys(self, request: Request, begin: int, end: int) -> set[BlockHash]:
        """Keys of the blocks in which the images of a stretch of a request begin."""
        keys = {
            self._image_key(request, f.mm_position.offset) for f in _images_beginning(request, begin, end)
        }
        return {key for key in keys if key is not None}

    def _image_key(self, request: Request, start: int) -> BlockHash | None:
        """Key of the block in which a request's image begins; None where the request ends in that block."""
        number = start // self.hash_block_size
        return request.block_hashes[number] if number < len(request.block_hashes) else None

    def _admit_no_more(self) -> None:
        """Let no waiting request into this step any more, because one got nothing of it.

        From vLLM 0.33 on those behind it come next, and would take the room that it waits for, step after
        step. :meth:`schedule` restores the limit.
        """
        self.max_num_active_reqs = 0

    def _whole(self, request: Request, computed: int, new: int) -> int:
        """Shorten a stretch of a request so that it may be computed in one step.

        Args:
            request: the request.
            computed: virtual positions already computed.
            new: virtual positions on offer.

        Returns:
            Positions to compute: no image is cut, and while the encoder cache is short none is begun. An
            image that is pruned comes with the position that ranks it, and a step that holds one ranked by
            the prompt's last position ends there.

        """
        end = computed + new
        places = enumerate(feature.mm_position for feature in request.mm_features)
        ahead = [(number, place) for number, place in places if place.offset >= computed]
        if not ahead or new == 0:
            return new
        prompt_end = prompt_tokens(request)
        ranked_at = self._ranking_positions(request)
        begun = [(number, p) for number, p in ahead if p.offset < end]
        cut = [p.offset for number, p in begun if self.encodings_are_short or ranked_at[number] >= end]
        end = min([end, *cut])
        begun = [(number, p) for number, p in begun if p.offset < end]
        if not begun and self._is_pruned(request.mm_features[ahead[0][0]]):
            # Nothing is gained by a first piece of text: the image behind it needs a step with room anyway.
            return 0
        ends_there = any(ranked_at[number] == prompt_end - 1 for number, _ in begun)
        return (min(end, prompt_end) if ends_there else end) - computed

    def _note_shortage(self, request: Request, end: int, refused: int, budget: int) -> None:
        """Remember for the rest of the step that a request found no room in the encoder cache.

        Those behind it would otherwise pin what it waits for, step after step. The compute budget needs no
        such care: it is fresh in each step, and given out in the order of the requests.

        Args:
            request: the request.
            end: where the stretch ends that vLLM grants.
            refused: positions it did not grant.
            budget: what is left of the compute budget, in embeddings.

        """
        if refused == 0:
            return
        first = next((f.mm_position for f in request.mm_features if f.mm_position.offset >= end), None)
        if first is not None and first.get_num_embeds() <= budget:
            self.encodings_are_short = True

    def _let_go(self, request: Request, held: set[int]) -> None:
        """Give up a request's images in the encoder cache, but for those of steps under way."""
        for number in self.encoder_cache_manager.get_cached_input_ids(request) - held:
            self.encoder_cache_manager.free_encoder_input(request, number)

    def _allocate_encoder_inputs(
        self, request: Request, input_ids: list[int], duplicate_input_ids: list[int]
    ) -> None:
        """vLLM's, remembering the images that this step is to encode."""
        super()._allocate_encoder_inputs(request, input_ids, duplicate_input_ids)
        self.promised |= {request.mm_features[number].identifier for number in input_ids}

    def _keep_promises(self, output: SchedulerOutput) -> None:
        """See to images whose request was preempted later in the step that was to encode them.

        vLLM takes the request out of the step, but leaves its images in the cache's books. Another request
        of the step that counts on such an image encodes it; an image that nobody needs leaves the books.
        """
        encoded = {
            self.requests[name].mm_features[number].identifier
            for name, numbers in output.scheduled_encoder_inputs.items()
            for number in numbers
        }
        cache = self.encoder_cache_manager
        for image in sorted(self.promised - encoded):
            heirs = [name for name in output.num_scheduled_tokens if name in cache.cached.get(image, ())]
            if heirs:
                heir = self.requests[heirs[0]]
                held = sorted(cache.get_cached_input_ids(heir))
                number = next(n for n in held if heir.mm_features[n].identifier == image)
                output.scheduled_encoder_inputs.setdefault(heir.request_id, []).append(number)
            elif image in cache.freeable:
                cache.num_free_slots += cache.freeable.pop(image)
                del cache.cached[image]
                del cache.num_embeds_by_hash[image]
                # A tensor of before this step, if there is one, goes with the next.
                cache.freed.append(image)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, then the holes of the images this step filled."""
        for image, count in getattr(model_runner_output, LIVE_COUNTS, {}).items():
            self.live_counts[image] = count
            self.live_counts.move_to_end(image)
        while len(self.live_counts) > _REMEMBERED_IMAGES:
            self.live_counts.popitem(last=False)
        for filling in self.fillings.pop(id(scheduler_output), ()):
            self._settle(filling)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None and len(self.given_back.get(request_id, ())) < len(request.mm_features):
                self._give_back_holes(request, scheduler_output.num_scheduled_tokens[request_id])
        failed = self._fail(getattr(model_runner_output, FOREIGN_PAGES, ()))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._tell_costs(outputs)
        for request in failed:
            ended = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(ended)
        return outputs

    def _connector_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """What vLLM's response says of a request that ends and still holds its blocks: its cost, if asked."""
        delay, told = super()._connector_finished(request)
        return delay, self._cost(request) if asks_cost(request.sampling_params) else told

    def _tell_costs(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Add its cost to each output of a request that asks for it: the API server may end it by itself."""
        for sent in outputs.values():
            for output in sent.outputs:
                request = self.requests.get(output.request_id)
                if request is not None and asks_cost(request.sampling_params):
                    output.kv_transfer_params = self._cost(request)

    def _cost(self, request: Request) -> dict[str, Any]:
        known = self.given_back.get(request.request_id, {})
        # A request that ends while it is preempted has given everything back.
        live = {
            number: known.get(number, self.live_counts.get(feature.identifier))
            for number, feature in enumerate(request.mm_features)
        }
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return {COST: cost_of(request, live, self.hybrid.levels, managers, self.kv_bytes)}

    def _fail(self, request_ids: Sequence[str]) -> list[Request]:
        """End requests whose pages held another's data, before this step's tokens count as answers.

        Their memory is wrong, so no token of theirs is right, and no later prompt may find their blocks in
        the prefix cache. The other requests of the step are untouched.
        """
        if not request_ids:
            return []
        for name in filter(self.requests.__contains__, request_ids):
            blocks = self.kv_cache_manager.get_block_ids(name)
            self.kv_cache_manager.evict_blocks({block for tier in blocks for block in tier})
        failed = self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR)
        self.totals["requests_with_foreign_pages"] += len(failed)
        for request in failed:
            logger.error(
                "vllm-hybrid: request %s ends with an error, because one of its KV pages holds another "
                "request's data; this is a fault of vllm-hybrid, please report it.",
                request.request_id,
            )
        return failed

    def _give_back_holes(self, request: Request, in_this_step: int) -> None:
        """Free the blocks inside the holes of all images that steps up to this one have filled.

        Called before vLLM counts this step as processed, so that a request that stops with this very
        step is counted too.
        """
        if request.is_finished() or request.num_stale_output_tokens > 0:
            return
        processed = request.num_computed_tokens - request.num_in_flight_tokens + in_this_step
        filled = self.given_back.setdefault(request.request_id, {})
        for number, feature in enumerate(request.mm_features):
            start, length = feature.mm_position.offset, feature.mm_position.length
            if number in filled or start + length > processed:
                continue
            managers = self.tier_managers.values()
            copies = [manager.copy_of(request.request_id, start) for manager in managers]
            live = copies[0].live
            if live is None or any(copy.live is None for copy in copies):
                continue
            filled[number] = live
            for manager in managers:
                freed = manager.give_back(request.request_id, start)
                self.totals[of_level("blocks_given_back", self._level(feature).name)] += freed
        if len(filled) == len(request.mm_features) and request.request_id not in self.counted:
            self.counted.add(request.request_id)
            for number, live in filled.items():
                self._count(request.mm_features[number], live)

    def _count(self, image: MultiModalFeatureSpec, live: int) -> None:
        """Add an image, by its live tokens, to the totals of its level."""
        level = self._level(image)
        counts = {
            "images": 1,
            "patches": image.mm_position.length,
            "live_tokens": live,
            "kept_tokens": live_to_kept(live, level.fastv_ratio),
        }
        self.totals.update({of_level(name, level.name): count for name, count in counts.items()})

    def _free_request_blocks(self, request: Request) -> None:
        """Forget a finished or preempted request's holes with its blocks."""
        self.given_back.pop(request.request_id, None)
        if request.is_finished():
            self.counted.discard(request.request_id)
            self.ranked_at.pop(request.request_id, None)
        super()._free_request_blocks(request)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with what this scheduler counted since the last ones.

        Any of several API servers may get them, so each count is sent once. They travel in the LoRA map,
        the one open mapping of the message that nobody reads here: LoRA is refused.
        ``vllm_hybrid.frontend.metrics`` takes them out again.
        """
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            news = self.totals - self.reported
            self.reported = self.totals.copy()
            stats.running_lora_adapters = {f"vllm_hybrid:{name}": n for name, n in news.items()}
        return stats


def _images_beginning(request: Request, begin: int, end: int) -> list[MultiModalFeatureSpec]:
    """A request's images whose first position lies in a stretch."""
    features = request.mm_features
    # Most steps are decodes, behind all images.
    if not features or features[-1].mm_position.offset < begin:
        return []
    return [feature for feature in features if begin <= feature.mm_position.offset < end]


class HybridScheduler(HoleReclaim, Scheduler):
    """The scheduler that waits for each step."""


class HybridAsyncScheduler(HoleReclaim, AsyncScheduler):
    """The scheduler that runs one step ahead."""


def make_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler for a configuration; whether it is asynchronous is decided after the class is named."""
    chosen = HybridAsyncScheduler if vllm_config.scheduler_config.async_scheduling else HybridScheduler
    return chosen(vllm_config, *args, **kwargs)
