"""What every test gets: no network, a fixed seed, and `--slow`, `--faults` and `--hostile` for what takes long."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import hypothesis
import pytest
import torch
from support.hostile import HOSTILE, USUAL


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--faults", action="store_true", help="kill runs more often, at more moments")
    parser.addoption("--hostile", action="store_true", help="10,000 random examples in tests/hostile, instead of 500")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of random examples, and a seed for them that the header prints.

    Without --hostile the examples are the same in each run, so that it is the change under test that makes one fail.
    """
    hostile = config.getoption("--hostile")
    hypothesis.settings.load_profile(HOSTILE if hostile else USUAL)
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = random.SystemRandom().randrange(2**32) if hostile else 0
    # Hypothesis's plugin may have read the option already.
    hypothesis.core.global_force_seed = int(config.getoption("--hypothesis-seed"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"random examples: --hypothesis-seed={config.getoption('--hypothesis-seed')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in ("slow", "faults"):
        if not config.getoption(f"--{name}"):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: runs with --{name}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
