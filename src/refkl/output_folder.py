"""A lock on a run's output folder: two runs that wrote into one folder would mix their files and both end well.

The kernel releases the lock when its process ends, however it ends, so a run that was killed blocks no other.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from refkl.files import FolderLock

LOCK = ".refkl_lock"
"""File in an output folder while a run writes there."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass
class _Held:
    lock: FolderLock
    count: int = 1


_held: dict[Path, _Held] = {}
"""The folders that this process has locked."""


@contextmanager
def writing_into(folder: Path, accelerator: Any) -> Iterator[None]:
    """Keep other runs from writing into a folder while this is open. Every rank must call; the first one locks.

    It may be nested in one process, for the same folder.

    Raises:
        ValueError: another run writes there, or the folder cannot be made; raised on every rank.
    """
    key, answer = folder.resolve(), [None]
    if accelerator.is_main_process:
        answer = [_take(key)]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[0] is not None:
        raise ValueError(answer[0])
    try:
        yield
    finally:
        if (held := _held.get(key)) is not None:
            held.count -= 1
            if not held.count:
                _held.pop(key).lock.release()


def renamed(folder: Path, aside: Path) -> None:
    """Follow a rename of a locked folder: make the folder anew and lock it, and release the old one.

    Raises:
        ValueError: another run has begun to write into the folder since.
    """
    key = folder.resolve()
    if (held := _held.pop(key, None)) is None:
        return
    held.lock.path = aside.resolve() / LOCK
    try:
        if (failure := _take(key)) is not None:
            raise ValueError(failure)
        if key in _held:
            _held[key].count = held.count
    finally:
        held.lock.release()


def _take(folder: Path) -> Any:
    """Lock a folder. Return None if that worked, else a sentence that says why not."""
    if folder in _held:
        _held[folder].count += 1
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _held[folder] = _Held(FolderLock(folder / LOCK))
    except BlockingIOError as error:
        return (
            f"{folder} is in use: another run ({error.strerror}) writes into it. Wait until it ends, or give this run "
            "another output_dir."
        )
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            return f"{folder} cannot be written into ({error.strerror}). Give this run another output_dir."
        warnings.warn(
            f"The file system of {folder} has no locks ({os.strerror(error.errno)}), so a second run that writes into "
            "that folder would not be noticed.",
            stacklevel=2,
        )
    return None
