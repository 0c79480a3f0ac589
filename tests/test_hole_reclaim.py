"""The scheduler and its block pool without a model: whole images, exact holes, nothing lost, nothing leaked.

Requests are made by hand and a pretended worker carries the steps out (see ``pretend_worker``). After every
step the blocks that each request holds are compared with what the counts say it needs.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.pretend_worker import PretendWorker
from tests.reference import keep_count
from tests.test_settings import MERGES, PRUNES, configure
from tests.tiny_checkpoints import PATCHES
from vllm_hybrid.scheduler import LIVE_COUNTS
from vllm_hybrid.tiers import SPEC_OF_TIER, Tier, tier_block_sizes

LAYERS, PLACEHOLDER = 8, 7
LIVE = {"blank": 1, "sky": 17, "cat": 90, "street": 311, "crowd": 575, "noise": PATCHES}
init_none_hash(sha256)

both_schedulers = pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one step ahead"])
both_methods = pytest.mark.parametrize("hybrid", [PRUNES, MERGES], ids=["pruning", "merging"])


@pytest.fixture
def seed() -> int:
    """A fresh seed each run, shown by pytest when a test fails."""
    return random.randrange(1 << 32)


@dataclass(frozen=True)
class Prompt:
    """Token ids with images among them."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, str]] = field(default_factory=list)

    def text(self, length: int, first: int = 100) -> Prompt:
        """This prompt and then so many tokens, numbered from ``first`` on."""
        return Prompt([*self.ids, *range(first, first + length)], self.images)

    def image(self, name: str) -> Prompt:
        """This prompt and then one of the images of ``LIVE``."""
        return Prompt([*self.ids, *[PLACEHOLDER] * PATCHES], [*self.images, (len(self.ids), name)])


class Bench:
    """A scheduler, its pretended worker and what is known about every request.

    Args:
        hybrid: the checkpoint's section; with an empty one the scheduler and the tier are vLLM's own.
        ahead: whether the scheduler runs one step ahead of its worker.
        num_blocks: blocks of the pool, the null block among them.
        block_size: tokens per block of the smaller tier, about.
        options: engine arguments.

    """

    def __init__(
        self,
        hybrid: dict[str, Any] = PRUNES,
        ahead: bool = False,
        num_blocks: int = 2000,
        block_size: int = 16,
        **options: Any,
    ) -> None:
        usual = {"max_num_seqs": 8, "limit_mm_per_prompt": {"image": 3}}
        config = configure(hybrid, **(usual | options))
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
        self.scheduler: Any = config.scheduler_config.get_scheduler_cls()(
            config, kv_config, StructuredOutputManager(config), block_size, self.hash_size, log_stats=True
        )
        self.managers: list[Any] = list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        live = LIVE if hybrid else dict.fromkeys(LIVE, PATCHES)
        ratio = hybrid.get("fastv_ratio", 0)
        self.worker = PretendWorker(list(self.sizes.values()), num_blocks, PATCHES, ratio, live)
        self.worker.silent = set() if hybrid else set(LIVE)
        # Steps under way: each request's preemptions so far and the position it will have reached.
        self.in_flight: deque[tuple[SchedulerOutput, dict[str, tuple[int, int]], ModelRunnerOutput]] = deque()
        self.requests: dict[str, Request] = {}
        # What the scheduler knows: images whose counts it was told, holes (request, preemptions, image) that
        # have to be free, requests that were counted, and its totals.
        self.told: set[str] = set()
        self.holes: set[tuple[str, int, int]] = set()
        self.counted: set[str] = set()
        self.totals: Counter[str] = Counter()
        # Why requests ended, as their clients are told.
        self.reasons: dict[str, Any] = {}

    # Requests

    def ask(self, prompt: Prompt, max_tokens: int = 8, priority: int = 0) -> str:
        """Add a request; returns its name."""
        name = f"request-{len(self.requests)}"
        features = [
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=image,
                mm_position=PlaceholderRange(offset=start, length=PATCHES),
            )
            for start, image in prompt.images
        ]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
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
        )
        self.scheduler.add_request(self.requests[name])
        return name

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
        """Schedule a step; process it at once, or the one before it where the scheduler runs ahead."""
        output = self.scheduler.schedule()
        stretches = {
            name: (self.requests[name].num_preemptions, self.requests[name].num_computed_tokens)
            for name in output.num_scheduled_tokens
        }
        self.in_flight.append((output, stretches, self.worker.execute(output)))
        if len(self.in_flight) > self.ahead:
            self._process(*self.in_flight.popleft())
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

    def _process(
        self, output: SchedulerOutput, stretches: dict[str, tuple[int, int]], result: ModelRunnerOutput
    ) -> None:
        self.told |= set(getattr(result, LIVE_COUNTS, {}))
        for name, (epoch, end) in stretches.items():
            # What an aborted request or one preempted since then computed is gone.
            if name in self.scheduler.requests and self.requests[name].num_preemptions == epoch:
                self._note_holes(name, epoch, end)
        for sent in self.scheduler.update_from_output(output, result).values():
            self.reasons |= {out.request_id: out.finish_reason for out in sent.outputs if out.finished}
            failed = [out for out in sent.outputs if out.finish_reason is FinishReason.ERROR]
            self.totals["requests_with_foreign_pages"] += len(failed)

    def _note_holes(self, name: str, epoch: int, end: int) -> None:
        """A request's positions up to ``end`` are computed: which holes have to be free from now on."""
        images = self.requests[name].mm_features
        for i, feature in enumerate(images):
            hole = (name, epoch, i)
            if hole in self.holes or feature.mm_position.offset + PATCHES > end:
                continue
            if feature.identifier in self.told:
                self.holes.add(hole)
                self.totals["blocks_given_back"] += sum(map(len, self._hole(feature)))
        if name in self.counted or not images:
            return
        if all((name, epoch, i) in self.holes for i in range(len(images))):
            self.counted.add(name)
            live = [self.worker.live[feature.identifier] for feature in images]
            self.totals += Counter(
                images=len(live),
                patches=len(live) * PATCHES,
                live_tokens=sum(live),
                kept_tokens=sum(keep_count(n, self.worker.ratio) for n in live),
            )

    def _hole(self, feature: MultiModalFeatureSpec) -> list[set[int]]:
        """Numbers of the blocks of each tier that hold unused slots of an image and nothing else."""
        start = feature.mm_position.offset
        blocks = []
        for size, used in zip(self.sizes.values(), self.worker.slots(feature.identifier), strict=True):
            unused = set(range(start + used, start + PATCHES))
            touched = {slot // size for slot in unused}
            blocks.append({b for b in touched if unused >= set(range(b * size, b * size + size))})
        return blocks

    # What has to hold after every step

    def held(self, name: str) -> list[set[int]]:
        """Numbers of the blocks of each tier that a request holds."""
        tables = [manager.req_to_blocks.get(name, []) for manager in self.managers]
        return [{i for i, block in enumerate(table) if not block.is_null} for table in tables]

    def needed(self, name: str) -> list[set[int]]:
        """Numbers of the blocks of each tier that a request has to hold."""
        request = self.requests[name]
        blocks = [set(range(-(-request.num_computed_tokens // size))) for size in self.sizes.values()]
        for i, feature in enumerate(request.mm_features):
            if (name, request.num_preemptions, i) in self.holes:
                blocks = [mine - hole for mine, hole in zip(blocks, self._hole(feature), strict=True)]
        return blocks

    def audit(self) -> None:
        """Every request holds what it needs, every other block is free, everything is counted once."""
        owners: Counter[int] = Counter()
        for tier, manager in enumerate(self.managers):
            own = Counter(b.block_id for t in manager.req_to_blocks.values() for b in t if not b.is_null)
            assert not owners.keys() & own.keys(), f"tier {tier} holds blocks of another"
            owners += own
        for name in self.scheduler.requests:
            assert self.held(name) == self.needed(name), name
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == owners[block.block_id]
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(owners)
        assert getattr(self.scheduler, "totals", self.totals) == self.totals

    def check_rest(self) -> None:
        """Nothing is held for requests that are gone."""
        assert self.all_free()
        assert not any(manager.req_to_blocks for manager in self.managers)
        for names in ("given_back", "counted"):
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


# With 48 and 16 tokens per block in the two tiers: the 311 live tokens end at 316, the 156 kept ones at 161
# and the hole at 581, which leaves 5 and 25 whole blocks inside it.
QUESTION = Prompt().text(5).image("street").text(20)
WHOLE = [set(range(13)), set(range(38))]
LEFT = [{*range(7), 12}, {*range(11), 36, 37}]
FREED = 30
TWO_IMAGES = Prompt().text(100).image("cat").text(100).image("street").text(5)


@both_schedulers
def test_holes_go_back_when_the_step_that_filled_them_has_been_processed(ahead: bool) -> None:
    bench = Bench(ahead=ahead)
    name = bench.ask(QUESTION)
    bench.step()
    if ahead:
        assert bench.held(name) == WHOLE
        bench.step()
    assert bench.held(name) == LEFT
    assert bench.scheduler.totals["blocks_given_back"] == FREED
    bench.finish()


@pytest.mark.parametrize(
    ("before", "image", "first", "end"),
    [
        # A hole from slot 16 to 591, from 15 to 590, and from 17 to 592.
        (15, "blank", 1, 36),
        (14, "blank", 1, 36),
        (16, "blank", 2, 37),
        # From 90 to 576, with the next text in a block of its own.
        (0, "cat", 6, 36),
        # One slot, and none.
        (0, "crowd", 0, 0),
        (0, "noise", 0, 0),
    ],
)
@pytest.mark.parametrize("after", [0, 10])
def test_only_blocks_wholly_inside_a_hole_go_back(
    before: int, image: str, first: int, end: int, after: int
) -> None:
    bench = Bench(MERGES)
    prompt = Prompt().text(before).image(image).text(after)
    name = bench.ask(prompt)
    bench.step()
    everything = set(range(-(-len(prompt.ids) // 16)))
    assert bench.held(name) == [everything - set(range(first, end))]
    bench.finish()


def test_an_unknown_count_gives_nothing_back() -> None:
    bench = Bench()
    bench.worker.silent = {"street"}
    first = bench.ask(QUESTION)
    bench.step()
    assert bench.held(first) == WHOLE
    # Another request brings the count: the image is encoded once more.
    bench.scheduler.reset_encoder_cache()
    bench.worker.silent.clear()
    second = bench.ask(QUESTION)
    bench.step()
    assert bench.held(first) == bench.held(second) == LEFT
    bench.finish()


def test_freed_blocks_serve_another_request_while_their_owner_decodes() -> None:
    """A pool that holds one whole prompt beside what is left of another."""
    bench = Bench(num_blocks=1 + sum(map(len, WHOLE)) + sum(map(len, LEFT)), max_model_len=640)
    first, second = bench.ask(QUESTION), bench.ask(QUESTION)
    ids = [set(itertools.chain(*bench.step().scheduled_new_reqs[0].block_ids)) for _ in range(2)]
    assert [request.request_id for request in bench.scheduler.running] == [first, second]
    assert len(ids[0] & ids[1]) == FREED
    assert bench.pool.get_num_free_blocks() == FREED
    bench.finish()
    assert bench.preemptions() == 0


@both_schedulers
def test_a_preempted_request_starts_over(ahead: bool) -> None:
    bench = Bench(ahead=ahead)
    name = bench.ask(QUESTION)
    for _ in range(5):
        bench.step()
    bench.preempt_all()
    assert bench.all_free()
    # Up to the prompt's end, although the answer has begun, and then what was known of the answer.
    assert bench.step().num_scheduled_tokens == {name: len(QUESTION.ids)}
    assert bench.step().num_scheduled_tokens == {name: 5 - ahead}
    assert bench.held(name) == LEFT
    bench.finish()
    assert bench.scheduler.totals["images"] == 1
    assert bench.scheduler.totals["blocks_given_back"] == 2 * FREED


@both_schedulers
def test_images_of_a_request_preempted_between_them_are_counted(ahead: bool) -> None:
    bench = Bench(MERGES, ahead, max_num_batched_tokens=800)
    bench.ask(TWO_IMAGES)
    bench.step()
    bench.preempt_all()
    bench.finish()
    assert bench.scheduler.totals["images"] == 2


@both_schedulers
@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_request_that_lost_a_page_ends_with_an_error_and_alone(ahead: bool, after: int) -> None:
    """Also when the very step that found it would have been its last."""
    bench = Bench(PRUNES, ahead)
    lost, other, text = bench.ask(QUESTION), bench.ask(TWO_IMAGES), bench.ask(Prompt().text(30))
    # Another API server's, which nobody else tells anything.
    bench.requests[lost].client_index = 1
    for _ in range(after):
        bench.step()
    bench.worker.lost = {lost}
    answered = len(bench.requests[lost].output_token_ids)
    bench.finish()
    assert bench.reasons[lost] is FinishReason.ERROR
    assert len(bench.requests[lost].output_token_ids) <= answered + ahead
    assert bench.reasons[other] is bench.reasons[text] is FinishReason.LENGTH


@both_schedulers
def test_no_prompt_finds_a_lost_request_s_pages_in_the_prefix_cache(ahead: bool) -> None:
    bench = Bench(PRUNES, ahead)
    prompt = Prompt().text(700)
    lost, twin = bench.ask(prompt), bench.ask(Prompt().text(650, first=5000))
    for _ in range(3):
        bench.step()
    bench.worker.lost = {lost}
    while lost not in bench.reasons:
        bench.step()
    again, shared = bench.ask(prompt), bench.ask(Prompt().text(650, first=5000))
    found = {new.req_id: new.num_computed_tokens for new in bench.step().scheduled_new_reqs}
    assert found[again] == 0 < found[shared]
    bench.finish()
    assert bench.reasons[again] is bench.reasons[twin] is bench.reasons[shared] is FinishReason.LENGTH


def test_a_known_count_frees_nothing_that_a_step_under_way_fills() -> None:
    """Both counts are known, but only the step with the first image has been processed."""
    # One image fits in a step, both in the encoder's cache.
    bench = Bench(MERGES, ahead=True, max_num_batched_tokens=1200, enable_prefix_caching=False)
    bench.ask(TWO_IMAGES)
    bench.finish()
    name = bench.ask(TWO_IMAGES)
    for _ in range(2):
        bench.step()
    # Holes from 190 to 676 and, later, from 1087 to 1352.
    assert bench.held(name) == [set(range(85)) - set(range(12, 42))]
    bench.step()
    assert bench.held(name) == [set(range(85)) - set(range(12, 42)) - set(range(68, 84))]
    bench.finish()


@both_methods
@both_schedulers
def test_a_small_pool_loses_nothing(hybrid: dict[str, Any], ahead: bool) -> None:
    """The prompts fit, their answers do not."""
    bench = Bench(hybrid, ahead, num_blocks=87 if hybrid is PRUNES else 65, max_model_len=1024)
    for _ in range(4):
        bench.ask(QUESTION, max_tokens=400)
    bench.finish()
    assert bench.preemptions() > 0
    assert bench.scheduler.totals["images"] == 4


@both_schedulers
@pytest.mark.parametrize("steps", range(6))
def test_an_aborted_request_returns_everything(steps: int, ahead: bool) -> None:
    """Waiting, between its images, with a step under way, decoding."""
    bench = Bench(MERGES, ahead, max_num_batched_tokens=800)
    name = bench.ask(TWO_IMAGES, max_tokens=20)
    for _ in range(steps):
        bench.step()
    bench.abort(name)
    assert bench.all_free()
    bench.finish()


def test_an_image_that_does_not_fit_waits() -> None:
    """Of 800 positions in a step the second image gets a step of its own."""
    bench = Bench(MERGES, max_num_batched_tokens=800)
    name = bench.ask(TWO_IMAGES)
    assert [bench.step().num_scheduled_tokens[name] for _ in range(3)] == [776, 581, 1]
    bench.finish()


def test_a_pruned_prompt_waits_for_room_for_all_its_images() -> None:
    bench = Bench()
    bench.scheduler.max_num_encoder_input_tokens = 2 * PATCHES
    first, second = bench.ask(Prompt().image("crowd").text(20)), bench.ask(TWO_IMAGES)
    assert bench.step().num_scheduled_tokens == {first: 596}
    assert bench.step().num_scheduled_tokens == {first: 1, second: len(TWO_IMAGES.ids)}
    bench.finish()


@both_methods
@pytest.mark.parametrize("gone", [False, True], ids=["running", "gone"])
@pytest.mark.parametrize(
    "prompt",
    [
        Prompt().text(100).image("cat").text(20),
        Prompt().text(100).image("cat").text(20, first=500),
        Prompt().text(100).image("sky").text(20),
        Prompt().text(300),
    ],
    ids=["the same prompt", "another question", "another image", "no image"],
)
def test_only_blocks_before_the_first_image_are_shared(
    hybrid: dict[str, Any], gone: bool, prompt: Prompt
) -> None:
    bench = Bench(hybrid)
    bench.ask(Prompt().text(100).image("cat").text(20))
    owned = bench.step().scheduled_new_reqs[0].block_ids
    if gone:
        bench.finish()
    bench.ask(prompt)
    new = bench.step().scheduled_new_reqs[0]
    assert new.num_computed_tokens == 96
    common = set()
    for size, old, fresh in zip(bench.sizes.values(), owned, new.block_ids, strict=True):
        assert old[: 96 // size] == fresh[: 96 // size]
        common |= set(fresh[: 96 // size])
    assert {b.block_id for b in bench.pool.blocks[1:] if b.ref_cnt > 1} == (set() if gone else common)
    bench.finish()


@both_methods
def test_running_ahead_changes_no_result(hybrid: dict[str, Any]) -> None:
    totals = []
    for ahead in (False, True):
        bench = Bench(hybrid, ahead)
        for number, image in enumerate(LIVE):
            bench.ask(Prompt().text(number).image(image).text(10 * number), max_tokens=3 + number)
            bench.step()
        bench.finish()
        totals.append(bench.scheduler.totals)
    assert totals[0] == totals[1]
    assert totals[0]["live_tokens"] == sum(LIVE.values())


@both_schedulers
def test_nothing_switched_on_is_vllms_own_scheduler(ahead: bool) -> None:
    """Ours decides the same where no token is merged and no image would be cut."""
    stock, ours = Bench({}, ahead), Bench(MERGES, ahead)
    assert type(stock.scheduler) is (AsyncScheduler if ahead else Scheduler)
    assert isinstance(ours.scheduler, type(stock.scheduler))
    for prompt in [Prompt().text(300), Prompt().text(5).image("noise").text(9), Prompt().text(70)]:
        stock.ask(prompt)
        ours.ask(prompt)
        assert stock.step().num_scheduled_tokens == ours.step().num_scheduled_tokens
    while stock.scheduler.has_unfinished_requests():
        assert stock.step().num_scheduled_tokens == ours.step().num_scheduled_tokens
    for bench in (stock, ours):
        bench.finish()


def random_prompt(rng: random.Random, longest: int) -> Prompt:
    """Up to three images with texts around them, of which some begin like others."""
    prompt = Prompt().text(rng.choice([0, 5, 5, 96, 200]))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        prompt = prompt.image(rng.choice(list(LIVE))).text(rng.choice([0, 1, 3, 60]), rng.randrange(9))
    return prompt if 1 < len(prompt.ids) <= longest else random_prompt(rng, longest)


def random_bench(rng: random.Random, prunes: bool, ahead: bool) -> Bench:
    """Blocks of any size in a pool that holds one or two of the longest requests."""
    length = rng.choice([1000, 2048])
    options: dict[str, Any] = {"max_num_seqs": rng.choice([2, 4, 8]), "max_model_len": length}
    hybrid: dict[str, Any] = MERGES
    if prunes:
        hybrid = {"fastv_layer": rng.choice([1, 2, 3, 5, 7]), "fastv_ratio": rng.choice([0.25, 0.5, 0.9])}
    else:
        options["max_num_batched_tokens"] = rng.choice([600, 800, 1500])
    block_size = rng.choice([4, 8, 16, 32])
    tokens = length * rng.choice([1, 1.2, 2])
    bench = Bench(
        hybrid,
        ahead,
        num_blocks=sum(int(tokens / size) + 2 for size in block_sizes(hybrid, block_size).values()),
        block_size=block_size,
        scheduling_policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.7,
        **options,
    )
    bench.worker.silent = {name for name in LIVE if rng.random() < 0.05}
    return bench


@both_schedulers
@pytest.mark.parametrize("prunes", [True, False], ids=["pruning", "merging"])
@pytest.mark.parametrize("run", range(30))
def test_random_traffic(prunes: bool, ahead: bool, run: int, seed: int) -> None:
    rng = random.Random(seed)
    bench = random_bench(rng, prunes, ahead)
    answer = rng.choice([5, 50, 200])
    while len(bench.requests) < 12:
        if rng.random() < 0.3:
            prompt = random_prompt(rng, bench.length - answer)
            bench.ask(prompt, max_tokens=rng.randint(1, answer), priority=rng.randrange(3))
        if rng.random() < 0.03 and bench.scheduler.requests:
            bench.abort(rng.choice(list(bench.scheduler.requests)))
        if rng.random() < 0.02:
            bench.preempt_all()
        bench.step()
    bench.finish()
