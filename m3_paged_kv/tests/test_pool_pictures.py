"""The pictures of the pool show what the books say."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m3_paged_kv import LLM
from m3_paged_kv.plugins.eviction import AttentionSinks
from m3_paged_kv.tools.pool_pictures import SHARED, PoolRecorder, PoolState, draw_pool, draw_tables, slot_colours

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
COLOURS = {1: "red", 2: "blue"}


def make(tiny_model: TinyModels, recorder: PoolRecorder, **options: object) -> LLM:
    return LLM(str(tiny_model("llama")), plugins=[recorder], **{
        "dtype": "float32", "max_model_len": 64, "block_size": 4, **options})


def test_colours_by_hand() -> None:
    """Blocks of 2. Block 0 holds one token of 1; block 1 is shared; 2 is on the host; 3 is free."""
    state: PoolState = {("device", 0): {1: 1}, ("device", 1): {1: 2, 2: 1}, ("host", 2): {2: 2}}
    image = slot_colours([state, {}], "device", 4, 2, COLOURS)
    assert image.shape == (8, 2, 3)
    shared = tuple(int(SHARED[i:i + 2], 16) / 255 for i in (1, 3, 5))
    np.testing.assert_allclose(image[:, 0], [RED, (1.0, 0.75, 0.75), shared, shared, *[(1.0, 1.0, 1.0)] * 4])
    assert (image[:, 1] == 1).all(), "the second step left everything free"
    host = slot_colours([state], "host", 3, 2, COLOURS)
    np.testing.assert_allclose(host[:, 0], [*[(1.0, 1.0, 1.0)] * 4, BLUE, BLUE])


def test_recorded_blocks_are_those_of_the_tables(tiny_model: TinyModels) -> None:
    """A prompt of 6 fills blocks 0 and half of 1; the fourth step stores its ninth token, in block 2."""
    recorder = PoolRecorder()
    llm = make(tiny_model, recorder, num_blocks=16)
    llm.generate([[7] * 6], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    held = [{place: list(holders.values()) for place, holders in state.items()} for state in recorder.history]
    assert held == [{("device", 0): [4], ("device", 1): [2]}, {("device", 0): [4], ("device", 1): [3]},
                    {("device", 0): [4], ("device", 1): [4]},
                    {("device", 0): [4], ("device", 1): [4], ("device", 2): [1]}, {}]


def test_outputs_of_one_prompt_are_holders_of_one_block(tiny_model: TinyModels) -> None:
    """F3.5: right after the fork all three hold both blocks; a step later the half one has been copied for two."""
    recorder = PoolRecorder()
    llm = make(tiny_model, recorder, num_blocks=16)
    llm.generate([[7] * 6], SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert [sorted(map(len, state.values())) for state in recorder.history] == [[3, 3], [1, 1, 1, 3], [1, 1, 1, 3], []]


def test_swapped_sequences_are_seen_on_the_host(tiny_model: TinyModels) -> None:
    """F3.6: every step, each sequence has all its tokens somewhere; some of them in host memory for a while."""
    recorder = PoolRecorder()
    llm = make(tiny_model, recorder, num_blocks=7, max_model_len=28)
    llm.generate([[7 + i] * 8 for i in range(3)], greedy(16), use_tqdm=False)
    assert any(where == "host" for state in recorder.history for where, _ in state)
    for state in recorder.history:
        for seq_id in {s for holders in state.values() for s in holders}:
            places = [place for place, holders in state.items() if seq_id in holders]
            assert len({where for where, _ in places}) == 1, "nothing is shared, so it lies in one pool"
            filled = [state[place][seq_id] for place in places]
            assert filled[:-1] == [4] * (len(filled) - 1), "all but the last block are full"
    assert recorder.history[-1] == {}


def test_forgotten_tokens_leave_the_picture(tiny_model: TinyModels) -> None:
    """F3.10: 21 tokens in blocks 0 to 5. 1, 2 and 3 leave after the first step, 4 after the fifth, which took 1."""
    recorder = PoolRecorder()
    llm = LLM(str(tiny_model("llama")), plugins=[AttentionSinks(4, 5), recorder], dtype="float32", max_model_len=64,
              block_size=4, num_blocks=16)
    llm.generate([[7] * 21], greedy(6), use_tqdm=False)
    held = [{block: list(holders.values()) for (_, block), holders in state.items()} for state in recorder.history]
    assert held[:4] == [{0: [4], 4: [4], 5: [n]} for n in range(1, 5)]
    assert held[4:] == [{0: [4], 5: [4], 1: [1]}, {}]


def test_drawing(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    draw_pool(axes, [{("device", 0): {1: 1}}] * 3, "device", 4, 2, COLOURS)
    assert axes.get_ylabel() == "device block"
    assert axes.images[0].get_array().shape == (8, 3, 3)
    figure.savefig(tmp_path / "pool.png")
    assert (tmp_path / "pool.png").stat().st_size > 0


def test_tables_are_drawn_above_the_pool() -> None:
    """A box for every entry and every block, a line for every entry; block 0 is both sequences', block 3 nobody's."""
    axes = Figure().subplots()
    draw_tables(axes, {1: [2, 0], 2: [0, 1]}, 4, COLOURS, {1: "A", 2: "B"})
    assert [text.get_text() for text in axes.texts] == ["A", "2", "0", "B", "0", "1", "0", "1", "2", "3", "pool"]
    assert len(axes.lines) == 4
    assert [line.get_xdata()[1] for line in axes.lines] == [2.5, 0.5, 0.5, 1.5]
    pool = [to_hex(bars.get_facecolor()[0]) for bars in axes.collections[-4:]]
    assert pool == [SHARED, to_hex("blue"), to_hex("red"), to_hex("white")]
