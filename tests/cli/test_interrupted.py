"""Ctrl-C in a command that is not training: exit status 130 and one line, wherever it comes."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.launching import ROOT
from support.train_inputs import write_config

from refkl.cli import main
from refkl.cli.failures import Interrupted, Interruptible

STARTS = [  # a command, and a module: Ctrl-C comes when it has just been imported
    ("train", "torch._C"),
    ("train", "peft"),
    ("train", "refkl.trl.grpo"),  # next the model is loaded and the trainer made
    ("check", "datasets"),
    ("plan", "numpy"),
    ("compare", "transformers"),
]


def arguments(command: str, folder: Path) -> list[str]:
    config = write_config(folder, trainer={"max_steps": 1000, "max_completion_length": 64})
    model = str(folder / "model")
    return {
        "plan": ["plan", "--model", model],
        "compare": ["compare", model, model, "--data", str(folder / "data.jsonl"), "--output", str(folder / "found")],
    }.get(command, [command, str(config)])


@pytest.mark.parametrize(("command", "module"), STARTS)
def test_ctrl_c_while_starting_ends_without_a_traceback(command: str, module: str, tmp_path: Path) -> None:
    """`-X importtime` prints a line after each import, so that the moment does not depend on the machine."""
    python = [sys.executable, "-X", "importtime", "-m", "refkl", *arguments(command, tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        python, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    limit = threading.Timer(300, process.kill)
    limit.start()
    try:
        assert process.stderr is not None
        reached = any(line.split("|")[-1].strip() == module for line in process.stderr)
        process.send_signal(signal.SIGINT)
        left = [line for line in process.stderr if not line.startswith("import time:")]
        status = process.wait()
    finally:
        limit.cancel()
        process.kill()
    assert reached and status == 130, "".join(left)
    assert "Traceback" not in "".join(left) and left[-1] == "refkl: stopped by Ctrl-C\n"
    assert not (tmp_path / "run").exists() and not (tmp_path / "found").exists()


def interrupt_in(command: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT while `refkl.cli.COMMAND.WHAT` runs, in code that turns the KeyboardInterrupt into another error."""

    def interrupted(*args: object, **kwargs: object) -> None:
        try:
            exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", {"os": os, "signal": signal, "time": time})
        except KeyboardInterrupt as error:
            raise RuntimeError("an import failed") from error

    monkeypatch.setattr(importlib.import_module(f"refkl.cli.{command}"), what, interrupted)


@pytest.mark.parametrize(
    ("command", "what"),
    [("train", name) for name in ("load_data", "load_model", "load_tokenizer", "load_reward", "detect")]
    + [("check", "check_reference"), ("plan", "make_plans"), ("compare", "load_checkpoint")],
)
def test_an_interrupt_that_became_another_error(
    command: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_in(command, what, monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    assert main(arguments(command, tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) == before
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "refkl: stopped by Ctrl-C" and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "found").exists()


def test_an_interrupt_that_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from refkl.cli import train

    load = train.load_data

    def drops(*args: object) -> object:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        return load(*args)

    monkeypatch.setattr(train, "load_data", drops)
    assert main(["train", str(write_config(tmp_path))]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "refkl: stopped by Ctrl-C"
    assert main(["--version"]) == 0  # the next command is not stopped


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="other"), Interruptible():
        raise RuntimeError("other")
    with pytest.raises(KeyboardInterrupt), Interruptible():
        raise KeyboardInterrupt  # no signal: the caller's own
    with Interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    with pytest.raises(Interrupted):
        Interruptible.check()
    Interruptible.stopped = False


def test_nothing_heavy_is_imported_before_a_command_begins() -> None:
    """So that Ctrl-C finds a handler, and `refkl --version` answers at once."""
    code = "import sys, refkl, refkl.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    code = (
        "import refkl; from refkl import freeze; "
        "assert freeze is refkl.freeze and callable(freeze) and refkl.reference.moving.average; "
        "assert set(refkl.__all__) <= set(dir(refkl)); [getattr(refkl, name) for name in refkl.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    import refkl

    with pytest.raises(AttributeError, match="module 'refkl' has no attribute 'nothing'"):
        refkl.nothing  # noqa: B018
