"""Fixtures shared by the tests of every milestone."""
import pytest

pytest.register_assert_rewrite("m0_basics.testing")
pytest_plugins = ["m0_basics.testing.fixtures"]
