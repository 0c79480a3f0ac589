"""The V2 model runner, through Triton's interpreter, gives the reference's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.fresh_process import answers_of
from tests.support.kernel_builds import launched_kernels
from tests.support.reference import AtLevel, Reference
from tests.support.tiny_checkpoints import (
    conversation,
    decided_images,
    make_images,
    pick_thresholds,
    prompt,
    write_checkpoint,
)

pytestmark = pytest.mark.engine
TOKENS = 5
# Of a quarter of LLaVA-1.5's patches, since Triton's interpreter is slow.
IMAGE_SIZE = 168
# Requests with a text alone and with a full picture, in which no choice depends on rounding.
FP8 = (2, 4)
# The request that loses a page, behind those whose answers are compared.
LOST = 5


# The number of a picture, and its level.
Shown = tuple[int, str]


@dataclass
class Cases:
    """Requests for a tiny checkpoint, some of them asked later, and the reference that knows the answers."""

    reference: Reference
    pictures: list[Image.Image]
    prompts: list[tuple[list[Shown], str]]
    later: list[tuple[list[Shown], str]]
    work: dict[str, Any]

    def images(self, shown: list[Shown]) -> list[AtLevel]:
        """As the reference takes them."""
        return [AtLevel(self.pictures[number], level) for number, level in shown]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("v2")
    # Small for the same reason; two query heads still share one key head.
    checkpoint = write_checkpoint(
        folder / "checkpoint", seed=3, layers=4, heads=2, kv_heads=1, image_size=IMAGE_SIZE
    )
    thresholds = pick_thresholds(checkpoint, list(make_images().values()), [0.5, 0.5, 0.5])
    header = Reference(checkpoint, {}).tokenizer("ASSISTANT:")["input_ids"][1:]
    hybrid = {
        "levels": {
            "low": {"thresholds": thresholds, "fastv_ratio": 0.5},
            "mid": {"thresholds": thresholds},
        },
        "default_level": "low",
        # Blocks of 48 and 16 tokens, so that a shared prefix may end inside a block.
        "fastv_layer": 1,
        # A prompt of one turn ends in the header, so this is the prompt's last position there.
        "fastv_rank": "turn_end",
        "assistant_header": header,
    }
    reference = Reference(checkpoint, hybrid)
    pictures = decided_images(reference, 3)
    files = []
    for number, picture in enumerate(pictures):
        files.append(str(folder / f"{number}.png"))
        picture.save(files[-1])
    shown = [(2, "low"), (0, "low")]
    prompts: list[tuple[list[Shown], str]] = [
        ([(0, "low")], prompt("What is here?")),
        # One picture at two levels.
        ([(1, "low"), (1, "mid")], prompt("Compare them.", 2)),
        ([], prompt("Hello there.", 0)),
        (shown, _two_turns(reference, [pictures[2], pictures[0]])),
        ([(0, "full")], prompt("What is here?")),
    ]
    later = [
        # The next turn, and a prompt again.
        (shown, prompts[3][1] + " No.</s>" + prompt("Are you sure?", 0)),
        prompts[1],
    ]
    asked = {
        name: [
            {"prompt": text, "images": [(files[i], level) for i, level in images]}
            for images, text in requests
        ]
        for name, requests in (("requests", prompts), ("later", later))
    }
    work = {
        "checkpoint": str(checkpoint),
        "hybrid": hybrid,
        "tokens": TOKENS,
        **asked,
    }
    return Cases(reference, pictures, prompts, later, work)


def _two_turns(reference: Reference, images: list[Image.Image]) -> str:
    """A conversation with an image in each turn, whose prunes are no matter of rounding."""
    for answer in ("Yes.", "No, it is not.", "It is red.", "Three.", "Nobody knows."):
        text = conversation([(1, "What is here?"), (1, "And here?")], answer)
        if min(choice.margin for choice in reference.choices(reference.prompt_ids(text), images)) > 3e-4:
            return text
    raise RuntimeError("no answer decides the prunes of these images; use others")


@pytest.fixture(scope="module")
def answers(cases: Cases) -> dict[str, dict[str, Any]]:
    """Answers of each implementation of attention; of the Triton kernels also steps and a lost request."""
    lost = {"prompt": prompt("Are you there?", 0), "images": []}
    requests = [*cases.work["requests"], lost]
    # Last, since what watches steps stays in the process.
    watched: dict[str, Any] = {"attention": "triton", "watched": True, "requests": requests, "spoiled": LOST}
    fp8: dict[str, Any] = {
        "attention": "triton",
        "kv_cache_dtype": "fp8",
        "requests": [cases.work["requests"][number] for number in FP8],
        "later": [],
    }
    alone: list[dict[str, Any]] = [{"attention": "cpu"}, {"attention": "reference"}]
    works = [cases.work | one for one in (*alone, fp8, watched)]
    found = answers_of("tests.support.v2_answers", "ANSWERS ", works)
    return dict(zip(("cpu", "reference", "fp8", "triton"), found, strict=True))


@pytest.fixture(scope="module")
def interpreted(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Answers and steps of the Triton kernels."""
    return answers["triton"]


@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_v2_runner_answers_like_the_reference(
    cases: Cases, answers: dict[str, dict[str, Any]], attention: str
) -> None:
    _check_answers(cases, answers[attention])


def test_triton_kernels_in_the_v2_runner_answer_like_the_reference(
    cases: Cases, interpreted: dict[str, Any]
) -> None:
    answers = interpreted["answers"]
    _check_answers(cases, interpreted | {"answers": answers[:LOST] + answers[LOST + 1 :]})


def test_a_kv_cache_in_fp8_answers_like_a_reference_that_rounds_keys_and_values(
    cases: Cases, answers: dict[str, dict[str, Any]]
) -> None:
    """A number near a tie may become another one where float32 differs in its last bit."""
    result = answers["fp8"]
    assert result["kv_dtypes"] == ["torch.uint8"]
    rounding = Reference(cases.work["checkpoint"], cases.work["hybrid"], kv_dtype=torch.float8_e4m3fn)
    off: dict[Reference, list[float]] = {rounding: [], cases.reference: []}
    for number, answer in zip(FP8, result["answers"], strict=True):
        images, text = cases.prompts[number]
        for reference, found in off.items():
            score = reference.score(reference.prompt_ids(text), cases.images(images), answer["tokens"])
            for step, logprobs in enumerate(answer["logprobs"]):
                found += [abs(p - float(score.distributions[step, int(t)])) for t, p in logprobs.items()]
    assert max(off[rounding]) < 0.01 < max(off[cases.reference])


def test_a_request_whose_page_is_another_s_ends_with_an_error_and_alone(interpreted: dict[str, Any]) -> None:
    """On a device nothing raises; the others' answers are compared with the reference above."""
    others = interpreted["answers"][:LOST]
    lost = interpreted["answers"][LOST]
    assert lost["finish_reason"] == "error" and 2 <= len(lost["tokens"]) < TOKENS
    assert [answer["finish_reason"] for answer in others] == ["length"] * LOST


def _check_answers(cases: Cases, result: dict[str, Any]) -> None:
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    for (images, text), answer in zip(cases.prompts + cases.later, result["answers"], strict=True):
        ids = cases.reference.prompt_ids(text)
        score = cases.reference.score(ids, cases.images(images), answer["tokens"])
        assert score.distributions.argmax(-1).tolist() == answer["tokens"]
        for step, logprobs in enumerate(answer["logprobs"]):
            for token, logprob in logprobs.items():
                assert abs(logprob - float(score.distributions[step, int(token)])) <= 1e-3


@pytest.mark.parametrize("attention", ["cpu", "triton"])
def test_later_prompts_find_their_images_in_the_prefix_cache(
    cases: Cases, answers: dict[str, dict[str, Any]], attention: str
) -> None:
    """With answers that are compared with the reference above."""
    later = answers[attention]["answers"][-len(cases.later) :]
    found = [answer["found"] for answer in later]
    assert all(
        n > len(images) * cases.reference.patches for (images, _), n in zip(cases.later, found, strict=True)
    )
    assert any(n % 48 for n in found)


@pytest.mark.parametrize("attention", ["triton", "fp8"])
def test_no_request_waits_for_a_compiler(answers: dict[str, dict[str, Any]], attention: str) -> None:
    """Pictures of all levels, text, prompts beside decodes, cached prefixes: all was launched before."""
    found = answers[attention]
    assert {variant.split(" ")[0] for variant in found["compiled_at_start"]} == launched_kernels()
    assert found["compiled_later"] == []


def test_the_host_waits_once_per_step_with_images_and_never_in_a_decode(interpreted: dict[str, Any]) -> None:
    steps = interpreted["steps"]
    decodes = [step for step in steps if step["rows"] == step["requests"]]
    encodes = [step for step in steps if step["images"]]
    assert decodes and encodes
    for step in decodes:
        assert step["images"] == 0
        assert step["waits"] == step["waits_embedding"] == step["waits_encoding"] == []
    for step in encodes:
        assert step["waits"] == [] and step["waits_embedding"] == ["Tensor.tolist"]


def test_the_tower_waits_once_per_batch(interpreted: dict[str, Any]) -> None:
    """However many layers merge."""
    encodes = [step["waits_encoding"] for step in interpreted["steps"] if step["waits_encoding"]]
    assert encodes
    for waits in encodes:
        assert waits == ["Tensor.tolist"]


def test_decodes_of_one_size_issue_the_same_operations(interpreted: dict[str, Any]) -> None:
    steps = interpreted["steps"]
    by_size: dict[int, list[list[str]]] = {}
    for step in steps:
        if step["rows"] == step["requests"]:
            by_size.setdefault(step["rows"], []).append(step["operations"])
    repeated = [traces for traces in by_size.values() if len(traces) > 1]
    assert repeated
    for traces in repeated:
        for trace in traces:
            assert trace == traces[0]
