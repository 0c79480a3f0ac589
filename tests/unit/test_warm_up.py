"""Steps made up before the first request: what they are given, where they write, what is left of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_hybrid.engine.warm_up import warm_up
from vllm_hybrid.frontend.picture_levels import level_of
from vllm_hybrid.levels import Level, Levels

PATCHES, HIDDEN, IMAGE_TOKEN = 36, 8, 99
FULL, LOW, MID = Level("full"), Level("low", (0.9,), 0.5), Level("mid", (0.9,))
LEVELS = Levels((MID, LOW, FULL), MID, ())
# Tokens of a block in each tier.
BLOCK_SIZES = (48, 16)


class Worker:
    """Takes steps as a worker does and notes them; runs nothing."""

    def __init__(self, most_requests: int = 8, blocks: int = 100, pictures: bool = True) -> None:
        config = SimpleNamespace(
            text_config=SimpleNamespace(hidden_size=HIDDEN), image_token_index=IMAGE_TOKEN
        )
        groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in BLOCK_SIZES]
        self.model_runner = SimpleNamespace(
            kv_cache_config=SimpleNamespace(num_blocks=blocks, kv_cache_groups=groups),
            max_num_reqs=most_requests,
            supports_mm_inputs=pictures,
            max_model_len=PATCHES + 4,
            model_config=SimpleNamespace(hf_config=config),
            dtype=torch.bfloat16,
            _dummy_run=self.decode,
        )
        self.steps: list[SchedulerOutput] = []
        self.sampled = 0
        self.decodes: list[int] = []

    def execute_model(self, step: SchedulerOutput) -> None:
        self.steps.append(step)

    def sample_tokens(self, grammar: Any) -> None:
        self.sampled += 1

    def decode(self, requests: int, uniform_decode: bool, skip_eplb: bool) -> None:
        assert uniform_decode
        self.decodes.append(requests)


def warmed_up(levels: Levels = LEVELS, **facts: Any) -> Worker:
    worker = Worker(**facts)
    warm_up(worker, levels, PATCHES)
    return worker


def kinds(worker: Worker) -> list[str]:
    """Of each step with rows what it brings: "text" and "picture" prompts, "decode"s."""
    found = []
    for step in worker.steps:
        if step.num_scheduled_tokens:
            prompts = ["picture" if new.mm_features else "text" for new in step.scheduled_new_reqs]
            found.append("+".join([*prompts, *["decode"] * len(step.scheduled_cached_reqs.req_ids)]))
    return found


def test_steps_of_every_kind_are_run() -> None:
    worker = warmed_up()
    assert kinds(worker) == ["text", "picture+decode", "decode"]
    assert worker.sampled == 3 and worker.decodes == [1, 2, 4, 8]
    shown = [
        new.mm_features[0] for step in worker.steps for new in step.scheduled_new_reqs if new.mm_features
    ]
    assert [level_of(feature.identifier, LEVELS) for feature in shown] == [LOW]
    for step in worker.steps:
        assert step.total_num_scheduled_tokens == sum(step.num_scheduled_tokens.values()) <= PATCHES + 2
        for new in step.scheduled_new_reqs:
            assert new.prefill_token_ids is not None
            assert new.prefill_token_ids.count(IMAGE_TOKEN) == PATCHES * len(new.mm_features)
            assert step.scheduled_encoder_inputs.get(new.req_id, []) == [0] * len(new.mm_features)


@pytest.mark.parametrize("most_requests", [1, 8])
@pytest.mark.parametrize("blocks", [3, 100])
def test_requests_end_and_write_where_there_are_pages(most_requests: int, blocks: int) -> None:
    worker = warmed_up(most_requests=most_requests, blocks=blocks)
    running: dict[str, int] = {}
    pictures: set[str] = set()
    for step in worker.steps:
        for name in step.finished_req_ids:
            del running[name]
        pictures -= set(step.free_encoder_mm_hashes)
        for new in step.scheduled_new_reqs:
            running[new.req_id] = 0
            pictures |= {feature.identifier for feature in new.mm_features}
            longest = min(len(new.prefill_token_ids or []) + 3, PATCHES + 4)
            for size, ids in zip(BLOCK_SIZES, new.block_ids, strict=True):
                # Never the null block.
                assert len(ids) * size >= longest and all(0 < number < blocks for number in ids)
        cached = step.scheduled_cached_reqs
        assert cached.num_computed_tokens == [running[name] for name in cached.req_ids]
        for name, tokens in step.num_scheduled_tokens.items():
            running[name] += tokens
        assert len(running) <= most_requests
    assert not running and not pictures
    if blocks == 100:
        taken = [
            n
            for step in worker.steps
            for new in step.scheduled_new_reqs
            for ids in new.block_ids
            for n in ids
        ]
        assert len(taken) == len(set(taken))


def test_a_server_without_pictures_warms_up_text() -> None:
    assert kinds(warmed_up(pictures=False)) == ["text"]


def test_without_levels_the_full_one_is_enough() -> None:
    worker = warmed_up(Levels())
    assert kinds(worker) == ["text", "picture+decode", "decode"]


def test_decodes_of_an_odd_number_of_requests_are_run_too() -> None:
    assert warmed_up(most_requests=6).decodes == [1, 2, 4, 6]
    assert warmed_up(most_requests=1).decodes == [1]
