"""A reference in a folder: weights in safetensors, whole or each rank's parts, and a JSON record of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors.torch import save_file

from refkl.backend import Layout, Weight, Whole
from refkl.files import (
    FolderLock,
    replaced_beside,
    replaced_of,
    temporaries_of,
    temporary_beside,
    write_json,
)
from refkl.reference.weights.fingerprint import digests
from refkl.reference.weights.record import Record, read_record
from refkl.reference.weights.shard_files import Files, write_parts

WEIGHTS_FILE = "reference.safetensors"
"""File of the weights that every rank holds whole."""
PROVENANCE_FILE = "reference.json"
_WRITER = ".refkl_writer"
"""File in a temporary folder that the process that writes the folder holds locked."""
_OURS = re.compile(rf"{PROVENANCE_FILE}|{re.escape(_WRITER)}|{WEIGHTS_FILE}|shard-\d+-model-\d+-of-\d+\.safetensors")


def write_saved(folder: Path, weights: Iterable[Weight], provenance: Callable[[], dict[str, Any]]) -> None:
    """Write a reference completely or not at all: into a temporary folder, which replaces `folder` at the end.

    Temporary folders of saves that were killed are deleted, and nothing else beside `folder`.

    Collective if a weight is sharded: then each rank writes its own parts. `provenance` may be collective too.

    Raises:
        ValueError: the folder holds other files, or is not on a disk that all ranks share.
        OSError: the folder could not be written; if ranks write together, raised on each of them.
    """
    found, folder = list(weights), folder.resolve()
    sharded = [weight for weight in found if weight.layout.sharded]
    record = provenance()
    if not sharded and dist.is_initialized() and dist.get_rank() != 0:
        return
    temporary = _on_first(lambda: temporary_beside(folder), together=bool(sharded))
    shapes = {w.name: w.layout.shape for w in found}
    locks: list[FolderLock] = []

    def begin() -> None:
        check_replaceable(folder)
        _delete_abandoned(folder)
        temporary.mkdir(parents=True)
        locks.append(FolderLock(temporary / _WRITER))

    def finish() -> None:
        whole = {w.name: w.local.detach().to("cpu", copy=True).contiguous() for w in found if not w.layout.sharded}
        if whole or not sharded:
            save_file(whole, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        names = sorted(path.name for path in temporary.glob("*.safetensors"))
        try:
            Files(temporary, names, shapes)
        except ValueError as error:
            raise ValueError(f"{error} If several ranks write, the folder must be on a disk that they share.") from None
        contents = {"files": names, "shapes": {name: list(shape) for name, shape in shapes.items()}}
        write_json(temporary / PROVENANCE_FILE, {**record, **contents})
        replace_folder(temporary, folder)
        (folder / _WRITER).unlink()

    try:
        _on_first(begin, together=bool(sharded))
        if sharded:
            write_parts(temporary, sharded)
        _on_first(finish, together=bool(sharded))
    except BaseException:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        for lock in locks:
            lock.release()


_Result = TypeVar("_Result")


def _on_first(step: Callable[[], _Result], *, together: bool) -> _Result:
    """Run `step` on rank 0. With `together`, all ranks call this, wait for rank 0, and return its result or raise its
    error."""
    if not together:
        return step()
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = step()
        except Exception as error:  # any error: the other ranks wait for it
            own = error
    if own is not None:  # sent as text: not every exception can be sent
        kind = ValueError if isinstance(own, ValueError) else OSError
        outcome[1] = kind(str(own)) if not isinstance(own, OSError) else OSError(own.errno, own.strerror)
    dist.broadcast_object_list(outcome, src=0)
    if own is not None or outcome[1] is not None:
        raise own or outcome[1]
    result: _Result = outcome[0]
    return result


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if a folder holds other files than a saved reference: these would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a reference is saved as a folder. Name another folder.")
    if others := _others(folder):
        raise ValueError(
            f"{folder} holds {sorted(others)[0]!r} ({len(others)} other files), but a saved reference replaces the "
            "whole folder. Name a folder for the reference only."
        )


def _others(folder: Path) -> list[str]:
    """List what is in a folder besides the files of a saved reference."""
    if not folder.is_dir():
        return []
    return [entry.name for entry in folder.iterdir() if not (_OURS.fullmatch(entry.name) and entry.is_file())]


def replace_folder(new: Path, folder: Path) -> None:
    """Replace a folder by another. If the process is killed in between, `_settled` still finds the old one."""
    if folder.exists() and any(folder.iterdir()):
        os.rename(folder, replaced_beside(folder))
    os.rename(new, folder)
    for old in _set_aside(folder):
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(folder: Path) -> list[Path]:
    """List the references that `replace_folder` renamed while it replaced them, the newest last."""
    found = [p for p in replaced_of(folder) if not p.is_symlink() and (p / PROVENANCE_FILE).is_file()]
    return sorted((p for p in found if not _others(p)), key=lambda p: p.stat().st_ctime_ns)


def _delete_abandoned(folder: Path) -> None:
    """Delete the temporary folders of saves that were killed: refkl's names and files, and no process writes there."""
    for left in temporaries_of(folder):
        if left.is_symlink() or not (left / _WRITER).is_file() or _others(left):
            continue
        try:
            lock = FolderLock(left / _WRITER)
        except OSError:
            continue  # its process is alive, or the folder is gone
        shutil.rmtree(left, ignore_errors=True)
        lock.release()


def _settled(folder: Path) -> Path:
    """Return the folder that holds the reference saved as `folder`."""
    folder = folder.resolve()
    return folder if folder.exists() else next(reversed(_set_aside(folder)), folder)


class Saved:
    """The files that `write_saved` left in a folder.

    Raises:
        ValueError: the folder holds no saved reference, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _settled(folder)
        path = self.folder / PROVENANCE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no saved reference ({PROVENANCE_FILE} and its weights).")
        self.record: Record = read_record(path)
        self.digests, self.averaged = self.record.weights, self.record.averages
        self._files = Files(self.folder, self.record.files, self.record.shapes)
        # Shapes of the weights that are in the files; weights shared with the policy have only a digest.
        self.shapes = {name: shape for name, shape in self.record.shapes.items() if name not in self.averaged}

    def changed(self, own: dict[str, str], owns: Callable[[str], bool], layouts: dict[str, Layout]) -> set[str]:
        """Return the names of the weights that differ from a reference's, given its digests and layouts.

        Collective if the reference holds a weight sharded: each rank reads its own parts, and ranks exchange their
        sums.

        Raises:
            ValueError: a weight or an average was altered since it was saved; a weight has another dtype; a weight
                differs but does not belong to the reference only (`owns`).
        """
        names = [*self.shapes, *self.averaged]
        found = digests(Weight(n, self._files.read(n, lay), lay) for n in names for lay in [self._layout(n, layouts)])
        for name, digest in {**self.digests, **self.averaged}.items():
            if name in found and digest != found[name]:
                raise ValueError(
                    f"The reference saved in {self.folder} does not match its record: {name} was altered. Use another "
                    "copy of the folder, or save the reference again."
                )
        for name, digest in self.digests.items():
            if digest.split()[0] != own[name].split()[0]:
                raise ValueError(
                    f"The reference saved in {self.folder} holds {name} as {digest.split()[0]}, this one as "
                    f"{own[name].split()[0]}. Set reference.dtype to the saved dtype."
                )
            if digest != own[name] and not (name in found and owns(name)):
                raise ValueError(
                    f"{name} is shared with the policy, but differs in the reference saved in {self.folder}: that "
                    "reference belongs to a policy with another base. Load that base, or set reference.source to its "
                    "folder."
                )
        return {name for name in self.shapes if found[name] != own[name]}

    def averages(self, layouts: dict[str, Layout]) -> Iterator[Weight]:
        """Yield the averages that a moving reference kept beside its weights, sharded like the weights."""
        for name in self.averaged:
            layout = self._layout(name, layouts)
            yield Weight(name, self._files.read(name, layout), layout)

    def copy_into(self, weights: Iterable[Weight]) -> None:
        """Copy the saved values into these weights, each rank into its own part."""
        for name, local, layout in weights:
            local.copy_(self._files.read(name, layout))

    def _layout(self, name: str, layouts: dict[str, Layout]) -> Layout:
        own = layouts.get(name.split(":", 1)[1] if name in self.averaged else name)
        # A quantised weight's bytes have other names than the averages from which they are written, and a LoRA layer
        # may have another rank than at first; neither is sharded.
        return own if own is not None and own.shape == self._files.shapes[name] else Whole(self._files.shapes[name])
