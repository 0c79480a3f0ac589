"""Answers of vLLM's V2 model runner, the one that serves on CUDA, on a CPU; run as a program by its test.

Triton's kernels of the runner run in Triton's interpreter. That has to be arranged before vLLM is imported,
so it needs a process of its own: one for all engines. Reads a list of requests as JSON from standard input,
writes a line with answers as JSON for each as soon as it has them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}

import torch  # noqa: E402
import triton.backends  # noqa: E402
from PIL import Image  # noqa: E402

from tests.support.compiled_kernels import Launches, noted_launches  # noqa: E402
from tests.support.triton_interpreter import spare_repeated_work  # noqa: E402


def pretend_cpu_backend() -> None:
    """vLLM asks Triton for an active driver; the interpreter needs none, so one that says yes will do."""
    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


@contextmanager
def as_on_cuda() -> Iterator[Launches]:
    """Have the worker profile as CUDA's always does, on a device that few decodes fill; note the kernels."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from vllm_hybrid.attention.triton_kernels import decode

    profiles = mock.patch.object(CPUWorker, "_should_warm_up_model", lambda self: True)
    # Decodes of unlike numbers are then cut into unlike parts.
    with noted_launches() as launches, profiles, mock.patch.object(decode, "_PROCESSORS", 2):
        yield launches


def watch_steps() -> list[dict[str, Any]]:
    """Trace every forward pass of the model, and what comes before it; the list grows as steps run."""
    from vllm.forward_context import get_forward_context

    from tests.support.step_trace import trace_step
    from vllm_hybrid.models.llava import LlavaHybridForConditionalGeneration as Model

    steps: list[dict[str, Any]] = []
    encode, embed, forward = Model.embed_multimodal, Model.embed_input_ids, Model.forward
    before: dict[str, list[str]] = {"waits_encoding": [], "waits_embedding": []}

    def traced_encode(self: Any, **kwargs: Any) -> Any:
        with trace_step() as trace:
            result = encode(self, **kwargs)
        before["waits_encoding"] = trace.waits
        return result

    def traced_embed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with trace_step([x for x in [kwargs.get("is_multimodal")] if x is not None]) as trace:
            result = embed(self, *args, **kwargs)
        before["waits_embedding"] = trace.waits
        return result

    def traced_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tiers = get_forward_context().attn_metadata
        if tiers is None:
            return forward(self, *args, **kwargs)
        commons = [metadata.common for metadata in tiers.values()]
        images = 0 if self._images is None else len(self._images.counts)
        on_host = [x for c in commons for x in (c.query_start_loc_cpu, c.seq_lens_cpu_upper_bound)]
        with trace_step(on_host) as trace:
            result = forward(self, *args, **kwargs)
        steps.append(
            {
                "rows": commons[0].num_actual_tokens,
                "requests": commons[0].num_reqs,
                "images": images,
                "waits": trace.waits,
                "operations": trace.operations,
                **before,
            }
        )
        before["waits_encoding"] = []
        return result

    Model.embed_multimodal = traced_encode  # type: ignore[method-assign]
    Model.embed_input_ids = traced_embed  # type: ignore[method-assign]
    Model.forward = traced_forward  # type: ignore[method-assign]
    return steps


def spoil_a_page(llm: Any, number: int) -> None:
    """Once a request has begun to answer, have a page of its upper tier describe somebody else's image."""
    from vllm_hybrid.kv.page_facts import START

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[-1]
    names = list[str]()
    take_in, step = scheduler.add_request, llm.llm_engine.step

    def noted(request: Any) -> None:
        names.append(request.request_id)
        take_in(request)

    def spoiled() -> Any:
        request = scheduler.requests.get(names[number]) if len(names) > number else None
        if request is not None and request.num_output_tokens >= 2:
            block = manager.req_to_blocks[request.request_id][0].block_id
            with torch.inference_mode():
                model.language_model.model._pages[-1].facts[block, 0, START] = 1000
        return step()

    scheduler.add_request, llm.llm_engine.step = noted, spoiled


def _prompts(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests as vLLM's `generate` takes them."""
    from vllm_hybrid.frontend.details import DETAILS

    prompts = []
    for request in requests:
        images = [Image.open(file) for file, _ in request["images"]]
        uuids = {DETAILS: [level for _, level in request["images"]]}
        extra = {"multi_modal_data": {"image": images}, "multi_modal_uuids": uuids} if images else {}
        prompts.append({"prompt": request["prompt"], **extra})
    return prompts


def _kv_caches(runner: Any) -> list[torch.Tensor]:
    layers = runner.get_model().language_model.model.layers
    return [layer.self_attn.attn.kv_cache for layer in layers]


def answer(work: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers with log-probabilities, the name of the runner that gave them, and its steps.

    Of Triton's attention also the kernels that the start compiled, and those that requests still had to.
    """
    os.environ["VLLM_HYBRID_ATTENTION"] = work["attention"]
    with as_on_cuda() if work["attention"] == "triton" else nullcontext(Launches()) as launches:
        return _answer(work, launches)


def _answer(work: dict[str, Any], launches: Launches) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    steps = watch_steps() if work.get("watched") else []
    llm = LLM(
        work["checkpoint"],
        hf_overrides={"hybrid": work["hybrid"]},
        enforce_eager=True,
        dtype="float32",
        kv_cache_dtype=work.get("kv_cache_dtype", "auto"),
        max_model_len=600,
        # Not all requests fit into the first step, so that a later one prefills next to a decode.
        max_num_batched_tokens=600,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 26,
        limit_mm_per_prompt={"image": 3},
    )
    at_start = len(launches.seen)
    # Those of the start are no request's.
    steps.clear()
    if "spoiled" in work:
        spoil_a_page(llm, work["spoiled"])
    params = SamplingParams(temperature=0, max_tokens=work["tokens"], logprobs=3, ignore_eos=True)
    # What is asked later may find what is asked first in the prefix cache.
    rounds = [_prompts(work[name]) for name in ("requests", "later")]
    outputs = [output for asked in rounds for output in llm.generate(asked, params, use_tqdm=False)]
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return {
        "attention": work["attention"],
        "runner": type(runner).__module__,
        "kv_dtypes": sorted({str(cache.dtype) for cache in _kv_caches(runner)}),
        "steps": steps,
        "compiled_at_start": list(launches.seen)[:at_start],
        "compiled_later": launches.since(at_start),
        "answers": [
            {
                "tokens": list(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "logprobs": [{token: p.logprob for token, p in step.items()} for step in answer.logprobs],
                "found": output.num_cached_tokens,
            }
            for output in outputs
            for answer in output.outputs
        ],
    }


if __name__ == "__main__":
    pretend_cpu_backend()
    spare_repeated_work()
    for one in json.load(sys.stdin):
        print("ANSWERS " + json.dumps(answer(one)), flush=True)
