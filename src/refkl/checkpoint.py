"""Checkpoints with a mark that says that they are complete.

A trainer writes a checkpoint file by file, on all ranks, and can be killed between any two files. Therefore one file
marks the start of writing, and another, which is written last, marks the checkpoint as complete. The latter lists every
other file with its size, and the content's CRC-32 for files that policy and reference are loaded from. A checkpoint
without this mark, or one that differs from it, is never resumed from and never counts as one to keep.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import sort_checkpoints

from refkl.files import write_json
from refkl.messages import RunError

MARK = "refkl_complete.json"
"""File in a checkpoint: marks it as complete, and lists its files."""
BEGUN = "refkl_saving.json"
"""File in a checkpoint: refkl began to write it and has not completed it."""
RECORD = "reference.json"
"""File in a checkpoint: the reference that it was trained against, and each update of it."""
REFERENCE = "reference"
"""Folder in a checkpoint: a reference that cannot be rebuilt from the run's initial model."""
_CHECKED = re.compile(rf".*\.safetensors|{RECORD}|{REFERENCE}/.*|kl_penalty\.json")
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 24


class CheckpointError(RunError):
    """Error for a checkpoint that could not be written; the message says where, why, and which is the newest complete
    one."""


def begin(checkpoint: Path) -> None:
    """Make the folder, and delete what an interrupted save has left there."""
    if checkpoint.is_dir():
        discard(checkpoint)
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_json(checkpoint / BEGUN, {"complete": False})


def complete(checkpoint: Path) -> None:
    """Mark the checkpoint as complete. Call it when all ranks have written all of their files."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        if name not in (MARK, BEGUN):
            found[name] = {"bytes": path.stat().st_size}
            if _CHECKED.fullmatch(name):
                found[name]["crc32"] = _crc32(path)
    write_json(checkpoint / MARK, {"files": found})
    (checkpoint / BEGUN).unlink(missing_ok=True)


def why_not_whole(checkpoint: Path, *, without_reference: bool = False, contents: bool = True) -> str | None:
    """Return None if a checkpoint matches its mark; else the end of a sentence that names the problem.

    Args:
        checkpoint: its folder.
        without_reference: ignore the files of the reference.
        contents: also compare contents; otherwise only names and sizes, which reads no weights.
    """
    if not checkpoint.is_dir():
        return "is not there"
    if not (checkpoint / MARK).is_file():
        began = (checkpoint / BEGUN).is_file()
        return f"was not written to its end (no {MARK})" if began else f"is not marked as complete (no {MARK})"
    try:
        files: dict[str, dict[str, int]] = json.loads((checkpoint / MARK).read_text())["files"]
        items = [(name, about["bytes"], about.get("crc32")) for name, about in files.items()]
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"has a damaged {MARK}"
    for name, size, crc in items:
        path = checkpoint / name
        if without_reference and (name == RECORD or name.startswith(f"{REFERENCE}/")):
            continue
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} of the {size} bytes of {name}"
        if contents and crc is not None and _crc32(path) != crc:
            return f"has an altered {name}"
    return None


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

    Unlike transformers' own rotation it counts only marked checkpoints and leaves those written by others. Call it when
    nothing is being written. `keep` lists checkpoints not to delete, including the one completed last.
    """
    if limit is None or limit <= 0:
        return
    for path in checkpoints(folder):
        if (path / BEGUN).is_file() and not (path / MARK).is_file():
            discard(path)
    kept = {Path(path).resolve() for path in keep if path is not None}
    oldest = [Path(path).resolve() for path in sort_checkpoints(str(folder), use_mtime=True)]
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
            number = 1
            while (aside := path.with_name(f"abandoned-{number}-{path.name}")).exists():
                number += 1
            os.replace(path, aside)
            moved.append(aside)
    return moved


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


def state_of(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
