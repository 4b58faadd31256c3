"""The testing kit as pytest fixtures: `pytest_plugins = "vdcache.testing.plugin"` in a conftest.py.

Every fixture gives the function or class of `vdcache.testing` with its name; `small_model` runs a test once for each of
`small_models()`, and `vdcache_clean` forgets what was compiled before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vdcache import testing

_NAMES = (
    "assert_bit_identical",
    "assert_close",
    "assert_pass",
    "assert_policy",
    "assert_predictor",
    "assert_reaches",
    "assert_refuses",
    "assert_round_trip",
    "assert_skipped",
    "parse",
)


def _given(name: str) -> Callable[[], Any]:
    @pytest.fixture(scope="session", name=name)
    def fixture() -> Any:
        return getattr(testing, name)

    return fixture


for _name in _NAMES:
    globals()[f"_{_name}"] = _given(_name)


@pytest.fixture
def vdcache_clean() -> Iterator[None]:
    """Nothing is compiled from an earlier test, and warnings that are given once are given again."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def recording_backend(vdcache_clean: None) -> Any:
    """`RecordingBackend`, on a clean slate."""
    return testing.RecordingBackend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `small_model` once for each of them."""
    if "small_model" in metafunc.fixturenames:
        cases = testing.small_models()
        metafunc.parametrize("small_model", list(cases.values()), ids=list(cases), scope="module")
