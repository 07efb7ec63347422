"""Fixtures shared by the tests of every milestone."""
import pytest

pytest.register_assert_rewrite("m0_basics.tools.testing")
pytest_plugins = ["m0_basics.tools.testing.fixtures", "m0_basics.tools.testing.command_line"]


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu` look at the GPU tests only: the interpreter with the GPU may lack what the others import."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return None if collection_path.name == "test_gpu.py" else True
    return None


def pytest_collection_modifyitems(config, items):
    """Where several processes share the tests, the slow ones come first: none of them is left for the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
