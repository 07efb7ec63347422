"""Threads that share out work by pieces: everything is done once, whoever comes; and how many of them are used."""
from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest
import torch

from m4_flash_attn.kernels.cpu import build
from m4_flash_attn.kernels.cpu.build import library

SOURCE = """#include "team.hpp"
#include <unistd.h>

// counts [phases][pieces], one more for each time that a piece is done; `order` what was seen of the phase before.
extern "C" int run_phases(int threads, int phases, int pieces, int grain, int in_order, int sleeper, int* counts) {
    std::atomic<int> mistakes(0);
    auto* counters = new std::atomic<int>[Team::num_counters(phases, threads)];
    Team team(counters, phases, threads);
    team.run([&](Member& member) {
        for (int phase = 0; phase < phases; phase++) {
            auto piece = [&](int first, int last) {
                if (member.thread == sleeper && first % 7 == 0) usleep(2000);
                for (int i = first; i < last; i++) {
                    counts[phase * pieces + i]++;
                    if (phase > 0 && counts[(phase - 1) * pieces + (i * 31) % pieces] != 1) mistakes++;
                }
            };
            if (in_order) member.share_in_order(pieces, piece);
            else member.share(pieces, grain, piece);
        }
    });
    delete[] counters;
    return mistakes;
}

// Threads that are worth it after `phases` phases of two pieces for each, in the first of which somebody sleeps.
extern "C" int worth(int threads, int phases, int in_order, int sleep_us) {
    auto* counters = new std::atomic<int>[Team::num_counters(phases, threads)];
    Team team(counters, phases, threads);
    team.run([&](Member& member) {
        for (int phase = 0; phase < phases; phase++) {
            auto piece = [&](int first, int last) { if (first == 0) usleep(sleep_us); };
            if (in_order) member.share_in_order(2 * threads, piece);
            else member.share(2 * threads, 1, piece);
        }
    });
    delete[] counters;
    return team.watch.num_worth();
}

extern "C" int num_threads(int most) { return pace.num_threads(most); }
extern "C" void learn(int used, int worth, int64_t ns) { pace.learn(used, worth, ns); }
"""


@pytest.fixture
def kernels(tmp_path: Path) -> ctypes.CDLL:
    (tmp_path / "phases.cpp").write_text(SOURCE)
    loaded = library(sources=tmp_path, include=(build.SOURCES,))
    loaded.learn.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    return loaded


def test_every_piece_is_done_once_and_after_the_phase_before(kernels: ctypes.CDLL) -> None:
    """Also where a thread sleeps in the middle of its pieces, and where there are fewer pieces than threads."""
    for threads in (1, 2, 3, 5):
        for pieces, grain in ((1, 1), (2, 4), (57, 1), (57, 8)):
            for in_order in (0, 1):
                for sleeper in (-1, 0, threads - 1):
                    counts = torch.zeros(12, pieces, dtype=torch.int32)
                    mistakes = kernels.run_phases(threads, 12, pieces, grain, in_order, sleeper,
                                                  ctypes.c_void_p(counts.data_ptr()))
                    assert mistakes == 0
                    assert bool((counts == 1).all())


def test_a_thread_that_does_not_run_is_noticed(kernels: ctypes.CDLL) -> None:
    """The others wait 5 ms for it in each phase: some are given up. Not where the pieces differ in size by design."""
    assert kernels.worth(3, 20, 0, 5000) < 3
    assert kernels.worth(3, 20, 1, 5000) == 3
    assert kernels.worth(1, 20, 0, 0) == 1


def test_fewer_threads_for_a_while(kernels: ctypes.CDLL) -> None:
    """50 ms, then a trial; what fails is tried again after twice the time, what works stays."""
    kernels.learn(4, 4, 10 ** 9)
    assert kernels.num_threads(4) == 4
    kernels.learn(4, 3, 10 ** 7)
    assert kernels.num_threads(4) == 3
    assert kernels.num_threads(2) == 2, "no more than are asked for"
    time.sleep(0.06)
    assert kernels.num_threads(4) == 4, "a trial"
    kernels.learn(4, 3, 10 ** 7)
    start = time.perf_counter()
    while kernels.num_threads(4) == 3:
        time.sleep(0.005)
    assert time.perf_counter() - start >= 0.095, "the second pause is twice as long"
    kernels.learn(4, 4, 10 ** 6)
    assert kernels.num_threads(4) == 4, "a millisecond decides nothing: the trial goes on"
    kernels.learn(4, 4, 10 ** 7)
    kernels.learn(4, 4, 10 ** 7)
    assert kernels.num_threads(5) == 5, "and the next one follows at once"
