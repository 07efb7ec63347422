"""F0.7, F0.11: when a sequence ends. One token at a time, each rule and each pair of rules that meet, by hand."""
from __future__ import annotations

from typing import Any

import pytest

from m0_basics import SamplingParams, Sequence, SequenceData, SequenceStatus
from m0_basics.engine import check_stop

EOS, OTHER_EOS, STOP, PLAIN = 2, 3, 7, 9
STOPPED, CAPPED = SequenceStatus.FINISHED_STOPPED, SequenceStatus.FINISHED_LENGTH_CAPPED


@pytest.mark.parametrize(("settings", "outputs", "expected"), [
    ({}, [PLAIN, PLAIN], (None, None)),
    ({}, [PLAIN, EOS], (STOPPED, None)),
    ({}, [OTHER_EOS], (STOPPED, None)),                             # a model may have several
    ({}, [EOS, PLAIN], (None, None)),                               # only the newest token counts
    ({}, [PLAIN, STOP], (STOPPED, STOP)),
    ({"ignore_eos": True}, [EOS], (None, None)),
    ({"ignore_eos": True}, [STOP], (STOPPED, STOP)),
    ({"ignore_eos": True, "stop_token_ids": [EOS]}, [EOS], (STOPPED, EOS)),     # asked for by its number
    ({"stop_token_ids": [EOS]}, [EOS], (STOPPED, None)),            # the model's own end comes first
    ({"min_tokens": 2}, [EOS], (None, None)),
    ({"min_tokens": 2}, [STOP], (None, None)),
    ({"min_tokens": 2}, [PLAIN, EOS], (STOPPED, None)),             # the token that makes the number full may end it
    ({"max_tokens": 3}, [PLAIN] * 2, (None, None)),
    ({"max_tokens": 3}, [PLAIN] * 3, (CAPPED, None)),
    ({"max_tokens": 3}, [PLAIN, PLAIN, EOS], (STOPPED, None)),      # "stop" says more than "length"
    ({"max_tokens": None}, [PLAIN] * 5, (None, None)),
    ({"max_tokens": None}, [PLAIN] * 6, (CAPPED, None)),            # prompt and output fill max_model_len
    ({"max_tokens": None}, [PLAIN] * 5 + [STOP], (STOPPED, STOP)),
])
def test_when_a_sequence_ends(settings: dict[str, Any], outputs: list[int],
                              expected: tuple[SequenceStatus | None, int | None]) -> None:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 100, "stop_token_ids": [STOP], **settings})
    sequence = Sequence(0, SequenceData([EOS, STOP, PLAIN, PLAIN], outputs), params, 0, (EOS, OTHER_EOS))
    status = check_stop(sequence, max_model_len=10)
    assert (status, sequence.stop_reason) == expected
