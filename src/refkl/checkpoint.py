"""Checkpoints with a mark that says that they are complete.

A trainer writes a checkpoint file by file, on all ranks, and can be killed between any two files. Therefore one file
marks the start of writing, and another, which is written last, marks the checkpoint as complete. The latter lists every
other file with its size and SHA-256. A checkpoint without this mark, or one that differs from it, is never resumed from
and never counts as one to keep. Marks of earlier versions of refkl, without SHA-256, are still accepted.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from refkl.files import inside, read_json, sha256_of_each, write_json
from refkl.messages import RunError

MARK = "refkl_complete.json"
"""File in a checkpoint: marks it as complete, and lists its files."""
BEGUN = "refkl_saving.json"
"""File in a checkpoint: refkl began to write it and has not completed it."""
RECORD = "reference.json"
"""File in a checkpoint: the reference that it was trained against, and each update of it."""
REFERENCE = "reference"
"""Folder in a checkpoint: a reference that cannot be rebuilt from the run's initial model."""
_FORMAT = 2
"""Format of the mark. The first had no "format", and for some files a CRC-32 instead of a SHA-256."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CORES = os.cpu_count() or 1
_WHILE_TRAINING, _BEFORE_TRAINING = max(1, min(8, _CORES // 4)), min(8, _CORES)
"""Threads that compute digests: few beside training, more where training waits for them."""
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 24


class CheckpointError(RunError):
    """Error for a checkpoint that could not be written; the message says where, why, and which is the newest complete
    one."""


def begin(checkpoint: Path) -> None:
    """Make the folder. If it exists, delete refkl's earlier checkpoint there, or what an interrupted save has left.

    A folder with any file that refkl did not list there is renamed instead.
    """
    if _is_ours(checkpoint):
        discard(checkpoint)
    elif os.path.lexists(checkpoint):
        os.replace(checkpoint, _name_aside(checkpoint))
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / BEGUN, {"complete": False})


def _is_ours(checkpoint: Path) -> bool:
    """Return True for a folder that refkl made, and that holds nothing besides what it listed in its mark."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return False
    if not (checkpoint / MARK).is_file():
        return (checkpoint / BEGUN).is_file()
    try:
        return _files_in(checkpoint).keys() <= _marked(checkpoint).keys()
    except ValueError:
        return False


def _files_in(checkpoint: Path) -> dict[str, Path]:
    """Return the files of a checkpoint besides its marks, by their names in it."""
    found = {p.relative_to(checkpoint).as_posix(): p for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    return {name: path for name, path in found.items() if name not in (MARK, BEGUN)}


def complete(checkpoint: Path, *, threads: int = _BEFORE_TRAINING) -> None:
    """Mark the checkpoint as complete. Call it on one rank, when all ranks have written all of their files.

    Args:
        checkpoint: its folder, on a disk that all ranks share.
        threads: number of files that are read at once.
    """
    files = _files_in(checkpoint)
    digests = sha256_of_each(files.values(), threads)
    listed = {name: {"bytes": path.stat().st_size, "sha256": digests[path]} for name, path in files.items()}
    write_json(checkpoint / MARK, {"format": _FORMAT, "files": listed})
    (checkpoint / BEGUN).unlink(missing_ok=True)


class Completion:
    """The completion of a checkpoint while training goes on: a thread reads its files, and then marks it.

    Until the mark is there, the checkpoint does not count, and the older ones are kept.

    Args:
        checkpoint: its folder, in which nothing is written any more.
        then: called after the checkpoint is marked, for example to delete old ones.
    """

    def __init__(self, checkpoint: Path, then: Callable[[], None]) -> None:
        self._checkpoint, self._then = checkpoint, then
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"completes {checkpoint.name}")
        self._thread.start()

    def _run(self) -> None:
        try:
            complete(self._checkpoint, threads=_WHILE_TRAINING)
            self._then()
        except BaseException as error:  # any error: `wait` raises it in the thread that trains
            self._error = error

    def wait(self) -> None:
        """Wait until it has ended, and raise its error."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def why_not_whole(checkpoint: Path, *, without_reference: bool = False, contents: bool = True) -> str | None:
    """Return None if a checkpoint matches its mark; else the end of a sentence that names the problem.

    Args:
        checkpoint: its folder.
        without_reference: ignore the files of the reference.
        contents: also compare contents; otherwise only names and sizes, which reads none of the files.
    """
    if not checkpoint.is_dir():
        return "is not there"
    if not (checkpoint / MARK).is_file():
        began = (checkpoint / BEGUN).is_file()
        return f"was not written to its end (no {MARK})" if began else f"is not marked as complete (no {MARK})"
    try:
        listed = _marked(checkpoint)
    except ValueError:
        return f"has a damaged {MARK}"
    if without_reference:
        listed = {n: about for n, about in listed.items() if n != RECORD and not n.startswith(f"{REFERENCE}/")}
    for name, about in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != about["bytes"]:
            return f"has {path.stat().st_size} of the {about['bytes']} bytes of {name}"
    if contents:
        hashed = [checkpoint / name for name, about in listed.items() if "sha256" in about]
        digests = sha256_of_each(hashed, _BEFORE_TRAINING)
        for name, about in listed.items():
            path = checkpoint / name
            if about.get("sha256") != digests.get(path) or ("crc32" in about and _crc32(path) != about["crc32"]):
                return f"has an altered {name}"
    return None


def _marked(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return what the mark lists: size, and SHA-256 or in older marks CRC-32 or neither, of each file by its name.

    Raises:
        ValueError: the mark is damaged: it holds anything else.
    """
    mark = read_json(checkpoint / MARK)
    files = mark.get("files")
    old = mark.keys() == {"files"}
    if not isinstance(files, dict) or not (old or (mark.keys() == {"files", "format"} and mark["format"] == _FORMAT)):
        raise ValueError(f"{checkpoint / MARK} is damaged.")
    for name, about in files.items():
        if not inside(name, nested=True) or not isinstance(about, dict) or not _is_entry(about, old):
            raise ValueError(f"{checkpoint / MARK} is damaged: {name!r}.")
    return files


def _is_entry(about: dict[str, Any], old: bool) -> bool:
    numbers = [about.get("bytes"), *([about["crc32"]] if "crc32" in about else [])]
    if not all(type(number) is int and number >= 0 for number in numbers):
        return False
    if old:
        return about.keys() <= {"bytes", "crc32"}
    digest = about.get("sha256")
    return about.keys() == {"bytes", "sha256"} and isinstance(digest, str) and _SHA256.fullmatch(digest) is not None


def is_whole(checkpoint: str | Path) -> bool:
    """Return True if a checkpoint is complete and its files are unchanged; `why_not_whole` names the problem."""
    return why_not_whole(Path(checkpoint)) is None


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a run's folder, complete or not, from the last step to the first."""
    found = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


@dataclass(frozen=True)
class Newest:
    """The newest complete checkpoint of a run's folder."""

    path: Path | None
    skipped: list[str]
    """One sentence per newer checkpoint, saying why it was skipped."""


def newest_whole(folder: Path, *, without_reference: bool = False, contents: bool = True) -> Newest:
    """Find the newest checkpoint that passes `why_not_whole`."""
    skipped: list[str] = []
    for path in checkpoints(folder):
        why_not = why_not_whole(path, without_reference=without_reference, contents=contents)
        if why_not is None:
            return Newest(path, skipped)
        skipped.append(f"{path.name} {why_not}")
    return Newest(None, skipped)


def rotate(folder: Path, limit: int | None, keep: Collection[str | Path | None]) -> None:
    """Delete interrupted saves, and the oldest marked checkpoints until `limit` are left.

    Unlike transformers' own rotation it counts only marked checkpoints and leaves those written by others, and links.
    Whatever was added to a marked checkpoint is deleted with it. Call it when nothing is being written. `keep` lists
    checkpoints not to delete, including the one completed last.
    """
    if limit is None or limit <= 0:
        return
    for path in checkpoints(folder):
        if (path / BEGUN).is_file() and not (path / MARK).is_file() and not path.is_symlink():
            discard(path)
    kept = {Path(path).resolve() for path in keep if path is not None}
    oldest = [Path(path) for path in sort_checkpoints(str(folder), use_mtime=True)]
    oldest = [path.resolve() for path in oldest if not path.is_symlink()]
    marked = [path for path in oldest if (path / MARK).is_file()]
    surplus = len(marked) - max(limit, len(kept.intersection(marked)))
    for path in [p for p in marked if p not in kept][: max(surplus, 0)]:
        discard(path)


def set_later_aside(checkpoint: Path) -> list[Path]:
    """Rename checkpoints of later steps than this one, from which a run resumes.

    Otherwise the newest checkpoint would later belong to the abandoned continuation.
    """
    moved = []
    for path in checkpoints(checkpoint.parent):
        later = int(path.name.split("-")[1]) > int(checkpoint.name.split("-")[1])
        if later and (path / MARK).is_file():
            os.replace(path, aside := _name_aside(path))
            moved.append(aside)
    return moved


def _name_aside(path: Path) -> Path:
    """Return the name for a checkpoint that gives way to another: `abandoned-1-checkpoint-5`."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"abandoned-{number}-{path.name}")):
        number += 1
    return aside


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It counts as incomplete from the first moment on."""
    if (checkpoint / MARK).is_file():
        os.replace(checkpoint / MARK, checkpoint / BEGUN)
    for entry in list(checkpoint.iterdir()) if checkpoint.is_dir() else []:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != BEGUN:
            entry.unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


_FULL = (
    *("no space left", "os error 28", "disk quota", "file too large", "os error 27"),
    *("failed writing file", "unexpected pos", "iostream error"),  # torch.save, which does not say why
)
"""Parts of messages of C++ and Rust libraries that report a full disk, in errors that are not OSError."""
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def disk_failure(error: BaseException) -> str | None:
    """Return the disk's message if the error comes from a failed write; else None."""
    found: BaseException | None = error
    while found is not None:
        # Network errors are OSErrors too. An OSError that only preceded this error may not be about writing.
        disk = isinstance(found, OSError) and not isinstance(found, (ConnectionError, TimeoutError))
        if isinstance(found, OSError) and disk and found.errno and (found is error or found.errno in _WRITING):
            return f"{found.strerror}: {found.filename}" if found.filename else str(found.strerror)
        if isinstance(found, (RuntimeError, SafetensorError)) and any(said in str(found).lower() for said in _FULL):
            return str(found).splitlines()[0]
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            value = zlib.crc32(part, value)
    return value
