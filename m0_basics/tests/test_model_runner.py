"""The model runner: which rows of a step get logits."""
from __future__ import annotations

import pytest
import torch

from m0_basics import SamplingParams, Sequence, SequenceData
from m0_basics.attention import FullAttention, ScheduledSequence
from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.fixtures import TinyModels


@pytest.mark.parametrize("computed, rows", [((3, 5, 2), [0, 1, 2]), ((3, 4, 2), [0, 2]), ((2, 4, 1), [])])
def test_logits_of_sequences_whose_newest_token_was_reached(tiny_model: TinyModels, computed: tuple[int, ...],
                                                            rows: list[int]) -> None:
    """F0.10: a chunk that ends before the newest token brings no row; a step of such chunks alone brings none."""
    model = load_model(ModelConfig(model=str(tiny_model("llama")), dtype="float32"))
    runner = ModelRunner(model, FullAttention())
    prompts = [[20, 21, 22], [23, 24, 25, 26, 27], [28, 29]]
    scheduled = [ScheduledSequence(Sequence(i, SequenceData(ids), SamplingParams(temperature=0), 0), 0, n)
                 for i, (ids, n) in enumerate(zip(prompts, computed, strict=True))]
    logits = runner.execute_model(scheduled)
    assert logits.shape == (len(rows), model.spec.vocab_size)
    for row, i in zip(logits, rows, strict=True):
        alone = runner.execute_model([scheduled[i]])
        torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-4)


def test_drafted_tokens_have_rows_of_their_own(tiny_model: TinyModels) -> None:
    """Behind the newest token and each drafted one: the logits of the sequence with the guesses so far."""
    model = load_model(ModelConfig(model=str(tiny_model("llama")), dtype="float32"))
    runner = ModelRunner(model, FullAttention())
    prompt, drafts = [20, 21], (30, 31)
    sequence = Sequence(0, SequenceData(prompt), SamplingParams(temperature=0), 0)
    sequence.append_token_id(22)
    other = Sequence(1, SequenceData([40, 41]), SamplingParams(temperature=0), 0)
    inputs = runner.prepare_inputs([ScheduledSequence(sequence, 0, 5, drafts), ScheduledSequence.rest(other)])
    assert inputs.input_ids.tolist() == [*prompt, 22, *drafts, 40, 41]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert inputs.logit_rows.tolist() == [2, 3, 4, 6]
    assert [s.output_token_ids for s in inputs.sampled] == [[22], [22, 30], [22, 30, 31], []]
    assert (inputs.sampled[0], inputs.sampled[3]) == (sequence, other)
    assert sequence.output_token_ids == [22], "the guesses are not the sequence's"
    logits = runner.execute(inputs)
    for row, length in enumerate((3, 4, 5)):
        known = Sequence(2, SequenceData([*prompt, 22, *drafts][:length]), SamplingParams(temperature=0), 0)
        alone = runner.execute_model([ScheduledSequence.rest(known)])
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-4)
