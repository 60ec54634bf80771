"""What every test gets: no network, a fixed seed, and `--slow` for what takes long."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Under xdist one worker has the tests that start processes: two at a time would be four on two cores.
        if isinstance(item, pytest.Function) and _launches(item.function):
            item.add_marker(pytest.mark.xdist_group("launches"))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def _launches(function: Callable[..., Any], seen: tuple[Callable[..., Any], ...] = ()) -> bool:
    """Whether a test calls something of launching.py, by its name, itself or through a function of its module."""
    if not isinstance(function, FunctionType) or function in seen:
        return False
    if function.__module__ == "launching":
        return True
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    own = [f for f in called if isinstance(f, FunctionType) and f.__module__ in (function.__module__, "launching")]
    return any(_launches(f, (*seen, function)) for f in own)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
