"""A reference in a folder: weights in safetensors, and in JSON what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from refkl.backend import Weight, Whole
from refkl.reference.fingerprint import digests

WEIGHTS_FILE = "reference.safetensors"
PROVENANCE_FILE = "reference.json"


def write_saved(folder: Path, weights: Iterable[Weight], provenance: Callable[[], dict[str, Any]]) -> None:
    """Write a reference, whole or not at all. Collective if a weight is sharded; `provenance` may be too."""
    writes = not dist.is_initialized() or dist.get_rank() == 0
    found: dict[str, torch.Tensor] = {}
    sharded = False
    for name, local, layout in weights:
        sharded |= layout.sharded
        whole = layout.join(local)
        if writes:
            found[name] = whole.to("cpu", copy=True).contiguous()
    record = provenance()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(found, folder / f"{WEIGHTS_FILE}.tmp", metadata={"format": "pt"})
        os.replace(folder / f"{WEIGHTS_FILE}.tmp", folder / WEIGHTS_FILE)
        write_json(folder / PROVENANCE_FILE, record)
    if sharded:
        dist.barrier()


def write_json(path: Path, content: Any) -> None:
    """Whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


class Saved:
    """What `write_saved` left in a folder.

    Raises:
        ValueError: it left nothing there.
    """

    def __init__(self, folder: Path) -> None:
        if not ((folder / WEIGHTS_FILE).is_file() and (folder / PROVENANCE_FILE).is_file()):
            raise ValueError(f"{folder} holds no saved reference ({WEIGHTS_FILE} and {PROVENANCE_FILE}).")
        self.folder = folder
        self.provenance: dict[str, Any] = json.loads((folder / PROVENANCE_FILE).read_text())
        with self._open() as file:
            # Of the weights that are in the file; those that were shared with the policy have a digest alone.
            names = [name for name in file.keys() if name not in self.provenance.get("averages", {})]  # noqa: SIM118
            self.shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in names}

    @property
    def digests(self) -> dict[str, str]:
        """Of every weight, by name."""
        found: dict[str, str] = self.provenance["weights"]
        return found

    def changed(self, own: dict[str, str], owns: Callable[[str], bool]) -> set[str]:
        """Names of the weights that differ from a reference's, given its digests.

        Raises:
            ValueError: a weight was altered since it was saved, has another dtype, or differs and is not `owns`.
        """
        with self._open() as file:
            found = digests(Weight(name, file.get_tensor(name), Whole(shape)) for name, shape in self.shapes.items())
        for name, digest in self.digests.items():
            if name in found and digest != found[name]:
                raise ValueError(
                    f"The reference saved in {self.folder} is not the one that was recorded: {name} was altered."
                )
            if digest.split()[0] != own[name].split()[0]:
                raise ValueError(
                    f"The reference saved in {self.folder} holds {name} as {digest.split()[0]}, this one as "
                    f"{own[name].split()[0]}. Set reference.dtype to the saved one's."
                )
            if digest != own[name] and not (name in found and owns(name)):
                raise ValueError(
                    f"{name} is shared with the policy, and the reference saved in {self.folder} has another: it "
                    "belongs to a policy with another base. Load that base, or set reference.source to where it is."
                )
        return {name for name, digest in found.items() if digest != own[name]}

    def averages(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a moving reference kept beside its weights, whole.

        Raises:
            ValueError: one was altered since it was saved.
        """
        with self._open() as file:
            for name, digest in self.provenance.get("averages", {}).items():
                tensor = file.get_tensor(name)
                if digests([Weight(name, tensor, Whole(tensor.shape))])[name] != digest:
                    raise ValueError(
                        f"The reference saved in {self.folder} is not the one that was recorded: {name} was altered."
                    )
                yield name, tensor

    def copy_into(self, weights: Iterable[Weight]) -> None:
        """Put what was saved into these, each rank its own part."""
        with self._open() as file:
            for name, local, layout in weights:
                local.copy_(layout.cut(file.get_tensor(name)))

    def _open(self) -> Any:
        return safe_open(self.folder / WEIGHTS_FILE, framework="pt")
