"""Weights in safetensors files, whole or in parts: each rank writes its own parts, and reads what it needs of any file.

torch.distributed.checkpoint writes the parts: nothing is gathered, and no rank holds more than one file of serialised
weights in addition to its own weights. Reading needs neither it nor the other ranks: files are memory-mapped, so a rank
loads only the elements that its layout has, for any layout and number of ranks that wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, SavePlan, SavePlanner, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from refkl.backend import Block, Layout, Run, Weight

_OFFSETS = "DCP_SHARDING_INFO"
"""Metadata key of a file with the start of each part ("saved_offsets")."""
_FILE_BYTES = 1 << 32
"""Bytes of whole weights whose parts go into one file on each rank and are serialised together."""


def write_parts(folder: Path, weights: list[Weight]) -> None:
    """Write each rank's parts of sharded weights into its own files. Every rank must call.

    Raises:
        OSError: one rank could not write; raised on every rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), _file_of_each(weights), save_distributed=True)
    try:
        save({}, storage_writer=writer, planner=_OwnParts(weights))
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror} (rank {rank})", cause.filename) from None
        raise RuntimeError(f"Rank {rank} could not write its parts into {folder}: {cause}") from None


def _file_of_each(weights: Iterable[Weight]) -> dict[str, int]:
    """Return a file number for each weight."""
    numbers, held = {}, 0
    for name, local, layout in weights:
        numbers[name] = held // _FILE_BYTES + 1
        held += prod(layout.shape) * local.element_size()
    return numbers


class _OwnParts(SavePlanner):
    """Plan for torch.distributed.checkpoint of the parts that this rank writes. One rank writes a part that several
    hold."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = {w.name: w for w in weights if w.layout.counted and any(w.layout.runs())}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(weight) for weight in self.weights.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        _, local, layout = self.weights[write_item.index.fqn]
        return layout.part(local).detach().to("cpu", copy=True).contiguous()


def _item(weight: Weight) -> WriteItem:
    block = weight.layout.block()
    start, shape = torch.Size(block.start), torch.Size(block.shape)
    chunk, properties = ChunkStorageMetadata(start, shape), TensorProperties(dtype=weight.local.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(block.whole))
    return WriteItem(MetadataIndex(weight.name, start), WriteItemType.SHARD, tensor_data=data)


class Files:
    """Weights in safetensors files of a folder, whole or in parts.

    Args:
        folder: folder of the files.
        names: names of the files.
        shapes: shapes of the whole weights.

    Raises:
        ValueError: a file is missing or cut short; a part of a weight is missing.
    """

    def __init__(self, folder: Path, names: Iterable[str], shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes
        self._open: dict[Path, Any] = {}
        self._parts: dict[str, list[tuple[Path, Block]]] = {name: [] for name in shapes}
        for path in (folder / name for name in names):
            for name, start, shape in self._listed(path):
                if name in shapes:
                    total = tuple(shapes[name]) if len(shape) == len(shapes[name]) else (prod(shapes[name]),)
                    self._parts[name].append((path, Block(total, tuple(start), tuple(shape))))
        for name, parts in self._parts.items():
            found = sum(prod(block.shape) for _, block in parts)
            if found != prod(shapes[name]):
                raise ValueError(f"{folder} has {found} of the {prod(shapes[name])} elements of {name}: it is damaged.")

    def _listed(self, path: Path) -> list[tuple[str, list[int], list[int]]]:
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
        try:
            file = self._open[path] = safe_open(path, framework="pt")
            offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return [
                (name, offsets[name]["saved_offsets"] if offsets else [0] * len(shape), shape)
                for name, shape in shapes.items()
            ]
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read, so it is damaged or cut short: {error}") from None

    def read(self, name: str, layout: Layout) -> Tensor:
        """Return a layout's part of a weight, in newly allocated memory."""
        found: Tensor | None = None
        for path, block in self._parts[name]:
            stored = self._open[path].get_tensor(name).reshape(-1)  # memory-mapped: nothing is read yet
            if found is None:
                found = layout.empty(stored.dtype)
            into = found.view(-1)
            for own, theirs, length in _overlaps(layout.runs(), block.runs()):
                into[own : own + length] = stored[theirs : theirs + length]
        assert found is not None, "each weight was found when the files were listed"
        return found


def _overlaps(own: Iterator[Run], theirs: Iterator[Run]) -> Iterator[tuple[int, int, int]]:
    """Yield each range of elements that two parts of one weight share: its start in each part, and its length."""
    a, b = next(own, None), next(theirs, None)
    while a is not None and b is not None:
        first, last = max(a.whole, b.whole), min(a.whole + a.length, b.whole + b.length)
        if first < last:
            yield a.local + first - a.whole, b.local + first - b.whole, last - first
        if a.whole + a.length <= b.whole + b.length:
            a = next(own, None)
        else:
            b = next(theirs, None)
