"""Steps that a worker runs before its first request, so that none waits for a compiler.

Triton compiles a kernel when it is first launched, and so may a library that attends. Profiling runs have no
pages, so they launch none of attention's kernels, and captured graphs those of decodes alone. So requests are
made up here, and answered through the worker as a scheduler has it do: what they launch is what requests
launch. Their pages are blocks that nobody has yet, like those of a request that has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from vllm_hybrid.frontend.picture_levels import identifier_at
from vllm_hybrid.levels import Level, Levels

# Any token will do.
_TOKEN = 1
# Steps that a made-up request is answered in at most, its prompt's included.
_STEPS = 4


def warm_up(worker: Any, levels: Levels, patches: int) -> None:
    """Run steps of every kind that requests bring: prompts of text and with pictures, decodes, mixed ones.

    Args:
        worker: one of vLLM's, whose model runner is V2 and has its KV cache.
        levels: the model's.
        patches: of a picture.

    """
    steps = _Steps(worker)
    several = steps.most_requests > 1
    text = steps.text_request()
    steps.run(text)
    if steps.holds_picture(patches):
        picture = steps.picture_request(patches, _level_of_most_kernels(levels))
        if several:
            steps.run(text, picture)
        else:
            steps.finish()
            steps.run(picture)
        steps.run(picture)
    steps.finish()
    steps.run_decodes()


def _level_of_most_kernels(levels: Levels) -> Level:
    """A level that drops tokens, if there is one: it launches what others do, and ranks tokens."""
    return next((level for level in levels if level.prunes), levels.default)


@dataclass
class _Answered:
    """A made-up request of which some tokens are computed."""

    request: Request
    block_ids: tuple[list[int], ...]
    computed: int = 0


class _Steps:
    """Made-up requests and the steps that compute them.

    Args:
        worker: see :func:`warm_up`.

    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._runner = worker.model_runner
        self._cache = self._runner.kv_cache_config
        self._running: dict[str, _Answered] = {}
        self._made = 0
        self._blocks = 0

    @property
    def most_requests(self) -> int:
        """Requests of a step at most."""
        return int(self._runner.max_num_reqs)

    def holds_picture(self, patches: int) -> bool:
        """Whether a request may have a picture, and an answer."""
        return bool(self._runner.supports_mm_inputs) and self._runner.max_model_len > patches + 1

    def text_request(self) -> _Answered:
        """A prompt of text alone."""
        return self._request([_TOKEN] * 2, [])

    def picture_request(self, patches: int, level: Level) -> _Answered:
        """A prompt that begins with a picture of given features: the tower has nothing to learn of it."""
        config = self._runner.model_config.hf_config
        features = torch.zeros(patches, config.text_config.hidden_size, dtype=self._runner.dtype)
        given = MultiModalFieldElem(data=features, field=MultiModalBatchedField())
        picture = MultiModalFeatureSpec(
            data=MultiModalKwargsItem({"image_embeds": given}),
            modality="image",
            identifier=identifier_at("_warm_up", level),
            mm_position=PlaceholderRange(offset=0, length=patches),
        )
        return self._request([config.image_token_index] * patches + [_TOKEN], [picture])

    def _request(self, tokens: list[int], pictures: list[MultiModalFeatureSpec]) -> _Answered:
        # With a seed of its own it draws none of the numbers that seed requests.
        params = SamplingParams(temperature=0, max_tokens=_STEPS, seed=0)
        self._made += 1
        request = Request(f"_warm_up_{self._made}", tokens, params, None, mm_features=pictures)
        length = min(len(tokens) + _STEPS, self._runner.max_model_len)
        groups = self._cache.kv_cache_groups
        return _Answered(
            request, tuple(self._new_blocks(-(-length // g.kv_cache_spec.block_size)) for g in groups)
        )

    def _new_blocks(self, count: int) -> list[int]:
        """Blocks that no made-up request has, as far as there are; the null block is none of them."""
        numbers = range(self._blocks, self._blocks + count)
        self._blocks += count
        return [1 + number % (self._cache.num_blocks - 1) for number in numbers]

    def run(self, *answered: _Answered) -> None:
        """A step that computes the prompts of new requests and another token of those that run."""
        step = SchedulerOutput.make_empty()
        step.scheduled_cached_reqs = CachedRequestData.make_empty()
        for one in answered:
            name, tokens = one.request.request_id, one.request.prompt_token_ids
            assert tokens is not None
            if name in self._running:
                step.scheduled_cached_reqs.req_ids.append(name)
                step.scheduled_cached_reqs.num_computed_tokens.append(one.computed)
                step.scheduled_cached_reqs.num_output_tokens.append(1 + one.computed - len(tokens))
                step.scheduled_cached_reqs.new_block_ids.append(None)
                step.num_scheduled_tokens[name] = 1
            else:
                step.scheduled_new_reqs.append(
                    NewRequestData.from_request(one.request, one.block_ids, prefill_token_ids=tokens)
                )
                step.num_scheduled_tokens[name] = len(tokens)
                if one.request.mm_features:
                    step.scheduled_encoder_inputs[name] = [0]
            self._running[name] = one
            one.computed += step.num_scheduled_tokens[name]
        step.total_num_scheduled_tokens = sum(step.num_scheduled_tokens.values())
        self._worker.execute_model(step)
        self._worker.sample_tokens(None)

    def finish(self, *answered: _Answered) -> None:
        """End requests that run, all where none is named; nothing is left of them and their pictures."""
        ended = answered or tuple(self._running.values())
        step = SchedulerOutput.make_empty()
        step.finished_req_ids = {one.request.request_id for one in ended}
        step.free_encoder_mm_hashes = [f.identifier for one in ended for f in one.request.mm_features]
        for name in step.finished_req_ids:
            self._running.pop(name, None)
        self._worker.execute_model(step)

    def run_decodes(self) -> None:
        """Steps of decodes alone, of as many requests as there are ways to share a device out among them."""
        count = 1
        while count < 2 * self.most_requests:
            self._runner._dummy_run(min(count, self.most_requests), uniform_decode=True, skip_eplb=True)
            count *= 2
