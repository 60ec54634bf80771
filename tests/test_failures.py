"""A launch that fails ends, and prints the first error of its processes, once, after all else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launching import accelerate_launch, deepspeed_launch
from train_inputs import write_config


def _train(folder: Path, *options: str) -> tuple[str, ...]:
    return ("train", str(write_config(folder, trainer={"max_steps": 4})), *options)


def _last(output: str) -> str:
    """What torchrun prints after "Root Cause", or what is not the deepspeed launcher's own at the end."""
    _, _, last = output.rpartition("Root Cause (first observed failure):")
    return last


def test_an_input_error_of_all_ranks(tmp_path: Path) -> None:
    output = accelerate_launch("multi", "refkl", *_train(tmp_path, "--launch.processes", "3"), module=True, fails=True)
    words = "refkl: error: The configuration asks for 3 processes (launch.processes) but the launch gave 2."
    assert output.count("refkl: error:") == 1 and words in _last(output)
    assert "exitcode  : 2" in _last(output)


def test_an_error_that_nothing_catches_on_one_rank(tmp_path: Path) -> None:
    start = time.monotonic()
    rewards = ("--reward", '[{"function": "train_inputs:fails_on_rank_1"}]')
    output = accelerate_launch("multi", "refkl", *_train(tmp_path, *rewards), module=True, fails=True)
    assert output.count("KeyError: 'column that is not there'") == 1
    assert "KeyError: 'column that is not there'" in _last(output) and "fails_on_rank_1" in _last(output)
    assert "rank      : 1 " in _last(output)
    assert "Another process of this run is gone" not in output  # what rank 0 sees, and would say
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_under_deepspeed(tmp_path: Path) -> None:
    options = ("--trainer.deepspeed", "deepspeed/zero2.json", "--launch.processes", "3")
    output = deepspeed_launch("refkl", *_train(tmp_path, *options), fails=True)
    assert output.count("refkl: error:") == 1
    _, _, after = output.partition("refkl: error:")
    launchers = [line for line in after.splitlines()[2:] if line.strip()]
    assert all("[launch.py:" in line for line in launchers), launchers
