"""A scheduler and its block pool without a model, and what must hold of them after every step.

Requests are made by hand and a pretended worker carries the steps out (see ``pretend_worker``). After every
step the blocks that each request holds are compared with what the counts in memory say it needs.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
import vllm.config.model
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY, encoder_budget
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.configurations import PRUNES, configure
from tests.support.pretend_worker import PretendWorker
from tests.support.reference import keep_count
from tests.support.tiny_checkpoints import PATCHES
from vllm_hybrid.engine.scheduler import LIVE_COUNTS
from vllm_hybrid.kv.tiers import SPEC_OF_TIER, Tier, tier_block_sizes
from vllm_hybrid.startup import settings

LAYERS, PLACEHOLDER = 8, 7
# Empty steps that are no waiting for ever: a step under way ends with the next one.
PATIENCE = 4
# The tokens that begin an answer in these prompts.
HEADER = [3, 4]
LIVE = {"blank": 1, "sky": 17, "cat": 90, "street": 311, "crowd": 575, "noise": PATCHES}
init_none_hash(sha256)


@dataclass(frozen=True)
class Prompt:
    """Token ids with images among them."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, str]] = field(default_factory=list)

    def text(self, length: int, first: int = 100) -> Prompt:
        """This prompt and then so many tokens, numbered from ``first`` on."""
        return Prompt([*self.ids, *range(first, first + length)], self.images)

    def header(self) -> Prompt:
        """This prompt and then what begins an answer."""
        return Prompt([*self.ids, *HEADER], self.images)

    def answer(self, length: int) -> Prompt:
        """This prompt and then the answer of so many tokens that the pretended worker gives to it."""
        return Prompt([*self.ids, *range(len(self.ids), len(self.ids) + length)], self.images)

    def image(self, name: str) -> Prompt:
        """This prompt and then one of the images of ``LIVE``, or one at a level, such as ``cat@low``."""
        return Prompt([*self.ids, *[PLACEHOLDER] * PATCHES], [*self.images, (len(self.ids), name)])


class Asked:
    """What is asked for the images of prompts.

    Args:
        hybrid: the checkpoint's section; with an empty one nothing is reduced.

    """

    def __init__(self, hybrid: dict[str, Any]) -> None:
        self.reduces = bool(hybrid)
        self.levels: dict[str, dict[str, Any]] = hybrid.get("levels") or {"default": hybrid}
        self.default = hybrid.get("default_level", "default")

    def level_of(self, image: str) -> str:
        """Name of an image's level."""
        _, at, level = image.partition("@")
        return level if at else self.default

    def ratio_of(self, image: str) -> float:
        """Share of an image's live tokens to drop."""
        return float(self.levels[self.level_of(image)].get("fastv_ratio", 0))

    def live_of(self, image: str) -> int:
        """Live tokens of an image; what only prunes has as few as what merges."""
        reduces = self.reduces and self.levels[self.level_of(image)]
        return LIVE[image.partition("@")[0]] if reduces else PATCHES

    @property
    def prunes(self) -> bool:
        """Whether any level drops tokens."""
        return any(level.get("fastv_ratio", 0) for level in self.levels.values())


def quickly_configured(hybrid: dict[str, Any], **options: Any) -> VllmConfig:
    """The configuration of `vllm serve`, without reading and checking the same checkpoint each time."""
    with (
        mock.patch.object(vllm.config.model, "get_config", _known_config),
        mock.patch.object(settings, "check_files"),
    ):
        return configure(hybrid, **options)


_read_config = vllm.config.model.get_config
_configs: dict[str, Any] = {}


def _known_config(*args: Any, **options: Any) -> Any:
    key = repr((args, sorted(options.items())))
    if key not in _configs:
        _configs[key] = _read_config(*args, **options)
    return copy.deepcopy(_configs[key])


_count_positions = encoder_budget.get_mm_max_toks_per_item


@cache
def _positions() -> dict[str, int]:
    """What vLLM finds by processing a picture."""
    config = configure({})
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    return dict(_count_positions(processor, {"image": 1}, None))


def _positions_of_an_image(*_: Any, **__: Any) -> dict[str, int]:
    return _positions()


class StepUnderWay(NamedTuple):
    """A step that the worker has carried out and the scheduler not yet processed.

    Attributes:
        output: what was scheduled.
        stretches: each request's preemptions so far and the position it will have reached.
        result: what the worker answers.
        written: tier, writing and image of all images that the step wrote.

    """

    output: SchedulerOutput
    stretches: dict[str, tuple[int, int]]
    result: ModelRunnerOutput
    written: list[tuple[int, int, str]]


class Bench:
    """A scheduler, its pretended worker and what is known about every request.

    Args:
        hybrid: the checkpoint's section; with an empty one the scheduler and the tier are vLLM's own.
        ahead: whether the scheduler runs one step ahead of its worker.
        num_blocks: blocks of the pool, the null block among them.
        block_size: tokens per block of the smaller tier, about.
        config: what the scheduler is made from; made of ``hybrid`` and ``options`` if left out.
        options: engine arguments.

    """

    def __init__(
        self,
        hybrid: dict[str, Any] = PRUNES,
        ahead: bool = False,
        num_blocks: int = 2000,
        block_size: int = 16,
        config: VllmConfig | None = None,
        **options: Any,
    ) -> None:
        usual = {"max_num_seqs": 8, "limit_mm_per_prompt": {"image": 3}}
        config = config or quickly_configured(hybrid, **(usual | options))
        config.scheduler_config.async_scheduling = self.ahead = ahead
        config.cache_config.num_gpu_blocks = num_blocks
        self.sizes = block_sizes(hybrid, block_size)
        self.length = config.model_config.max_model_len
        longest = sum(-(-self.length // size) for size in self.sizes.values())
        assert num_blocks > longest, "vLLM starts with no smaller pool"
        config.cache_config.block_size = min(self.sizes.values())
        register_all_kvcache_specs(config)
        kv_config = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec(
                    [f"{tier} layers"],
                    (SPEC_OF_TIER[tier] if hybrid else FullAttentionSpec)(
                        block_size=size, num_kv_heads=1, head_size=8, dtype=torch.float32
                    ),
                )
                for tier, size in self.sizes.items()
            ],
        )
        block_size, self.hash_size = resolve_kv_cache_block_sizes(kv_config, config)
        with mock.patch.object(encoder_budget, "get_mm_max_toks_per_item", _positions_of_an_image):
            self.scheduler: Any = config.scheduler_config.get_scheduler_cls()(
                config, kv_config, StructuredOutputManager(config), block_size, self.hash_size, log_stats=True
            )
        self.managers: list[Any] = list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.asked = Asked(hybrid)
        header = hybrid.get("assistant_header", ()) if hybrid.get("fastv_rank") == "turn_end" else ()
        sizes = list(self.sizes.values())
        self.worker = PretendWorker(
            sizes, num_blocks, PATCHES, self.asked.ratio_of, self.asked.live_of, header
        )
        self.worker.reduces = bool(hybrid)
        self.worker.tells = bool(hybrid)
        self.in_flight: deque[StepUnderWay] = deque()
        self.requests: dict[str, Request] = {}
        self.prompts: dict[str, Prompt] = {}
        # Steps on end that brought nothing, with requests there.
        self.empty_steps = 0
        # What the scheduler knows: images whose counts it was told, writings of images (tier, writing) whose
        # sizes it knows, holes (request, preemptions, image, tier) that have to be free, requests that were
        # counted, and its totals.
        self.told: set[str] = set()
        self.known: set[tuple[int, int]] = set()
        self.holes: set[tuple[str, int, int, int]] = set()
        self.counted: set[str] = set()
        self.totals: Counter[str] = Counter()
        # What vLLM counts of the prefix cache, in tokens.
        self.lookups: Counter[str] = Counter()
        # Why requests ended, as their clients are told.
        self.reasons: dict[str, Any] = {}

    # Requests

    def ask(self, prompt: Prompt, max_tokens: int = 8, priority: int = 0, **more: Any) -> str:
        """Add a request, with more of a request's arguments; returns its name.

        ``extra_args`` are those of its sampling parameters.
        """
        name = f"request-{len(self.requests)}"
        self.prompts[name] = prompt
        features = [
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=image,
                mm_position=PlaceholderRange(offset=start, length=PATCHES),
            )
            for start, image in prompt.images
        ]
        extra = more.pop("extra_args", None)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        params.update_from_generation_config({}, None)
        self.requests[name] = Request(
            request_id=name,
            prompt_token_ids=prompt.ids,
            sampling_params=params,
            pooling_params=None,
            mm_features=features,
            priority=priority,
            arrival_time=float(len(self.requests)),
            block_hasher=get_request_block_hasher(self.hash_size, sha256),
            **more,
        )
        self.scheduler.add_request(self.requests[name])
        return name

    def answered(self, prompt: Prompt, max_tokens: int = 8, **more: Any) -> int:
        """Have a prompt answered by itself; returns how many positions it found in the prefix cache."""
        name = self.ask(prompt, max_tokens, **more)
        self.finish()
        return self.worker.hits[name]

    def abort(self, name: str) -> None:
        """Take a request back."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.audit()

    def preempt_all(self) -> None:
        """Make all running requests start over."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.audit()

    def preemptions(self) -> int:
        """How often a request had to start over."""
        return sum(request.num_preemptions for request in self.requests.values())

    # Steps

    def step(self) -> SchedulerOutput:
        """Schedule a step; process it at once, or the one before it where the scheduler runs ahead.

        The steps under way come to their ends in time, so a scheduler that has requests and schedules
        nothing several times on end waits for ever.
        """
        output = self.scheduler.schedule()
        waits = self.scheduler.has_unfinished_requests() and not output.num_scheduled_tokens
        self.empty_steps = self.empty_steps + 1 if waits else 0
        assert self.empty_steps < PATIENCE, f"{list(self.scheduler.requests)} wait for ever"
        stretches = {
            name: (self.requests[name].num_preemptions, self.requests[name].num_computed_tokens)
            for name in output.num_scheduled_tokens
        }
        result = self.worker.execute(output)
        self.in_flight.append(StepUnderWay(output, stretches, result, self.worker.written))
        self._note_shared_holes(output)
        if len(self.in_flight) > self.ahead:
            self._process(self.in_flight.popleft())
        self.audit()
        return output

    def finish(self, limit: int = 4000) -> None:
        """Step until all requests are answered, and look at the answers and at what is left."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        assert not self.scheduler.has_unfinished_requests(), f"not done after {limit} steps"
        for _ in range(2):
            self.step()
        for request in self.requests.values():
            # The worker answers with the numbers of the positions.
            begin, end = request.num_prompt_tokens, request.num_tokens
            assert list(request.output_token_ids) == list(range(begin, end)), request.request_id
            if request.request_id in self.worker.lost:
                assert request.status is RequestStatus.FINISHED_ERROR
                continue
            assert request.status is RequestStatus.FINISHED_ABORTED or end - begin == request.max_tokens
        self.check_rest()

    def _process(self, step: StepUnderWay) -> None:
        self.told |= set(getattr(step.result, LIVE_COUNTS, {}))
        self.known |= {(tier, writing) for tier, writing, image in step.written if image in self.told}
        holders = self._holders()
        for name, (epoch, end) in step.stretches.items():
            # What an aborted request or one preempted since then computed is gone.
            if name in self.scheduler.requests and self.requests[name].num_preemptions == epoch:
                self._note_holes(name, epoch, end, holders)
        for sent in self.scheduler.update_from_output(step.output, step.result).values():
            self.reasons |= {out.request_id: out.finish_reason for out in sent.outputs if out.finished}
            if sent.scheduler_stats is not None:
                lookups = sent.scheduler_stats.prefix_cache_stats
                self.lookups += Counter(queries=lookups.queries, hits=lookups.hits)
            failed = [out for out in sent.outputs if out.finish_reason is FinishReason.ERROR]
            self.totals["requests_with_foreign_pages"] += len(failed)

    def _note_shared_holes(self, output: SchedulerOutput) -> None:
        """What a request found in memory has no blocks in holes that are known already."""
        for name in [*(new.req_id for new in output.scheduled_new_reqs), *self._resumed(output)]:
            request = self.requests[name]
            for number, feature in enumerate(request.mm_features):
                begin = request.num_computed_tokens - output.num_scheduled_tokens[name]
                if feature.mm_position.offset < begin:
                    for tier in range(len(self.sizes)):
                        writing, _ = self.worker.slots_of(name, tier, number)
                        if (tier, writing) in self.known:
                            self.holes.add((name, request.num_preemptions, number, tier))

    def _resumed(self, output: SchedulerOutput) -> list[str]:
        cached = output.scheduled_cached_reqs
        return [name for name in cached.req_ids if name in cached.resumed_req_ids]

    def _note_holes(self, name: str, epoch: int, end: int, holders: Counter[int]) -> None:
        """A request's positions up to ``end`` are computed: which holes have to be free from now on."""
        images = self.requests[name].mm_features
        for number, feature in enumerate(images):
            if feature.mm_position.offset + PATCHES > end:
                continue
            tiers = range(len(self.sizes))
            if any((tier, self.worker.slots_of(name, tier, number)[0]) not in self.known for tier in tiers):
                continue
            for tier in tiers:
                hole = (name, epoch, number, tier)
                if hole not in self.holes:
                    self.holes.add(hole)
                    table = self.managers[tier].req_to_blocks[name]
                    blocks = [table[n].block_id for n in self._hole(name, number, tier)]
                    holders.subtract(blocks)
                    freed = sum(holders[block] == 0 for block in blocks)
                    self._count(images[number].identifier, {"blocks_given_back": freed})
        if name in self.counted or not images:
            return
        holes = {(name, epoch, i, tier) for i in range(len(images)) for tier in range(len(self.sizes))}
        if holes <= self.holes:
            self.counted.add(name)
            for number, image in enumerate(images):
                live = self.worker.slots_of(name, 0, number)[1]
                counts = {"images": 1, "patches": PATCHES, "live_tokens": live}
                counts["kept_tokens"] = keep_count(live, self.asked.ratio_of(image.identifier))
                self._count(image.identifier, counts)

    def _count(self, image: str, counts: dict[str, int]) -> None:
        """Add to the totals of an image's level."""
        level = self.asked.level_of(image)
        self.totals.update({f"{name}:{level}": count for name, count in counts.items()})

    def _hole(self, name: str, image: int, tier: int) -> set[int]:
        """Numbers of the blocks of a tier that hold unused slots of an image and nothing else."""
        size = list(self.sizes.values())[tier]
        start = self.requests[name].mm_features[image].mm_position.offset
        _, used = self.worker.slots_of(name, tier, image)
        unused = set(range(start + used, start + PATCHES))
        touched = {slot // size for slot in unused}
        return {b for b in touched if unused >= set(range(b * size, b * size + size))}

    # What has to hold after every step

    def held(self, name: str) -> list[set[int]]:
        """Numbers of the blocks of each tier that a request holds."""
        tables = [manager.req_to_blocks.get(name, []) for manager in self.managers]
        return [{i for i, block in enumerate(table) if not block.is_null} for table in tables]

    def needed(self, name: str) -> list[set[int]]:
        """Numbers of the blocks of each tier that a request has to hold."""
        request = self.requests[name]
        blocks = [set(range(-(-request.num_computed_tokens // size))) for size in self.sizes.values()]
        for i in range(len(request.mm_features)):
            for tier, mine in enumerate(blocks):
                if (name, request.num_preemptions, i, tier) in self.holes:
                    mine -= self._hole(name, i, tier)
        return blocks

    def _holders(self) -> Counter[int]:
        """How many requests hold each block."""
        tables = [table for manager in self.managers for table in manager.req_to_blocks.values()]
        return Counter(block.block_id for table in tables for block in table if not block.is_null)

    def audit(self) -> None:
        """Every request holds what it needs, every other block is free, everything is counted once."""
        owners = self._holders()
        tiers = [
            {b.block_id for t in manager.req_to_blocks.values() for b in t if not b.is_null}
            for manager in self.managers
        ]
        assert sum(map(len, tiers)) == len(owners), "two tiers hold one block"
        for name in self.scheduler.requests:
            assert self.held(name) == self.needed(name), name
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == owners[block.block_id]
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(owners)
        # What is 0 may be there or not.
        totals = Counter(getattr(self.scheduler, "totals", self.totals))
        assert +totals == +self.totals, f"{totals} and not {self.totals}"

    def check_rest(self) -> None:
        """Nothing is held for requests that are gone."""
        assert self.all_free()
        for manager in self.managers:
            assert not manager.req_to_blocks and not getattr(manager, "copies", None)
        for names in ("given_back", "counted", "ranked_at"):
            assert not getattr(self.scheduler, names, None), names
        encodings = self.scheduler.encoder_cache_manager
        assert encodings.num_freeable_slots == encodings.cache_size

    def all_free(self) -> bool:
        """Whether every block but the null block is free."""
        return self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1


def block_sizes(hybrid: dict[str, Any], block_size: int) -> dict[Tier, int]:
    """Tokens per block of each tier."""
    layer = hybrid.get("fastv_layer", LAYERS)
    return tier_block_sizes(block_size, layer, LAYERS - layer)
