"""What workers tell a model of new pictures, and report beside tokens: live counts, and lost pages."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from tests.support.configurations import configure
from vllm_hybrid.engine.scheduler import FOREIGN_PAGES, LIVE_COUNTS
from vllm_hybrid.engine.worker import ForeignPages, ReportedOutput, StepReport, StepReports
from vllm_hybrid.frontend.picture_levels import LEVEL_NUMBER

IDS = ["first", "second", "third"]


def output() -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=IDS, req_id_to_index={name: i for i, name in enumerate(IDS)})


class Pending(AsyncModelRunnerOutput):
    """An output on its way, as vLLM 0.33 has it."""

    def __init__(self, arrives: ModelRunnerOutput) -> None:
        self.arrives = arrives

    def get_output(self) -> ModelRunnerOutput:
        return self.arrives

    def get_kv_connector_output(self) -> Any:
        return "the output's own"


@pytest.mark.parametrize(
    ("lower", "upper", "lost"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], []),
        ([0, 1, 0, 0], [0, 0, 0, 0], ["second"]),
        ([1, 0, 0, 0], [0, 0, 1, 0], ["first", "third"]),
        # What stands behind the step's requests is an earlier step's.
        ([0, 0, 0, 1], [0, 0, 0, 1], []),
    ],
)
def test_requests_that_lost_a_page_in_any_tier_are_named(
    lower: list[int], upper: list[int], lost: list[str]
) -> None:
    flags = torch.tensor([lower, upper], dtype=torch.bool)
    report = StepReport({}, ForeignPages(flags))
    # The next step writes its own flags before this one's are read.
    flags.logical_not_()
    assert getattr(report.attached(output()), FOREIGN_PAGES, []) == lost


def test_an_output_that_is_on_its_way_carries_its_report() -> None:
    arrives = output()
    flags = torch.tensor([[False, True, False]])
    pending = ReportedOutput(Pending(arrives), StepReport({"image": 7}, ForeignPages(flags)))
    got = pending.get_output()
    assert getattr(got, LIVE_COUNTS) == {"image": 7} and getattr(got, FOREIGN_PAGES) == ["second"]
    assert got.req_ids == IDS and not hasattr(arrives, LIVE_COUNTS)


def test_vllm_0_33_finds_the_connector_s_output() -> None:
    pending = ReportedOutput(Pending(output()), StepReport())
    assert pending.get_kv_connector_output() == "the output's own"


def test_the_shared_empty_output_stays_empty() -> None:
    flags = torch.tensor([[True]])
    report = StepReport({"image": 7}, ForeignPages(flags))
    assert getattr(report.attached(EMPTY_MODEL_RUNNER_OUTPUT), LIVE_COUNTS) == {"image": 7}
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, LIVE_COUNTS)


class Base:
    """A worker of vLLM's: its answers, in order, to the calls of a step."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def execute_model(self, scheduler_output: Any) -> Any:
        return self.answers.pop(0)

    def sample_tokens(self, *args: Any) -> Any:
        return self.answers.pop(0)


class Worker(StepReports, Base):
    """The mixin over it, with a model whose second request lost a page."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(*answers)
        flags = torch.tensor([[False, True, False]])
        self.model_runner = runner(foreign_pages=lambda: flags)


LEVELS = {"levels": {"low": {"fastv_ratio": 0.9}, "high": {"fastv_ratio": 0.5}}, "default_level": "high"}


def runner(**model: Any) -> Any:
    """A model runner of a model with levels."""
    config = configure(LEVELS)
    return SimpleNamespace(vllm_config=config, get_model=lambda: SimpleNamespace(**model))


def step(tokens: int = 3, copies: list[tuple[int, int]] | None = None, new: Sequence[Any] = ()) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_encoder_inputs={},
        total_num_scheduled_tokens=tokens,
        kv_cache_block_copies=copies,
    )


def test_a_report_goes_with_the_sampled_tokens() -> None:
    worker = Worker(None, Pending(output()), output())
    assert worker.execute_model(step()) is None
    assert getattr(worker.sample_tokens(None).get_output(), FOREIGN_PAGES) == ["second"]
    # And with no other output.
    assert not hasattr(worker.sample_tokens(None), FOREIGN_PAGES)


def test_a_runner_that_answers_at_once_reports_at_once() -> None:
    worker = Worker(output())
    assert getattr(worker.execute_model(step()), FOREIGN_PAGES) == ["second"]


def test_page_facts_are_copied_with_their_blocks() -> None:
    worker, copied = Worker(output()), list[tuple[int, int]]()
    worker.model_runner = runner(foreign_pages=lambda: None, copy_page_facts=copied.extend)
    worker.execute_model(step(copies=[(3, 5), (4, 6)]))
    assert copied == [(3, 5), (4, 6)]


def picture(identifier: str, **data: Any) -> MultiModalFeatureSpec:
    field = MultiModalBatchedField()
    elements = {name: MultiModalFieldElem(data=value, field=field) for name, value in data.items()}
    item = MultiModalKwargsItem(elements) if elements else None
    return MultiModalFeatureSpec(item, "image", identifier, PlaceholderRange(0, 576))


def test_the_model_is_told_the_levels_of_new_requests_pictures() -> None:
    worker = Worker(output())
    pixels = torch.zeros(3, 2, 2)
    features = [picture(f"a cat{end}", pixel_values=pixels) for end in ("@full", "@low", "", "@high")]
    kept_here = picture("a dog@low")
    requests = [SimpleNamespace(mm_features=part) for part in (features[:1], [], [*features[1:], kept_here])]
    worker.execute_model(step(new=requests))
    told = [feature.data[LEVEL_NUMBER].data for feature in features if feature.data is not None]
    assert told == [2, 0, 1, 1]
    assert kept_here.data is None


def test_a_step_without_tokens_has_nobody_s_flags() -> None:
    worker = Worker(EMPTY_MODEL_RUNNER_OUTPUT)
    assert worker.execute_model(step(tokens=0)) is EMPTY_MODEL_RUNNER_OUTPUT
