"""Random traffic under random limits, through the real scheduler: no request may wait for ever.

Prompts repeat and continue others, in pools that are often too small to keep what could be shared. A scene is
all that its seed says: options as `vllm serve` would get them, requests, preemptions, aborts. Its options are
refused at start in one sentence, or every request of it ends. Run alone, for as many as wanted:

    python -m tests.support.scheduler_scenes --scenes 10000
    python -m tests.support.scheduler_scenes --seed 12345
"""

from __future__ import annotations

import argparse
import logging
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.support.configurations import LEVELS, MERGES
from tests.support.scheduler_bench import HEADER, LIVE, Bench, Prompt, block_sizes, quickly_configured
from tests.support.tiny_checkpoints import PATCHES

# Steps in which the first requests of a scene have to end while others keep coming.
STEPS = 3000
LENGTHS = (600, 640, 1000, 1300, 2048, 2048)


@dataclass(frozen=True)
class Ended:
    """How a scene ended.

    Attributes:
        refused: the sentence that refused its options, if one did.
        preemptions: how often a request had to start over.
        raised: whether a limit was raised at start.
        shortage: whether the encoder cache was too full for an image.
        shared: whether a request found an image in the prefix cache.

    """

    refused: str | None = None
    preemptions: int = 0
    raised: bool = False
    shortage: bool = False
    shared: bool = False


def play(seed: int) -> Ended:
    """Play one scene.

    Raises:
        AssertionError: a request waits for ever, or a step is wrong; with the seed in the message.

    """
    try:
        return _play(random.Random(seed))
    except Exception as error:
        raise AssertionError(
            f"scene {seed} fails (python -m tests.support.scheduler_scenes --seed {seed}): {error}"
        ) from error


def _play(rng: random.Random) -> Ended:
    length = rng.choice(LENGTHS)
    options = limits(rng, length)
    hybrid = method(rng)
    block_size = rng.choice([16, 32, 64])
    # As often as not no more than the longest request needs.
    tokens, spare = length * rng.choice([1, 1, 1.3, 2.5]), rng.choice([0, 0, 1, 4])
    try:
        config = quickly_configured(hybrid, **options)
    except ValueError as refusal:
        return Ended(refused=str(refusal))
    bench = Bench(
        hybrid,
        ahead=rng.random() < 0.5,
        num_blocks=1
        + spare
        + sum(-(-int(tokens) // size) for size in block_sizes(hybrid, block_size).values()),
        block_size=block_size,
        config=config,
    )
    bench.worker.unsteady = rng.random() < 0.5
    shrink_encoder_cache(bench, rng)
    shortage = Shortage(bench)
    asked = [ask(bench, rng) for _ in range(rng.randint(2, 5))]
    for _ in range(STEPS):
        if all(name not in bench.scheduler.requests for name in asked):
            break
        disturb(bench, rng, asked)
        bench.step()
    else:
        waiting = [name for name in asked if name in bench.scheduler.requests]
        raise AssertionError(f"{waiting} are not done after {STEPS} steps")
    bench.finish()
    config = bench.scheduler.scheduler_config
    raised = any(
        (options.get(name) or getattr(config, name)) != getattr(config, name)
        for name in ("max_num_batched_tokens", "max_num_scheduled_tokens", "long_prefill_token_threshold")
    )
    return Ended(None, bench.preemptions(), raised, shortage.seen, shares_images(bench))


def shares_images(bench: Bench) -> bool:
    """Whether a request found its first image in memory when it was first scheduled."""
    return any(
        feature.mm_position.offset < hit
        for name, hit in bench.worker.hits.items()
        for feature in bench.requests[name].mm_features
    )


def method(rng: random.Random) -> dict[str, Any]:
    """A section: merging, or pruning at any depth, or levels that do one or the other, or both."""
    if rng.random() < 0.4:
        return MERGES
    section: dict[str, Any] = {"fastv_ratio": rng.choice([0.25, 0.5, 0.9])}
    if rng.random() < 0.5:
        section = dict(LEVELS)
    section["fastv_layer"] = rng.choice([1, 2, 3, 4, 7])
    if rng.random() < 0.5:
        return section | {"fastv_rank": "prompt_end"}
    return section | {"fastv_rank": "turn_end", "assistant_header": HEADER}


def limits(rng: random.Random, length: int) -> dict[str, Any]:
    """Engine arguments that limit what a step may hold, as often as not below what an image takes."""
    seqs = rng.choice([1, 2, 3, 8])
    options: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": rng.choice([64, 300, PATCHES, 600, 800, 1500, 4096]),
        "scheduling_policy": rng.choice(["fcfs", "priority"]),
        "enable_prefix_caching": rng.random() < 0.8,
        "scheduler_reserve_full_isl": rng.random() < 0.5,
        "watermark": rng.choice([0.0, 0.0, 0.1, 0.4]),
        "limit_mm_per_prompt": {"image": 3},
    }
    if rng.random() < 0.4:
        options["max_num_scheduled_tokens"] = rng.choice([32, 300, 512, PATCHES, 700])
    if rng.random() < 0.3:
        options["long_prefill_token_threshold"] = rng.choice([1, 100, 256, PATCHES - 1, PATCHES, 700])
        options["long_prefill_token_threshold_adaptive"] = rng.random() < 0.5
    if rng.random() < 0.2:
        options["max_num_active_seqs"] = rng.randint(1, seqs)
    if rng.random() < 0.1:
        options["enable_chunked_prefill"] = False
    if rng.random() < 0.1:
        options["disable_chunked_mm_input"] = True
    return options


def shrink_encoder_cache(bench: Bench, rng: random.Random) -> None:
    """Leave the encoder no more than what the settings guarantee, at times."""
    if rng.random() < 0.5:
        return
    scheduler, prunes = bench.scheduler, bench.asked.prunes
    least = bench.length if prunes else PATCHES
    cache = scheduler.encoder_cache_manager
    cache.cache_size = cache.num_free_slots = cache.num_freeable_slots = max(least, PATCHES)
    if rng.random() < 0.5:
        scheduler.max_num_encoder_input_tokens = max(least, PATCHES)


class Shortage:
    """Notes whether a scheduler ever found its encoder cache too full."""

    def __init__(self, bench: Bench) -> None:
        self.seen = False
        can_allocate = bench.scheduler.encoder_cache_manager.can_allocate

        def watched(*args: Any) -> bool:
            room = can_allocate(*args)
            self.seen |= not room
            return room

        bench.scheduler.encoder_cache_manager.can_allocate = watched


def ask(bench: Bench, rng: random.Random, urgent: bool = True) -> str:
    """Add a request whose answer still fits; one that is not urgent never goes before an urgent one."""
    tokens = rng.choice([1, 2, 3, 10, 40])
    longest = bench.length - tokens - 1
    prompt = next_turn(bench, rng, longest) if rng.random() < 0.6 else random_prompt(bench, rng, longest)
    return bench.ask(prompt, tokens, priority=rng.randrange(2) if urgent else 2)


def random_image(bench: Bench, rng: random.Random) -> str:
    """One of a few images, at one of the levels where there are some."""
    level = rng.choice(["", *(f"@{name}" for name in bench.asked.levels if name != "default")])
    return rng.choice(list(LIVE)[:4]) + level


def random_prompt(bench: Bench, rng: random.Random, longest: int) -> Prompt:
    """Up to three images with texts around them; few images, so that they are often in the cache."""
    prompt = Prompt().text(rng.choice([0, 5, 96]), rng.choice([100, 200]))
    for _ in range(rng.choice([0, 1, 1, 2, 3, 3])):
        prompt = prompt.image(random_image(bench, rng)).text(rng.choice([0, 1, 60]), rng.randrange(9))
    prompt = prompt.header() if rng.random() < 0.5 else prompt
    return prompt if 1 < len(prompt.ids) <= longest else random_prompt(bench, rng, longest)


def next_turn(bench: Bench, rng: random.Random, longest: int) -> Prompt:
    """The prompt of a request so far, its answer so far, and another question; or the same prompt again."""
    if not bench.prompts:
        return random_prompt(bench, rng, longest)
    name, prompt = rng.choice(list(bench.prompts.items()))
    if rng.random() < 0.8:
        answer = list(bench.requests[name].output_token_ids)
        prompt = Prompt(prompt.ids + answer, prompt.images).text(rng.choice([0, 1, 30]), rng.randrange(9))
        if rng.random() < 0.3:
            prompt = prompt.image(random_image(bench, rng))
        prompt = prompt.text(rng.choice([0, 3]), 50)
        prompt = prompt.header() if rng.random() < 0.7 else prompt
    fits = 1 < len(prompt.ids) <= longest and len(prompt.images) <= 3
    return prompt if fits else random_prompt(bench, rng, longest)


def disturb(bench: Bench, rng: random.Random, asked: list[str]) -> None:
    """What else happens between two steps: new requests, aborts, preemptions, emptied caches."""
    if rng.random() < 0.2 and len(bench.scheduler.requests) < 6:
        # Urgent ones end with the scene: they may overtake for ever.
        ask(bench, rng, urgent=len(bench.requests) < 12)
    chance = rng.random()
    if chance < 0.01:
        bench.abort(rng.choice([*bench.scheduler.requests, *asked]))
    elif chance < 0.02 and bench.preemptions() < 8:
        bench.preempt_all()


def main() -> None:
    """Play scenes and count how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, help="one scene only")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    if chosen.seed is not None:
        print(play(chosen.seed))
        return
    first = random.randrange(1 << 32)
    print(f"scenes {first} to {first + chosen.scenes - 1}")
    ends: Counter[str] = Counter()
    for seed in range(first, first + chosen.scenes):
        count(ends, play(seed))
    print(dict(ends))


def count(ends: Counter[str], ended: Ended) -> None:
    """Add a scene to the counts of what happened."""
    ends["refused" if ended.refused else "answered"] += 1
    ends["preempted"] += ended.preemptions > 0
    ends["limits raised"] += ended.raised
    ends["encoder cache too full"] += ended.shortage
    ends["images shared"] += ended.shared


if __name__ == "__main__":
    main()
