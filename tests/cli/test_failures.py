"""A launch that fails ends, and prints the first error of its processes, once, after all else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from support.launching import accelerate_launch, deepspeed_launch
from support.train_inputs import write_config

from refkl.cli.failures import print_failure


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as one of two, whose launcher is no torchrun; the folder for temporary files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_alone_a_process_prints_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    print_failure("the disk is gone")
    print_failure("another run")
    assert capfd.readouterr().err == "the disk is gone\nanother run\n"


def test_the_first_process_that_fails_prints(launched: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for message in ("first", "second"):
        print_failure(message)
    assert capfd.readouterr().err == "[rank 1] first\n"


def test_marks_of_launches_that_have_ended_are_deleted(launched: Path) -> None:
    print_failure("first")
    (folder,) = launched.iterdir()
    (mark,) = folder.iterdir()
    (folder / "1-0.5").touch()  # process 1 is another by now
    (folder / "999999999-1.5").touch()
    print_failure("second")
    assert list(folder.iterdir()) == [mark]


def test_torchrun_takes_the_first_error_for_the_root_cause(
    launched: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of failures in one second it takes the lowest rank's, which here is the second to fail."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    files = [launched / "attempt_0" / rank / "error.json" for rank in ("0", "1")]
    for file, message in ((files[1], "first"), (files[0], "second")):
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        print_failure(message)
    assert capfd.readouterr().err == ""
    assert json.loads(files[1].read_text())["message"]["message"] == "first" and "second" not in files[0].read_text()
    error = ChildFailedError("refkl", {rank: ProcessFailure(rank, 1, 1, str(file)) for rank, file in enumerate(files)})
    assert error.get_first_failure()[0] == 1 and "first" in _last(str(error))
    killed = ProcessFailure(0, 1, -15, str(launched / "none.json"))
    error = ChildFailedError("refkl", {0: killed, 1: ProcessFailure(1, 1, 1, str(files[1]))})
    assert error.get_first_failure()[0] == 1


def _train(folder: Path, *options: str) -> tuple[str, ...]:
    return ("train", str(write_config(folder, trainer={"max_steps": 4})), *options)


def _last(output: str) -> str:
    """What torchrun prints after "Root Cause", or what is not the deepspeed launcher's own at the end."""
    _, _, last = output.rpartition("Root Cause (first observed failure):")
    return last


@pytest.mark.slow
def test_an_input_error_of_all_ranks(tmp_path: Path) -> None:
    output = accelerate_launch("multi", "refkl", *_train(tmp_path, "--launch.processes", "3"), module=True, fails=True)
    words = "refkl: error: The configuration asks for 3 processes (launch.processes) but the launch gave 2."
    assert output.count("refkl: error:") == 1 and words in _last(output)
    assert "exitcode  : 2" in _last(output)


def test_an_error_that_nothing_catches_on_one_rank(tmp_path: Path) -> None:
    rewards = ("--reward", '[{"function": "support.train_inputs:fails_on_rank_1"}]')
    output = accelerate_launch("multi", "refkl", *_train(tmp_path, *rewards), module=True, fails=True)
    assert output.count("KeyError: 'column that is not there'") == 1
    assert "KeyError: 'column that is not there'" in _last(output) and "fails_on_rank_1" in _last(output)
    assert "rank      : 1 " in _last(output)
    assert "Another process of this run is gone" not in output  # what rank 0 sees, and would say


@pytest.mark.slow
def test_under_deepspeed(tmp_path: Path) -> None:
    options = ("--trainer.deepspeed", "deepspeed/zero2.json", "--launch.processes", "3")
    output = deepspeed_launch("refkl", *_train(tmp_path, *options), fails=True)
    assert output.count("refkl: error:") == 1
    _, _, after = output.partition("refkl: error:")
    # The other process may be loading still, and its progress bar comes whenever it comes.
    launchers = [line for line in after.splitlines()[2:] if line.strip() and not line.startswith("Loading weights")]
    assert all("[launch.py:" in line for line in launchers), launchers
