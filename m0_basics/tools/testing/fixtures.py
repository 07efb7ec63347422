"""Fixtures that every milestone's tests share; the `conftest.py` at the top of the repository loads them."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ..exercise.book import Python, run_python
from .forked_python import ForkedPython
from .real_model import RealReference, real_reference
from .tiny_models import FAMILIES_UNDER_TEST, save_parrot_model, save_sentencepiece_model, save_tiny_model

TinyModels = Callable[[str], Path]

with suppress(ImportError):         # an interpreter with a GPU may lack it
    import hypothesis
    # How long an example takes says how busy the machine is, and nothing about the code.
    hypothesis.settings.register_profile("lab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("lab")

# Bytes that all differ: characters of one, two, three and four bytes.
PARROT_TEXT = "aé中😀z?"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Name of a variant -> its folder, made when it is first asked for.

    Besides the variants of FAMILIES_UNDER_TEST: "parrot" recites PARROT_TEXT for ever, "parrot_eos" once;
    "sentencepiece" begins with a space.
    """
    root = tmp_path_factory.mktemp("tiny_models")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            if name in ("parrot", "parrot_eos"):
                made[name] = save_parrot_model(root / name, PARROT_TEXT, then_eos=name == "parrot_eos")
            elif name == "sentencepiece":
                made[name] = save_sentencepiece_model(root / name)
            else:
                tiny = FAMILIES_UNDER_TEST[name]
                made[name] = save_tiny_model(root / name, tiny.family, tie=tiny.tie, **tiny.overrides)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """A tiny product takes microseconds, and waking a second thread on a busy machine takes milliseconds."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("real_model") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forked_python() -> Iterator[Python]:
    """Runs commands of Python without the time that importing torch and transformers takes."""
    if sys.platform != "linux":                 # a fork of a process with Apple's libraries in it is not safe
        yield run_python
        return
    with ForkedPython() as forked:
        yield forked.run


@pytest.fixture(scope="session")
def default_model_reference(pytestconfig: pytest.Config) -> RealReference:
    """What transformers makes of the default model, kept in `.cache` at the top of the repository."""
    return real_reference(pytestconfig.rootpath / ".cache")
