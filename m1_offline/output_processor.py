"""After the sampler: record the token, turn it into text, decide whether the sequence is finished."""
from __future__ import annotations

from dataclasses import replace

from m0_basics.engine import append_token, check_stop
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.outputs import RequestOutput
from m0_basics.request import Logprob, Request, Sequence, SequenceStatus
from m0_basics.sampling_params import SamplingParams

from .detokenizer import IncrementalDetokenizer, StopAutomaton, StopChecker
from .logits_processing import KeptFor


class _TextState:
    """Detokenizer and stop strings of one sequence; `text` is all its characters, safe to show or not."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, stop: StopAutomaton) -> None:
        params = sequence.sampling_params
        self.detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens,
                                                  sequence.data.prompt_token_ids)
        self.stop = StopChecker(stop, params.include_stop_str_in_output)
        self.text = ""
        self.num_read = 0               # output tokens that are in the text


class OutputProcessor:
    """Owns the text of every running sequence."""

    def __init__(self, tokenizer: Tokenizer | None, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._states: dict[int, _TextState] = {}
        self._automata = KeptFor[SamplingParams, StopAutomaton](lambda params: StopAutomaton(params.stop or []))

    def prepare(self, params: SamplingParams) -> None:
        """Build what finds the stop strings of requests with these parameters, and keep it as long as they live.

        For long lists that takes a while. What is not built ahead is built with the first token.
        """
        self._automata(params)

    def process(self, sequence: Sequence, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Append a sampled token. Sets the sequence's text, and its status where the token ends it."""
        self.record(sequence, token_id, logprobs)
        self.conclude(sequence)

    def record(self, sequence: Sequence, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """The first half of `process`: append the token, and note in `ends_as` whether it is the last one.

        That is all the next step needs. Several tokens may be recorded before they are concluded, up to one that ends
        the sequence.
        """
        assert sequence.ends_as is None, "the sequence has its last token"
        append_token(sequence, token_id, self._with_text(logprobs, sequence))
        sequence.ends_as = check_stop(sequence, self.max_model_len)

    def conclude(self, sequence: Sequence, text_is_read: bool = True) -> None:
        """The second half: what the newest tokens add to the text. A sequence that ends takes on its final state.

        A stop string may end it before its newest token: the tokens behind it are forgotten. Where nobody reads the
        text before the sequence ends, and no stop string may end it, it is written then.
        """
        if sequence.ends_as is not None or text_is_read or sequence.sampling_params.stop:
            self._update_text(sequence)
        if sequence.ends_as is not None:
            sequence.set_status(sequence.ends_as)
            self._states.pop(sequence.seq_id, None)

    def close(self, sequence: Sequence) -> None:
        """Nothing comes after. Of a sequence that was aborted the text is written, as far as it got."""
        try:
            if sequence.status is SequenceStatus.FINISHED_ABORTED and sequence.output_token_ids:
                reason, sequence.ends_as = sequence.stop_reason, None
                self._update_text(sequence)
                sequence.stop_reason = reason           # a stop string in its last token did not end it
        finally:
            self._states.pop(sequence.seq_id, None)

    def make_output(self, request: Request) -> RequestOutput:
        """A snapshot of the request. The log-probabilities of its prompt get their text here, each one once."""
        if self.tokenizer is not None:
            _decode_newest(request.sequences[0].prompt_logprobs, self.tokenizer)
        return RequestOutput.from_request(request)

    def _update_text(self, sequence: Sequence) -> None:
        """Bring the text up to the newest token, or to the end of a stop string, which then ends the sequence."""
        params = sequence.sampling_params
        if self.tokenizer is None or not params.detokenize:
            return
        state = self._states.get(sequence.seq_id)
        if state is None:
            state = self._states[sequence.seq_id] = _TextState(sequence, self.tokenizer, self._automata(params))
        for token_id in sequence.output_token_ids[state.num_read:]:
            state.num_read += 1
            ends_as = sequence.ends_as if state.num_read == len(sequence.output_token_ids) else None
            if ends_as is not SequenceStatus.FINISHED_STOPPED or params.include_stop_str_in_output:
                state.text += state.detokenizer.push(token_id)      # else a stop token, which is no part of the text
            if ends_as is not None:
                state.text += state.detokenizer.flush()
            if params.stop and self._stops(sequence, state):
                return
        sequence.output_text = (state.text if sequence.ends_as is not None
                                else state.text[:state.stop.safe_length(state.text)])

    @staticmethod
    def _stops(sequence: Sequence, state: _TextState) -> bool:
        """Whether the token that was read last completes a stop string. The sequence then ends there, cut to it."""
        if state.num_read <= sequence.sampling_params.min_tokens:
            # As with stop tokens: none of the first `min_tokens` tokens ends the output.
            state.stop.skip(state.text)
            return False
        if (found := state.stop.find(state.text)) is None:
            return False
        sequence.truncate(state.num_read)
        sequence.stop_reason, length = found
        sequence.output_text = state.text[:length]
        sequence.ends_as = SequenceStatus.FINISHED_STOPPED
        return True

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
    return {i: replace(entry, decoded_token=tokenizer.token_text(i))
            for i, entry in logprobs.items()}
