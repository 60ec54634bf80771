"""Error output of a launched run: only the first error of its processes is printed.

When one process of a run fails, the others fail too, with errors about the process that is gone. Only the first process
that fails on a machine prints its error. torchrun, which `accelerate launch` uses, prints last what a process wrote
into TORCHELASTIC_ERROR_FILE (https://docs.pytorch.org/docs/stable/elastic/errors.html), so the error goes there. For
other launchers it goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_OURS = re.compile(r"\d+-\d+\.\d+")
"""Names that `_name` gives."""


def print_failure(message: str) -> None:
    """Print why this process fails, unless another process of the run has failed before it."""
    if not _launched():
        print(message, file=sys.stderr)
        return
    first = _is_first()
    if _ERROR_FILE not in os.environ:
        if first:
            print(f"[rank {os.environ.get('RANK', '?')}] {message}", file=sys.stderr, flush=True)
        return
    # Whole seconds decide which failure is first; a killed process has the time at which its end was noticed.
    when = int(time.time()) + (-1 if first else 1)
    text = message if first else "ended because another process of the run failed"
    record = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(when)}}}
    try:
        Path(os.environ[_ERROR_FILE]).write_text(json.dumps(record))
    except OSError:  # a full disk may be what the error is about
        print(text, file=sys.stderr, flush=True)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. After a plain KeyboardInterrupt in code that exec() runs, as in a dataclass, Python does not exit with
    the status that is asked for."""


class Interruptible:
    """Context of a command in which Ctrl-C ends it without a traceback; `stopped` is True then.

    An import may turn the KeyboardInterrupt into another error, or drop it, so the signal itself is noted. While a run
    trains, Stopper has a handler of its own.
    """

    stopped = False

    @classmethod
    def check(cls) -> None:
        """Raise Interrupted if Ctrl-C was pressed, and the code that it interrupted dropped it."""
        if cls.stopped:
            raise Interrupted

    def __enter__(self) -> Interruptible:
        self._before: Any = None
        Interruptible.stopped = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if kind is None or not self.stopped:
            return False
        print_failure("refkl: stopped by Ctrl-C")
        return "REFKL_TRACEBACK" not in os.environ

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        Interruptible.stopped = True
        raise Interrupted


def print_uncaught_failures() -> None:
    """Report uncaught errors only once as well, in a process that a launcher started."""
    if _launched():
        sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, Exception):
        print_failure("".join(traceback.format_exception(kind, error, trace)).rstrip())
    else:  # Ctrl-C
        sys.__excepthook__(kind, error, trace)


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_first() -> bool:
    """Return True for the first process of this launch, on this machine, that asks; for all if the disk is full."""
    try:
        _mark().touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _mark() -> Path:
    """Return the file that the first failing process creates. Files of launches that have ended are deleted."""
    if file := os.environ.get(_ERROR_FILE):  # .../attempt_0/LOCAL_RANK/error.json, in a folder that torchrun deletes
        return Path(file).parent.parent / "refkl-failed"
    folder = Path(tempfile.gettempdir()) / f"refkl-failed-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for left in folder.iterdir():
        if _OURS.fullmatch(left.name) and not _alive(left.name):
            left.unlink(missing_ok=True)
    return folder / _name(psutil.Process(os.getppid()))


def _name(process: psutil.Process) -> str:
    """Return a name that distinguishes this process from a later one with the same id."""
    return f"{process.pid}-{process.create_time()}"


def _alive(name: str) -> bool:
    try:
        return _name(psutil.Process(int(name.split("-")[0]))) == name
    except psutil.NoSuchProcess:
        return False
