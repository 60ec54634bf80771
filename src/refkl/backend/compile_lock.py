"""Locks that a killed compile of a DeepSpeed op left behind. torch waits for such a lock forever and prints nothing.

While torch compiles an op, torch.utils.file_baton.FileBaton keeps a file `lock` open in the op's build folder. If the
process is killed, the file stays, but the kernel closes it. A lock that no process has open is therefore abandoned.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.utils.file_baton import FileBaton
from transformers.utils import logging

from refkl.messages import RunError

logger = logging.get_logger(__name__)

PATIENCE = 30.0
"""Seconds until a lock is reported, either as abandoned or with the process that holds it."""
_LOOK = 1.0
"""Seconds between two checks of who holds a lock."""
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse.", "9p", "afs", "orangefs")
"""Prefixes of file system types on which the holder of a lock may run on another machine."""


def watch_compile_locks() -> None:
    """Make torch take over abandoned compile locks, in this process, from now on.

    Calling it again has no effect. A process that finds no lock, or one that is released within PATIENCE, behaves as
    before. A lock is taken over only if no process on this machine has it open and it is not on a network file system.
    """
    acquire = FileBaton.try_acquire
    if getattr(acquire, "watched", False):
        return

    def try_acquire(baton: Any) -> bool | None:
        # An abandoned lock is taken over here and not in `wait`: the process that gets the lock compiles the op, a
        # process that waits for it expects to find the op compiled.
        if acquire(baton):
            return True
        lock = Path(baton.lock_file_path)
        if (file := _abandoned(lock, wait=False)) is None or (taken := _take_over(lock, file)) is None:
            return False
        baton.fd = taken
        return True

    def wait(baton: Any) -> None:
        lock = Path(baton.lock_file_path)
        if _abandoned(lock, wait=True) is not None:
            raise RunError(
                f"The process that compiled a DeepSpeed op in {lock.parent} ended before it was done. Start the run "
                "again: it takes over the lock and compiles the op."
            )

    vars(try_acquire)["watched"] = True
    setattr(FileBaton, "try_acquire", try_acquire)  # noqa: B010 - mypy takes no assignment to a method
    setattr(FileBaton, "wait", wait)  # noqa: B010


_File = tuple[int, int]
"""An inode and the time at which the file was made. A new file often gets the inode of the one deleted before it."""


def _abandoned(lock: Path, *, wait: bool) -> _File | None:
    """Return the lock's file once nobody has held it for PATIENCE seconds.

    Returns None once the lock is released; without `wait` also as soon as a process holds it.
    """
    start = last_held = time.monotonic()
    said = False
    while (file := _file(lock)) is not None:
        process, now = holder(lock), time.monotonic()
        if process is not None:
            if not wait:
                return None
            last_held = now
            if not said and now - start > PATIENCE:
                said = True
                logger.warning(f"Waiting for process {process}, which compiles a DeepSpeed op in {lock.parent}.")
        elif now - last_held > PATIENCE:
            if (file_system := _network_file_system(lock)) is None:
                return file
            if not said:
                said = True
                logger.warning(
                    f"Waiting for the compile lock {lock}. No process on this machine holds it, but it is on a network "
                    f"file system ({file_system}), so a process on another machine may hold it. If none does, delete "
                    "that file."
                )
        time.sleep(_LOOK)
    return None


def _take_over(lock: Path, file: _File) -> int | None:
    """Return a file descriptor that holds the abandoned lock, or None if another process was quicker.

    The lock's file stays. If it were deleted and created again, a process that checks in between would think that the
    lock is released, and a slower process would delete the new file.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = _file(lock) == file
    except BlockingIOError:
        taken = False
    if not taken:
        os.close(descriptor)
        return None
    logger.warning(
        f"Took over the compile lock {lock}: no process has held it for {PATIENCE:.0f} s. A killed compile of a "
        "DeepSpeed op left it."
    )
    return descriptor


def _file(lock: Path) -> _File | None:
    try:
        found = lock.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def holder(lock: Path) -> int | None:
    """Return the id of a process on this machine that has the file open, or None."""
    path = os.path.realpath(lock)
    for process in psutil.process_iter():
        try:
            if any(file.path == path for file in process.open_files()):
                return int(process.pid)
        except (psutil.Error, OSError):  # it has ended, or is another user's and cannot compile in this folder
            continue
    return None


def _network_file_system(lock: Path) -> str | None:
    """Return the type of the network file system that the file is on, or None."""
    path = Path(os.path.realpath(lock))
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype.lower() if mounts else ""
    return kind if kind.startswith(_SHARED) else None
