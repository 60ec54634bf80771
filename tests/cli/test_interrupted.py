"""Ctrl-C before a run trains: exit status 130 and one line, wherever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import ROOT
from support.train_inputs import write_config

from refkl.cli import main
from refkl.cli.failures import Interrupted, Interruptible


@pytest.mark.parametrize("seconds", [1.0, 2.5, 5.0])
def test_ctrl_c_while_starting_ends_without_a_traceback(seconds: float, tmp_path: Path) -> None:
    """The first seconds are imports; after these, the model is loaded and the trainer made."""
    config = write_config(tmp_path, trainer={"max_steps": 1000, "max_completion_length": 64})
    command = [sys.executable, "-m", "refkl", "train", str(config)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output and "stopped" in output


def interrupt_in(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT while `refkl.cli.train.WHAT` runs, in code that turns the KeyboardInterrupt into another error."""
    from refkl.cli import train

    def interrupted(*args: object, **kwargs: object) -> None:
        try:
            exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", {"os": os, "signal": signal, "time": time})
        except KeyboardInterrupt as error:
            raise RuntimeError("an import failed") from error

    monkeypatch.setattr(train, what, interrupted)


@pytest.mark.parametrize("what", ["load_data", "load_model", "load_tokenizer", "load_reward", "detect"])
def test_an_interrupt_that_became_another_error(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_in(what, monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    assert main(["train", str(write_config(tmp_path))]) == 130
    assert signal.getsignal(signal.SIGINT) == before
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "refkl: stopped by Ctrl-C" and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


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
