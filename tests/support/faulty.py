"""`refkl train` in processes that are killed at a moment that was chosen beforehand.

They are forked from a server that has imported everything and run nothing, so that a run takes seconds. A kill is
SIGKILL, by the process itself: between two operations on files of the run's folder (the n-th one), inside an update of
the reference (before its n-th weight), or when some seconds of training have gone by.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["refkl.cli.train", "refkl.cli.settings", "trl", "deepspeed", "train_inputs"])
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""Audit events of operations on files; os.replace is a rename too."""
TIMEOUT = 240


@dataclass(frozen=True)
class Kill:
    """When to die."""

    kind: str
    """"file", "sync" or "time"."""
    at: float
    """The number of the operation or of the weight; seconds since training began."""


def run(arguments: list[str], log: Path, kill: Kill | None = None) -> int:
    """Run `refkl` with these; the exit status, -9 if it was killed. With no kill it counts, beside the log."""
    # A fork of the server has the server's environment.
    process = SERVER.Process(target=_child, args=(arguments, str(log), kill, dict(os.environ)))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"still running after {TIMEOUT} s: {arguments}\n{log.read_text()[-3000:]}")
    assert process.exitcode is not None
    return process.exitcode


def counted(log: Path) -> dict[str, float]:
    """How many operations and weights there were, and how many seconds of training, in a run that was not killed."""
    found: dict[str, float] = json.loads(log.with_suffix(".json").read_text())
    return found


def _child(arguments: list[str], log: str, kill: Kill | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    counts = {"file": 0.0, "sync": 0.0, "time": 0.0}
    _watch_files(str(Path(log).parent / "run"), counts, kill)
    _watch_updates(counts, kill)
    began = _watch_training(kill)
    from refkl.cli import main

    status = main(arguments)
    counts["time"] = time.perf_counter() - began[0] if began else 0.0
    Path(log).with_suffix(".json").write_text(json.dumps(counts))
    sys.exit(status)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count(kind: str, counts: dict[str, float], kill: Kill | None) -> None:
    counts[kind] += 1
    if kill is not None and kill.kind == kind and counts[kind] >= kill.at:
        _die()


def _watch_files(folder: str, counts: dict[str, float], kill: Kill | None) -> None:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and args and str(args[0]).startswith(folder):
            reads = event == "open" and isinstance(args[1], str) and not set(args[1]) & set("wax+")
            if not reads:
                _count("file", counts, kill)

    sys.addaudithook(hook)


def _watch_updates(counts: dict[str, float], kill: Kill | None) -> None:
    from refkl.reference.moving.average import Averages

    move = Averages.move

    def counting(*args: Any) -> Any:
        _count("sync", counts, kill)
        return move(*args)

    Averages.move = counting  # type: ignore[method-assign]


def _watch_training(kill: Kill | None) -> list[float]:
    from transformers import Trainer

    began: list[float] = []
    train = Trainer.train

    def watched(*args: Any, **kwargs: Any) -> Any:
        began.append(time.perf_counter())
        if kill is not None and kill.kind == "time":
            timer = threading.Timer(kill.at, _die)
            timer.daemon = True
            timer.start()
        return train(*args, **kwargs)

    Trainer.train = watched  # type: ignore[method-assign]
    return began
