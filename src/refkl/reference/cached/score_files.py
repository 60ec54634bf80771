"""Scores on disk: Arrow files, each written completely or not at all, and each named by the checksum of its contents.

A file is written under a temporary name, renamed, and never written again. So processes that share a folder need no
lock, and the checksum of a truncated or altered file does not match its name. One row of a file is one row of a batch:
its key, and its values at the scored tokens in order.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import weakref
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from refkl.files import temporaries_of, temporary_beside

KEY_BYTES = 16
WRITE_BYTES = 16 << 20
"""Bytes of values that are collected before a file is written."""
WRITE_SECONDS = 30.0
"""The longest time between writes, checked at each score. Scores that a killed process had not written are lost and
computed again."""
SCAN_SECONDS = 5.0
"""The shortest time between two listings of the folder for files that other processes have written."""
_STEM = "scores"
"""Part of the names of temporary files: only files with such names are deleted."""
ABANDONED_SECONDS = 24 * 3600.0
"""Age at which a temporary file counts as left behind by a killed process."""


class Row(NamedTuple):
    """The values of one row's scored tokens."""

    logp: np.ndarray[Any, Any]
    """[n] nats."""
    entropy: np.ndarray[Any, Any]
    """[n] nats, or [0] if it was not asked for."""


class ScoreStore:
    """The scores of one reference under one set of conditions: one folder of files.

    Args:
        folder: created if it does not exist.
        about: the conditions of the scores. Each file records them, and a file with other conditions is not used.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.bytes = 0
        """Bytes of the files that were read."""
        folder.mkdir(parents=True, exist_ok=True)
        for left in temporaries_of(folder / _STEM):
            with suppress(FileNotFoundError):  # renamed since it was listed
                if left.is_file() and time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        self._about = json.dumps(about, sort_keys=True)
        self._rows: dict[bytes, Row] = {}
        self._seen: set[str] = set()
        self._unwritten = _Unwritten(folder, self._about)
        self._scanned = 0.0
        # Also writes when the process ends, without keeping the store itself alive.
        weakref.finalize(self, self._unwritten.write)
        self.scan()

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, keys: Iterable[bytes], *, scan: bool = False) -> dict[bytes, Row]:
        """Return the rows that are stored. If one is missing, list the folder again: with `scan` always, otherwise at
        most every SCAN_SECONDS."""
        keys = list(keys)
        late = time.monotonic() - self._scanned > SCAN_SECONDS
        if (scan or late) and any(key not in self._rows for key in keys):
            self.scan()
        return {key: self._rows[key] for key in keys if key in self._rows}

    def add(self, rows: dict[bytes, Row]) -> None:
        """Keep these rows; write them if it is time."""
        self._rows |= rows
        self._unwritten.add(rows)
        if self._unwritten.due:
            self.write()

    def write(self) -> None:
        """Write the rows that are not on disk yet."""
        path = self._unwritten.write()
        if path is not None:
            self._take(path)

    def scan(self) -> None:
        """Read new files."""
        for path in sorted(self.folder.glob("*.arrow")):
            if path.name not in self._seen:
                self._take(path)
        self._scanned = time.monotonic()

    def _take(self, path: Path) -> None:
        """Read a file. Warn once about a file that cannot be used."""
        self._seen.add(path.name)
        try:
            data = path.read_bytes()
            self._rows |= _rows_of(data, path, self._about)
            self.bytes += len(data)
        except FileNotFoundError:
            return  # deleted since it was listed
        except (_Unusable, OSError) as error:
            warnings.warn(
                f"{path} in the cache of scores is not used: {error}. Its rows are scored again. You can delete it.",
                stacklevel=2,
            )


class _Unusable(Exception):
    """Error for a file whose contents cannot be used."""


class _Unwritten:
    """Rows that are not on disk yet."""

    def __init__(self, folder: Path, about: str) -> None:
        self.folder = folder
        self.about = about
        self.rows: dict[bytes, Row] = {}
        self.bytes = 0
        self.since = time.monotonic()

    def add(self, rows: dict[bytes, Row]) -> None:
        if not self.rows:
            self.since = time.monotonic()
        self.rows |= rows
        self.bytes += sum(row.logp.nbytes + row.entropy.nbytes for row in rows.values())

    @property
    def due(self) -> bool:
        return self.bytes >= WRITE_BYTES or time.monotonic() - self.since >= WRITE_SECONDS

    def write(self) -> Path | None:
        """Write all rows as one complete file and return its path; None if there are no rows."""
        if not self.rows:
            return None
        data = _file_of(self.rows, self.about)
        path = self.folder / _name_of(data)
        temporary = temporary_beside(self.folder / _STEM)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self.rows, self.bytes = {}, 0
        return path


def _name_of(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()[:32]}.arrow"


def _file_of(rows: dict[bytes, Row], about: str) -> bytes:
    columns = {"key": pa.array(list(rows), pa.binary(KEY_BYTES))}
    for number, name in enumerate(Row._fields):
        values = [row[number] for row in rows.values()]
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
        columns[name] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(values)))
    batch = pa.record_batch(columns).replace_schema_metadata({"refkl": about})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _rows_of(data: bytes, path: Path, about: str) -> dict[bytes, Row]:
    if _name_of(data) != path.name:
        raise _Unusable("its checksum is not the one in its name, so it was cut off or altered, or is another file")
    try:
        batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    except pa.ArrowException as error:
        raise _Unusable(f"it is not an Arrow file ({error})") from None
    if (batch.schema.metadata or {}).get(b"refkl") != about.encode():
        raise _Unusable("its scores are of another reference, or were computed in another way")
    parts = []
    for name in Row._fields:
        lists = batch.column(name)
        values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        parts.append([values[start:end] for start, end in pairwise(offsets)])
    return {key: Row(*values) for key, *values in zip(batch.column("key").to_pylist(), *parts, strict=True)}
