"""What prompts share behind an image: as much as stock vLLM's do, holes left out, no two copies mixed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import get_group_id

from tests.support.configurations import MERGES, PRUNES
from tests.support.scheduler_bench import HEADER, LIVE, Bench, Prompt, block_sizes
from tests.support.tiny_checkpoints import PATCHES
from vllm_hybrid.frontend.beam_steps import PROMPT_TOKENS

PROMPT_END = PRUNES | {"fastv_rank": "prompt_end"}
TURN_END = PRUNES | {"fastv_rank": "turn_end", "assistant_header": HEADER}
METHODS = {"merging": MERGES, "ranked by the prompt": PROMPT_END, "ranked by the turn": TURN_END}

both_schedulers = pytest.mark.parametrize("ahead", [False, True], ids=["in step", "one step ahead"])
all_methods = pytest.mark.parametrize("hybrid", METHODS.values(), ids=METHODS)
sharing_methods = pytest.mark.parametrize("hybrid", [MERGES, TURN_END], ids=["merging", "ranked by the turn"])

# The tokens of an answer are the numbers of their positions, so a first turn of 670 positions has 670 to 699.
SYSTEM = Prompt().text(40)
FIRST = SYSTEM.image("street").text(52).header()
SECOND = FIRST.answer(30).text(20, first=900).header()
OTHER_QUESTION = SYSTEM.image("street").text(52, first=700).header()


def whole_units(positions: int) -> int:
    """Positions up to the last end at which prompts are compared."""
    return positions // 16 * 16


def with_whole_images(prompt: Prompt, found: int) -> int:
    """What is shared where stock shares ``found`` positions: of an image all, or nothing."""
    while True:
        cut = [start for start, _ in prompt.images if start < found < start + PATCHES]
        if not cut:
            return found
        end = cut[0] + PATCHES
        if found == whole_units(end) and len(prompt.ids) > end:
            return end
        found = cut[0]


@both_schedulers
@sharing_methods
def test_the_next_turn_finds_the_turn_before(hybrid: dict[str, Any], ahead: bool) -> None:
    bench = Bench(hybrid, ahead)
    assert bench.answered(FIRST, 30) == 0
    # The last token of an answer is nobody's key yet.
    assert bench.answered(SECOND) == whole_units(len(FIRST.ids) + 29)
    assert bench.answered(SECOND) == whole_units(len(SECOND.ids) - 1)


@pytest.mark.parametrize(
    ("hybrid", "same", "question", "turn"),
    [
        (MERGES, True, True, True),
        (TURN_END, True, False, True),
        (PROMPT_END, True, False, False),
    ],
    ids=METHODS,
)
@pytest.mark.parametrize("gone", [False, True], ids=["running", "gone"])
def test_what_is_shared_behind_an_image(
    hybrid: dict[str, Any], same: bool, question: bool, turn: bool, gone: bool
) -> None:
    """The same prompt, another question, the next turn; another image never."""
    before_the_image = whole_units(len(SYSTEM.ids))
    behind_the_image = len(SYSTEM.ids) + PATCHES
    for shared, prompt, common in [
        (same, FIRST, whole_units(len(FIRST.ids) - 1)),
        (question, OTHER_QUESTION, behind_the_image),
        (turn, SECOND, whole_units(len(FIRST.ids) + 29)),
        (False, SYSTEM.image("sky").text(52).header(), 0),
    ]:
        bench = Bench(hybrid)
        first = bench.ask(FIRST, 30 if gone else 60)
        while len(bench.requests[first].output_token_ids) < 30:
            bench.step()
        if gone:
            bench.finish()
        name = bench.ask(prompt)
        bench.finish()
        assert bench.worker.hits[name] == (common if shared else before_the_image)


@sharing_methods
def test_a_prompt_that_shares_an_image_holds_no_block_in_its_hole(hybrid: dict[str, Any]) -> None:
    bench = Bench(hybrid)
    bench.answered(FIRST, 30)
    free = bench.pool.get_num_free_blocks()
    name = bench.ask(SECOND)
    new = bench.step().scheduled_new_reqs[0]
    lower = bench.managers[0].block_size
    # 40 + 311 live tokens, and the hole's end at 616.
    assert {n for n, block in enumerate(new.block_ids[0]) if block == 0} == set(
        range(-(-351 // lower), 616 // lower)
    )
    held = sum(map(len, bench.held(name)))
    # What it shares was free to be evicted.
    assert bench.pool.get_num_free_blocks() == free - held
    bench.finish()


@both_schedulers
def test_merging_shares_what_stock_shares(ahead: bool, seed: int) -> None:
    """But of an image all or nothing."""
    rng = random.Random(seed)
    stock, ours = Bench({}, ahead, num_blocks=5000), Bench(MERGES, ahead, num_blocks=5000)
    prompts: list[Prompt] = []
    for _ in range(30):
        prompt = (
            continued(rng, prompts) if prompts and rng.random() < 0.7 else Prompt().text(rng.randrange(99))
        )
        prompt = random_turn(rng, prompt)
        prompts.append(prompt)
        found, wanted = ours.answered(prompt, 20), stock.answered(prompt, 20)
        assert found == with_whole_images(prompt, wanted)


def test_turns_share_what_stock_shares(seed: int) -> None:
    """Where each turn ends in a header, its images are ranked alike whatever comes later."""
    rng = random.Random(seed)
    stock, ours = Bench({}, num_blocks=5000), Bench(TURN_END, num_blocks=5000)
    for number in range(6):
        prompt = Prompt().text(20 + number, first=1000 * number)
        for _ in range(3):
            prompt = random_turn(rng, prompt).header()
            if len(prompt.images) > 3 or len(prompt.ids) > 2000:
                break
            found, wanted = ours.answered(prompt, 20), stock.answered(prompt, 20)
            assert found == with_whole_images(prompt, wanted)
            prompt = prompt.answer(20)


def random_turn(rng: random.Random, prompt: Prompt) -> Prompt:
    """A prompt and then a question, with an image or without."""
    if len(prompt.images) < 3 and rng.random() < 0.6 and len(prompt.ids) < 1200:
        prompt = prompt.image(rng.choice(list(LIVE)))
    return prompt.text(rng.randrange(1, 40), rng.choice([100, 101]))


def continued(rng: random.Random, prompts: list[Prompt]) -> Prompt:
    """One of the prompts, cut behind its last image or with its answer."""
    prompt = rng.choice([p for p in prompts if len(p.ids) < 1400] or [Prompt().text(9)])
    if rng.random() < 0.5 and prompt.images:
        return Prompt(prompt.ids[: prompt.images[-1][0] + PATCHES], prompt.images)
    return prompt.answer(20)


@both_schedulers
@all_methods
def test_an_image_is_computed_once_for_all_who_come_at_once(hybrid: dict[str, Any], ahead: bool) -> None:
    """What the others would copy is written in that step, so they wait for the next one."""
    bench = Bench(hybrid, ahead, max_num_batched_tokens=8000)
    # The last whole block of each tier ends inside the image.
    prompt = SYSTEM.image("street").text(1).header()
    names = [bench.ask(prompt, 20) for _ in range(3)]
    for _ in range(1 + ahead):
        assert set(bench.step().num_scheduled_tokens) == {names[0]}
    assert set(bench.step().num_scheduled_tokens) == {*names}
    bench.finish()
    assert [bench.worker.hits[name] for name in names] == [0, *[len(SYSTEM.ids) + PATCHES] * 2]


@all_methods
def test_two_texts_of_one_step_share_whole_blocks(hybrid: dict[str, Any]) -> None:
    """What the second reads is written in that very step; only what is copied must be there before."""
    bench = Bench(hybrid, max_num_batched_tokens=2000)
    first, second = bench.ask(Prompt().text(500)), bench.ask(Prompt().text(500))
    assert set(bench.step().num_scheduled_tokens) == {first, second}
    largest = max(bench.sizes.values())
    assert bench.worker.hits == {first: 0, second: 499 // largest * largest}
    bench.finish()


@all_methods
def test_tenants_are_kept_apart(hybrid: dict[str, Any]) -> None:
    bench = Bench(hybrid)
    assert bench.answered(FIRST, cache_salt="one") == 0
    assert bench.answered(FIRST, cache_salt="two") == 0
    assert bench.answered(FIRST, cache_salt="one") == whole_units(len(FIRST.ids) - 1)


@all_methods
def test_no_prompt_shares_what_another_one_was_ranked_by(hybrid: dict[str, Any]) -> None:
    """The block that holds the image's beginning is named by all that its choice follows from."""
    bench = Bench(hybrid)
    for question in range(6):
        hit = bench.answered(SYSTEM.image("street").text(10, first=200 + question).header())
        if hybrid is not MERGES:
            assert hit == (0 if question == 0 else whole_units(len(SYSTEM.ids)))
    two = SYSTEM.image("street").image("cat").text(5).header()
    bench.answered(two)
    other_image = SYSTEM.image("street").image("sky").text(5).header()
    first_image = len(SYSTEM.ids) + PATCHES
    assert bench.answered(other_image) == (first_image if hybrid is MERGES else whole_units(len(SYSTEM.ids)))


@both_schedulers
@sharing_methods
@pytest.mark.parametrize("tier", [0, 1])
def test_evicted_blocks_are_computed_again(hybrid: dict[str, Any], tier: int, ahead: bool) -> None:
    """Any one block of a conversation: before the image, with its first or last tokens, of text behind it."""
    if tier == 1 and hybrid is MERGES:
        pytest.skip("merging has one tier")
    size = list(Bench(hybrid).sizes.values())[tier]
    for number in range(len(FIRST.ids) // size):
        bench = Bench(hybrid, ahead)
        bench.worker.unsteady = True
        name = bench.ask(FIRST, 30)
        while not bench.requests[name].output_token_ids:
            bench.step()
        block = bench.managers[tier].req_to_blocks[name][number]
        bench.finish()
        if block.is_null:
            continue
        bench.pool.evict_blocks({block.block_id})
        # Another encoding, which may have other tokens.
        bench.scheduler.reset_encoder_cache()
        assert bench.answered(SECOND, 30) <= with_whole_images(SECOND, number * size + size - 1)
        assert bench.answered(SECOND.answer(30).text(5).header()) == whole_units(len(SECOND.ids) + 29)


@sharing_methods
def test_of_two_copies_the_one_that_reaches_further_is_shared(hybrid: dict[str, Any]) -> None:
    """Of a picture that nothing was merged of, the last block is full of tokens."""
    bench = Bench(hybrid)
    short = Prompt().text(7).image("noise").text(1).header()
    bench.answered(short, 1)
    long = short.answer(1).text(40).header()
    # The block with the image's end was never filled, so nobody offered it.
    assert bench.answered(long, 30) == 7
    assert bench.answered(long) == whole_units(len(long.ids) - 1)


@both_schedulers
def test_questions_asked_at_once_share_their_picture(ahead: bool) -> None:
    """All but one take the picture over, whose last block has the first one's question in it."""
    bench = Bench(MERGES, ahead, max_num_batched_tokens=8000)
    prompts = [SYSTEM.image("cat").text(40, first=200 + number) for number in range(4)]
    names = [bench.ask(prompt, 20) for prompt in prompts]
    bench.finish()
    behind_the_image = len(SYSTEM.ids) + PATCHES
    assert [bench.worker.hits[name] for name in names] == [0, *[behind_the_image] * 3]
    assert [bench.answered(prompt) for prompt in prompts] == [whole_units(len(prompts[0].ids) - 1)] * 4


def test_an_image_s_last_block_is_not_looked_for_in_the_other_tier() -> None:
    """It is evicted, the other tier gets it, and the blocks before it are still there."""
    bench = Bench(TURN_END | {"fastv_layer": 1}, num_blocks=160)
    first = SYSTEM.image("crowd").text(52).header()
    name = bench.ask(first, 8)
    while not bench.requests[name].output_token_ids:
        bench.step()
    lower = bench.managers[0]
    tail = lower.req_to_blocks[name][(len(SYSTEM.ids) + PATCHES) // lower.block_size]
    bench.finish()
    upper_tier = 1
    for number in range(200):
        bench.answered(Prompt().text(10 + 7 * number % 90, first=10000 + 1000 * number), 4)
        if tail.block_hash is not None and get_group_id(tail.block_hash) == upper_tier:
            break
    else:
        pytest.fail("the other tier never got the block")
    # Worse than a picture that is not found would be one whose last tokens are another's.
    bench.answered(first.answer(8).text(5).header(), 4)


@pytest.mark.parametrize("more", [0, 1, 2, 3])
@sharing_methods
def test_a_pool_without_room_for_a_copied_block(hybrid: dict[str, Any], more: int) -> None:
    """It holds the longest prompt and no block beside it; what is shared in part would take one."""
    length = 1296
    least = sum(-(-length // size) for size in block_sizes(hybrid, 16).values())
    bench = Bench(hybrid, num_blocks=1 + least + more, max_model_len=length)
    prompt = Prompt().text(30).image("noise")
    bench.answered(prompt.text(length - 611), 3)
    bench.answered(prompt.text(length - 611), 3)
    bench.answered(prompt.text(length - 611, first=5000), 3)


def test_no_prompt_is_compared_at_an_end_inside_an_image_at_its_beginning() -> None:
    bench = Bench(TURN_END)
    name = bench.ask(Prompt().image("street").text(40).header())
    bench.finish()
    keys = bench.requests[name].block_hashes
    lower, whole = 0, bench.managers[0].block_size // bench.hash_size
    assert bench.pool.get_cached_block(keys[whole - 1], [lower]) is not None
    assert all(bench.pool.get_cached_block(key, [lower]) is None for key in keys[: whole - 1])


def test_an_image_that_is_lost_costs_no_other() -> None:
    """Also where both are next to each other and the end of the first one ends no block."""
    bench = Bench(MERGES)
    prompt = SYSTEM.image("cat").image("street").text(30)
    name = bench.ask(prompt)
    bench.step()
    second = len(SYSTEM.ids) + PATCHES
    block = bench.managers[0].req_to_blocks[name][second // 16 + 3]
    bench.finish()
    bench.pool.evict_blocks({block.block_id})
    assert bench.answered(prompt) == second


@all_methods
def test_the_prefix_cache_can_be_emptied(hybrid: dict[str, Any]) -> None:
    bench = Bench(hybrid)
    bench.answered(FIRST)
    assert bench.scheduler.reset_prefix_cache()
    assert bench.answered(FIRST) == 0


@all_methods
def test_without_prefix_caching_nothing_is_shared(hybrid: dict[str, Any]) -> None:
    bench = Bench(hybrid, enable_prefix_caching=False)
    assert bench.answered(FIRST) == bench.answered(FIRST) == 0


@both_schedulers
@all_methods
def test_a_preempted_request_finds_its_own_blocks(hybrid: dict[str, Any], ahead: bool) -> None:
    bench = Bench(hybrid, ahead)
    name = bench.ask(FIRST, 30)
    other = bench.ask(OTHER_QUESTION, 30)
    for _ in range(12):
        bench.step()
    for request in (name, other):
        bench.scheduler.running.remove(bench.requests[request])
        bench.scheduler._preempt_request(bench.requests[request], 0.0)
    # All of them, but for the last token's.
    resumed: dict[str, int] = {}
    while len(resumed) < 2:
        resumed = bench.step().num_scheduled_tokens | resumed
    assert max(resumed.values()) <= 16
    bench.finish()


def test_nobody_finds_what_a_preempted_request_was_to_write() -> None:
    """vLLM offers the blocks of a step when it schedules it, and may then preempt their request."""
    bench = Bench(
        MERGES,
        num_blocks=67,
        max_model_len=1056,
        scheduling_policy="priority",
        long_prefill_token_threshold=600,
    )
    slow = bench.ask(Prompt().text(1040), 8, priority=1)
    bench.ask(Prompt().text(32, first=5000), 20, priority=0)
    bench.step()
    # The second request needs a block where the first one has taken all.
    assert slow not in bench.step().num_scheduled_tokens
    bench.finish()


def test_the_steps_of_a_beam_search_share_the_prompt() -> None:
    """Beams are prompts that end in tokens of their own, and all are ranked by the searched prompt's end."""
    bench = Bench(PROMPT_END)
    bench.answered(FIRST, 1)
    for beam in range(3):
        prompt = FIRST.text(4, first=300 + beam)
        name = bench.ask(prompt, 1, extra_args={PROMPT_TOKENS: len(FIRST.ids)})
        bench.finish()
        assert bench.worker.hits[name] == whole_units(len(FIRST.ids))


@sharing_methods
def test_hits_are_counted_as_virtual_tokens(hybrid: dict[str, Any]) -> None:
    bench = Bench(hybrid)
    bench.answered(FIRST, 30)
    found = bench.answered(SECOND)
    assert bench.lookups == {"queries": len(FIRST.ids) + len(SECOND.ids), "hits": found}


def test_a_turn_is_computed_without_those_behind_it() -> None:
    """Of a long conversation a step takes the turns that fit, and their images with what ranks them."""
    bench = Bench(TURN_END)
    bench.scheduler.max_num_scheduled_tokens = 1000
    later = FIRST.answer(30).image("cat").text(30).header()
    name = bench.ask(later)
    steps = [bench.step().num_scheduled_tokens[name] for _ in range(2)]
    # The first turn with its answer, then the second from its image on.
    assert steps == [len(FIRST.ids) + 30, len(later.ids) - len(FIRST.ids) - 30]
    bench.finish()
