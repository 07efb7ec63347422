"""After the sampler: record the token, turn it into text, decide whether the sequence is finished."""
from __future__ import annotations

from dataclasses import replace

from m0_basics.engine import append_token, check_stop
from m0_basics.outputs import Logprob, RequestOutput
from m0_basics.request import Request, Sequence, SequenceStatus
from m0_basics.tokenizer import Tokenizer

from .detokenizer import IncrementalDetokenizer, StopChecker


class _TextState:
    """Detokenizer and stop strings of one sequence; `text` is all its characters, safe to show or not."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        params = sequence.sampling_params
        assert isinstance(params.stop, list)
        self.detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self.stop = StopChecker(params.stop, params.include_stop_str_in_output)
        self.text = ""


class OutputProcessor:
    """Owns the text of every running sequence."""

    def __init__(self, tokenizer: Tokenizer | None, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._states: dict[int, _TextState] = {}

    def process(self, sequence: Sequence, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Append a sampled token. Sets the sequence's text, and its status where the token ends it."""
        self.record(sequence, token_id, logprobs)
        self.conclude(sequence)

    def record(self, sequence: Sequence, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """The first half of `process`: append the token, which is all that the next step needs."""
        append_token(sequence, token_id, self._with_text(logprobs, sequence))

    def conclude(self, sequence: Sequence) -> None:
        """The second half: what the newest token adds to the text, and whether it ends the sequence."""
        token_id = sequence.output_token_ids[-1]
        status = check_stop(sequence, self.max_model_len)
        if self.tokenizer is not None and sequence.sampling_params.detokenize:
            status = self._update_text(sequence, token_id, status, self.tokenizer)
        if status is not None:
            sequence.set_status(status)
            self.forget(sequence)

    def make_output(self, request: Request) -> RequestOutput:
        """A snapshot of the request. The log-probabilities of its prompt get their text here, each one once."""
        if self.tokenizer is not None:
            _decode_newest(request.sequences[0].prompt_logprobs, self.tokenizer)
        return RequestOutput.from_request(request)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._states.pop(sequence.seq_id, None)

    def _update_text(self, sequence: Sequence, token_id: int, status: SequenceStatus | None,
                     tokenizer: Tokenizer) -> SequenceStatus | None:
        params = sequence.sampling_params
        state = self._states.get(sequence.seq_id)
        if state is None:
            state = self._states[sequence.seq_id] = _TextState(sequence, tokenizer)
        ended_by_token = status is SequenceStatus.FINISHED_STOPPED
        if not ended_by_token or params.include_stop_str_in_output:
            state.text += state.detokenizer.push(token_id)
        if status is not None:
            state.text += state.detokenizer.flush()
        if params.stop:
            if len(sequence.output_token_ids) <= params.min_tokens:
                # As with stop tokens: none of the first `min_tokens` tokens ends the output.
                state.stop.skip(state.text)
            elif found := state.stop.find(state.text):
                sequence.stop_reason, length = found
                sequence.output_text = state.text[:length]
                return SequenceStatus.FINISHED_STOPPED
        sequence.output_text = state.text if status else state.text[:state.stop.safe_length(state.text)]
        return status

    def _with_text(self, logprobs: dict[int, Logprob] | None, sequence: Sequence) -> dict[int, Logprob] | None:
        if logprobs is None or self.tokenizer is None or sequence.sampling_params.logprobs is None:
            return logprobs
        return decode_logprobs(logprobs, self.tokenizer)


def _decode_newest(entries: list[dict[int, Logprob] | None], tokenizer: Tokenizer) -> None:
    """Fill in `decoded_token` where it is missing. Entries are appended, so those that have none are the last ones."""
    for i in range(len(entries) - 1, -1, -1):
        entry = entries[i]
        if entry is None or next(iter(entry.values())).decoded_token is not None:
            break
        entries[i] = decode_logprobs(entry, tokenizer)


def decode_logprobs(logprobs: dict[int, Logprob], tokenizer: Tokenizer) -> dict[int, Logprob]:
    """Fill in `decoded_token`."""
    return {i: replace(entry, decoded_token=tokenizer.decode([i], skip_special_tokens=False))
            for i, entry in logprobs.items()}
