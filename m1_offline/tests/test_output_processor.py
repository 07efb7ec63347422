"""F1.5, F1.6: from tokens to text, and where the text ends; one token at a time or several."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.request import Logprob, Request, Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.tiny_models import BOS, EOS, byte_level_tokenizer
from m1_offline.output_processor import OutputProcessor
from m1_offline.tests.test_detokenizer import (
    EXAMPLES,
    REPLACEMENT,
    TEXTS,
    byte_ids,
    byte_level,
    first_match,
)


class TestOutputProcessor:
    """F1.5, F1.6: detokenizer and stop strings together, as the engine uses them."""

    @EXAMPLES
    @given(text=TEXTS, stops=st.lists(st.sampled_from(["中", "a", "in", " the", "😀", "é\n", "文，", "\u200d"]),
                                      max_size=3), include=st.booleans(),
           min_tokens=st.integers(0, 12))
    def test_text_tokens_and_reason(self, text: str, stops: list[str], include: bool, min_tokens: int) -> None:
        ids = byte_ids(text.encode()) or byte_ids(b"x")
        text = text or "x"
        params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min(min_tokens, len(ids)),
                                max_tokens=len(ids))
        sequence, processor = running(params), OutputProcessor(byte_level(), 1000)
        shown = ""
        for i in ids:
            processor.process(sequence, i, None)
            assert sequence.output_text.startswith(shown), "text was taken back"
            shown = sequence.output_text
            if sequence.is_finished:
                break
        # Characters that are complete after min_tokens tokens cannot end the output.
        free = len(text.encode()[:params.min_tokens].decode("utf-8", errors="ignore"))
        expected = first_match(text, stops, free)
        if expected is None:
            assert (shown, sequence.status) == (text, SequenceStatus.FINISHED_LENGTH_CAPPED)
            assert sequence.stop_reason is None
        else:
            end, start, stop = expected
            assert (shown, sequence.status) == (text[:end if include else start], SequenceStatus.FINISHED_STOPPED)
            assert (sequence.stop_reason, len(sequence.output_token_ids)) == (stop, len(text[:end].encode()))

    @pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 3), (2, 3), (3, 7), (6, 7), (7, 8)])
    def test_min_tokens(self, min_tokens: int, num_tokens: int) -> None:
        """None of the first `min_tokens` tokens ends the output, as in vLLM: not even one that completes a match."""
        params = SamplingParams(stop=["z"], min_tokens=min_tokens, max_tokens=8)
        sequence, processor = running(params), OutputProcessor(byte_level(), 1000)
        for i in byte_ids(b"xyzxyyzx"):
            if not sequence.is_finished:
                processor.process(sequence, i, None)
        assert len(sequence.output_token_ids) == num_tokens
        assert sequence.output_text == "xyzxyyzx"[:num_tokens - (num_tokens < 8)]

    def test_the_token_that_ends_the_output_has_no_text_unless_it_is_asked_for(self) -> None:
        tokenizer = byte_level()
        eos = tokenizer.encode(EOS)[0]
        for include, skip, text in ((False, False, "a"), (True, False, "a" + EOS), (True, True, "a")):
            params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip)
            sequence, processor = running(params, eos), OutputProcessor(tokenizer, 1000)
            for i in (*byte_ids(b"a"), eos):
                processor.process(sequence, i, None)
            assert (sequence.output_text, sequence.status) == (text, SequenceStatus.FINISHED_STOPPED)

    def test_a_broken_character_at_the_end_is_shown_as_one(self) -> None:
        sequence, processor = running(SamplingParams(max_tokens=3)), OutputProcessor(byte_level(), 1000)
        for i in byte_ids("a中".encode()[:3]):
            processor.process(sequence, i, None)
        assert sequence.output_text == "a" + REPLACEMENT

    def test_no_text_without_detokenize(self) -> None:
        sequence, processor = running(SamplingParams(detokenize=False, max_tokens=1)), OutputProcessor(byte_level(), 9)
        processor.process(sequence, 3, None)
        assert (sequence.output_text, sequence.is_finished) == ("", True)

    def test_nothing_is_kept_of_a_finished_sequence(self) -> None:
        sequence, processor = running(SamplingParams(max_tokens=2)), OutputProcessor(byte_level(), 1000)
        for kept in (1, 0):
            processor.process(sequence, 3, None)
            assert len(processor._states) == kept

    def test_the_log_probabilities_of_a_prompt_are_turned_into_text_once(self) -> None:
        """However often a request reports; also where a prompt is run in pieces, or run again."""
        tokenizer = CountingTokenizer(byte_level_tokenizer(), {})
        processor = OutputProcessor(tokenizer, 1000)
        prompt = byte_ids(b"the one")
        entries = [None, *({i: Logprob(-1.0, 2), 5: Logprob(-0.5, 1)} for i in prompt[1:])]
        request = Request("r", None, prompt, SamplingParams(prompt_logprobs=1, max_tokens=99), stream=True)
        [sequence] = request.sequences
        sequence.set_status(SequenceStatus.RUNNING)
        sequence.prompt_logprobs += entries[:3]
        five = tokenizer.decode([5], skip_special_tokens=False)
        assert [e and e[5].decoded_token for e in made(processor, request)] == [None, five, five]
        sequence.prompt_logprobs += entries[3:]
        early = made(processor, request)
        tokenizer.num_calls = 0
        for _ in range(5):
            processor.process(sequence, 3, None)
            during = tokenizer.num_calls
            assert made(processor, request) == early
            assert tokenizer.num_calls == during, "nothing is left to be decoded"
        assert [None, *("".join(e[i].decoded_token for i in e if i != 5) for e in early[1:])] == [None, *"he one"]

    @pytest.mark.parametrize("ending", ["length", "stop token", "abort"])
    @pytest.mark.parametrize("stop", [[], ["zz"]])
    def test_text_is_written_when_it_is_read(self, ending: str, stop: list[str]) -> None:
        """Nobody reads it: nothing is decoded until the end, unless a stop string may come. The text is the same."""
        tokens = byte_ids("größer als zuvor".encode())
        params = SamplingParams(max_tokens=len(tokens), stop=stop, stop_token_ids=tokens[-1:], min_tokens=len(tokens))
        if ending != "stop token":
            params = SamplingParams(max_tokens=len(tokens) + (ending == "abort"), stop=stop)
        texts = []
        for text_is_read in (False, True):
            processor = OutputProcessor(byte_level(), 1000)
            sequence = running(params)
            for token_id in tokens:
                processor.record(sequence, token_id, None)
                processor.conclude(sequence, text_is_read)
                if not (text_is_read or stop or sequence.is_finished):
                    assert sequence.output_text == ""
            if ending == "abort":
                sequence.set_status(SequenceStatus.FINISHED_ABORTED)
            processor.close(sequence)
            texts.append(sequence.output_text)
        assert texts[0] == texts[1] == ("größer als zuvo" if ending == "stop token" else "größer als zuvor"), texts

    @given(text=st.text("abc é", min_size=1, max_size=24), stop=st.sampled_from([[], ["b"], ["ca", "bb"], ["é"]]),
           min_tokens=st.integers(0, 6), sizes=st.lists(st.integers(1, 5), min_size=24, max_size=24))
    def test_several_tokens_at_once(self, text: str, stop: list[str], min_tokens: int, sizes: list[int]) -> None:
        """A step may give several tokens: text, tokens, log-probabilities and reason are those of one at a time."""
        tokens = byte_ids(text.encode())
        params = SamplingParams(max_tokens=len(tokens), stop=stop, min_tokens=min(min_tokens, len(tokens)), logprobs=1,
                                stop_token_ids=byte_ids(b"c"))
        ends = []
        for step_sizes in ([1] * len(tokens), sizes):
            processor, sequence, left = OutputProcessor(byte_level(), 1000), running(params), tokens.copy()
            for size in step_sizes:
                for token_id in left[:size]:
                    if sequence.ends_as is None:
                        processor.record(sequence, token_id, {token_id: Logprob(-1 / (1 + token_id), 1)})
                del left[:size]
                processor.conclude(sequence)
                if sequence.is_finished:
                    break
            ends.append((sequence.output_text, sequence.output_token_ids, sequence.status, sequence.stop_reason,
                         sequence.cumulative_logprob, [list(entry) for entry in sequence.logprobs]))
        assert ends[0] == ends[1]
        assert ends[0][2].is_finished

    def test_nothing_is_recorded_behind_the_end(self) -> None:
        processor, sequence = OutputProcessor(byte_level(), 1000), running(SamplingParams(max_tokens=1))
        processor.record(sequence, 3, None)
        assert (sequence.ends_as, sequence.status) == (SequenceStatus.FINISHED_LENGTH_CAPPED, SequenceStatus.RUNNING)
        with pytest.raises(AssertionError, match="has its last token"):
            processor.record(sequence, 3, None)

    def test_an_abort_keeps_its_reason(self) -> None:
        """A stop string in a token that was recorded, and not looked at, cuts the text and explains nothing."""
        processor, sequence = OutputProcessor(byte_level(), 1000), running(SamplingParams(max_tokens=9, stop=["c"]))
        for token_id in byte_ids(b"abc"):
            processor.record(sequence, token_id, None)
        sequence.set_status(SequenceStatus.FINISHED_ABORTED)
        sequence.stop_reason = "shutdown"
        processor.close(sequence)
        assert (sequence.stop_reason, sequence.output_text) == ("shutdown", "ab")
        assert not processor._states


class CountingTokenizer(Tokenizer):
    """Counts how often it decodes."""

    num_calls = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_calls += 1
        return super().decode(token_ids, skip_special_tokens)


def made(processor: OutputProcessor, request: Request) -> list[dict[int, Logprob] | None]:
    """The prompt's log-probabilities as the request reports them."""
    entries = processor.make_output(request).prompt_logprobs
    assert entries is not None
    return entries


def running(params: SamplingParams, *eos: int) -> Sequence:
    """A sequence with a prompt of one token, in the engine's batch."""
    return Sequence(next_seq_id(), SequenceData(byte_level().encode(BOS)), params, 0, eos,
                    status=SequenceStatus.RUNNING)
