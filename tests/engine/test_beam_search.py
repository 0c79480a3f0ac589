"""Beam search: what is dropped of an image is the prompt's choice, whatever a beam has chosen since."""

from __future__ import annotations

import pytest
from vllm.sampling_params import BeamSearchParams

from tests.support.engines import TOLERANCE, Ask, Served, hybrid_section, images, serve


def search(served: Served, ask: Ask, width: int, tokens: int) -> list[tuple[list[int], list[float]]]:
    """The beams of a prompt: each one's tokens and their log-probabilities."""
    params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
    (found,) = served.llm.beam_search([ask.request()], params)
    length = len(served.reference.prompt_ids(ask.text))
    beams = [(beam.tokens[length:], beam.logprobs) for beam in found.sequences]
    return [
        (chosen, [step[token].logprob for token, step in zip(chosen, steps, strict=True)])
        for chosen, steps in beams
    ]


@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_every_beam_scores_as_the_reference_scores_its_tokens(mode: str) -> None:
    served = serve(hybrid_section(mode))
    for ask in (served.decided(images(8)[0]), served.decided(images(8)[1], images(8)[2])):
        ids = served.reference.prompt_ids(ask.text)
        beams = search(served, ask, width=2, tokens=4)
        assert len(beams) == 2 and beams[0][0] != beams[1][0]
        for chosen, scored in beams:
            rows = served.reference.score(ids, ask.images, chosen).distributions
            for row, token, logprob in zip(rows, chosen, scored, strict=True):
                assert abs(logprob - float(row[token])) <= TOLERANCE


@pytest.mark.parametrize("mode", ["dymu", "both"])
def test_one_beam_is_the_greedy_answer(mode: str) -> None:
    served = serve(hybrid_section(mode))
    asks = [served.decided(image) for image in images(8)[3:6]] + [Ask("Only text.")]
    greedy = [list(answer.outputs[0].token_ids) for answer in served.generate(asks, 5)]
    assert [search(served, ask, width=1, tokens=5)[0][0] for ask in asks] == greedy
