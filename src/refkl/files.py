"""Files and folders that are written completely or not at all, locks on folders, and JSON that may be damaged.

A file or folder is written under a temporary name, which no other process and no user has: hidden, with 32 random hex
digits and a suffix that says that it is refkl's. Nothing under another name is ever deleted or overwritten.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

_TEMPORARY, _REPLACED = "refkl-tmp", "refkl-old"
_CHUNK = 1 << 22


def temporary_beside(path: Path, suffix: str = _TEMPORARY) -> Path:
    """Return a name beside `path` that nothing has: `.NAME.<32 hex digits>.refkl-tmp`."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.{suffix}")


def replaced_beside(path: Path) -> Path:
    """Return a name beside `path` for a folder that is being replaced: `.NAME.<32 hex digits>.refkl-old`."""
    return temporary_beside(path, _REPLACED)


def temporaries_of(path: Path) -> list[Path]:
    """List what stands beside `path` under names that `temporary_beside` gives."""
    return _named_as(path, _TEMPORARY)


def replaced_of(path: Path) -> list[Path]:
    """List what stands beside `path` under names that `replaced_beside` gives."""
    return _named_as(path, _REPLACED)


def _named_as(path: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(path.name[:40])}\.[0-9a-f]{{32}}\.{suffix}")
    return [p for p in path.parent.iterdir() if pattern.fullmatch(p.name)] if path.parent.is_dir() else []


@contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """Yield the name under which to write a file. At the end it replaces `path`; after an error it is deleted.

    If `path` is a symbolic link, the link is replaced and its target is left as it is.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield the name under which to make a folder. At the end it becomes `folder`; after an error it is deleted.

    Raises:
        ValueError: `folder` exists by then and is not an empty folder; it is left as it is.
    """
    temporary = temporary_beside(folder)
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if not os.path.lexists(folder):
                raise
            raise ValueError(
                f"{folder} was made by another process in the meantime, and is left as it is ({error.strerror}). "
                "Choose another folder."
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, completely or not at all, also if the machine fails."""
    with file_written_whole(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any, *, ascii_only: bool = True) -> None:
    """Write a JSON file completely or not at all, also if the machine fails."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=ascii_only) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it is damaged: no JSON, no object, not UTF-8, or nested too deeply to be one that refkl wrote.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deeply.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object.")
    return found


def inside(name: Any, *, nested: bool = False) -> bool:
    """Return True if `name` names a file inside a folder: no "..", not absolute. Without `nested`, no "/" either."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name != "."
        and (nested or len(path.parts) == 1)
    )


def sha256_of_each(files: Iterable[Path], threads: int = 1) -> Mapping[Path, str]:
    """Return the SHA-256 of each file, in hex. A thread works on one file at a time."""
    files = list(files)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return dict(zip(files, pool.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(_CHUNK):  # hashlib leaves the interpreter to other threads meanwhile
            found.update(part)
    return found.hexdigest()


class FolderLock:
    """A lock on a file, which the kernel releases when this process ends, however it ends.

    Args:
        path: the lock's file; it is made if it does not exist.

    Raises:
        BlockingIOError: another process holds the lock; the error's `strerror` says which.
        OSError: the file cannot be made, or the file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at(path):
                    break
            except OSError as error:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                os.close(self._descriptor)
                if isinstance(error, BlockingIOError):
                    raise BlockingIOError(error.errno, holder or "another process") from None
                raise
            os.close(self._descriptor)  # the file was deleted or renamed after it was opened: lock the present one
        with suppress(OSError):  # a full disk: only the message to another process lacks this
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.register_at_fork(after_in_child=self._close)  # else a child that outlives this process would hold the lock

    def release(self) -> None:
        """Delete the lock's file and release the lock. Calling it again has no effect."""
        if self._descriptor >= 0:
            if self._is_at(self.path):
                self.path.unlink()
            self._close()

    def _is_at(self, path: Path) -> bool:
        own = os.fstat(self._descriptor)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return False
        return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
