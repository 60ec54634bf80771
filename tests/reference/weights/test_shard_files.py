"""A saved reference: in parts where it is sharded, readable from any layout, and refused where it is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.launching import accelerate_launch
from support.layouts import Piece
from support.models import batch, llama
from torch import Tensor
from transformers import LlamaForCausalLM

from refkl import Reference, build_reference
from refkl.backend import Block, Layout, Whole
from refkl.reference.weights import saved
from refkl.reference.weights.shard_files import Files


class Rectangle(Piece):
    """Rows or columns `start` to `start + length` of a matrix."""

    columns = False

    def cut(self, whole: Tensor) -> Tensor:
        return whole.narrow(int(self.columns), self.start, self.length)

    def block(self) -> Block:
        rows, columns = self.shape
        if self.columns:
            return Block((rows, columns), (0, self.start), (rows, self.length))
        return Block((rows, columns), (self.start, 0), (self.length, columns))


class Columns(Rectangle):
    columns = True


SPLITS: dict[str, list[tuple[type[Layout], int, int]]] = {
    "whole": [(Whole, 0, 0)],
    "flat in 2": [(Piece, 0, 12), (Piece, 12, 11 + 12)],
    "flat in 3, the last empty": [(Piece, 0, 20), (Piece, 20, 15), (Piece, 35, 0)],
    "rows in 2": [(Rectangle, 0, 3), (Rectangle, 3, 2)],
    "columns in 3": [(Columns, 0, 3), (Columns, 3, 3), (Columns, 6, 1)],
}


def layouts(split: str, shape: torch.Size) -> list[Layout]:
    return [cls(shape) if cls is Whole else cls(shape, start, length) for cls, start, length in SPLITS[split]]


@pytest.mark.parametrize("read", SPLITS)
@pytest.mark.parametrize("written", SPLITS)
def test_any_layout_reads_what_any_other_wrote(written: str, read: str, tmp_path: Path) -> None:
    weight = torch.arange(35, dtype=torch.float32).view(5, 7)
    names = []
    for number, layout in enumerate(layouts(written, weight.shape)):
        if not layout.block().shape[0]:
            continue
        names.append(f"shard-{number}.safetensors")
        offsets = json.dumps({"w": {"saved_offsets": layout.block().start}})
        save_file({"w": layout.cut(weight).contiguous()}, tmp_path / names[-1], {"DCP_SHARDING_INFO": offsets})
    files = Files(tmp_path, names, {"w": weight.shape})
    for layout in layouts(read, weight.shape):
        assert torch.equal(files.read("w", layout), layout.cut(weight))


def moved(folder: Path | None = None) -> Reference:
    """A reference that has averages and first weights beside its own."""
    torch.manual_seed(0)
    policy = llama() if folder is None else LlamaForCausalLM.from_pretrained(folder)
    reference = build_reference(policy, "clone")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference.update(policy, alpha=0.5, bias=0.25)
    return reference


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_two_processes_save_parts_that_one_loads(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    moved(tmp_path / "model").save(tmp_path / "whole")
    config = {"fsdp2": "multi"}.get(backend, backend)
    flags = ("--gradient_accumulation_steps", "1") if backend == "zero3" else ()
    output = accelerate_launch(config, "tests/scripts/saved_parts.py", backend, str(tmp_path), flags=flags)
    assert "saved and loaded" in output
    shards = sorted(path.name for path in (tmp_path / "parts").glob("shard-*"))
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]
    sizes = [(tmp_path / "parts" / name).stat().st_size for name in shards]
    assert max(sizes) < 0.55 * sum(sizes)  # neither holds all
    clone = build_reference(llama(), "clone")
    clone.load(tmp_path / "parts")
    right = torch.load(tmp_path / "scores.pt")
    assert clone.fingerprint() == right["fingerprint"] and clone.updates == 2
    torch.testing.assert_close(clone.score(batch()).logp, right["logp"], rtol=0, atol=2e-6)
    assert len(list(clone._mover.averages.weights())) == 2 * len(clone.digests)


def damage_truncated(folder: Path) -> str:
    path = folder / saved.WEIGHTS_FILE
    os.truncate(path, path.stat().st_size - 4)
    return r"reference\.safetensors cannot be read, so it is damaged or cut short"


def damage_flipped(folder: Path) -> str:
    path = folder / saved.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    return r"model\.\S+ was altered"


def damage_header(folder: Path) -> str:
    path = folder / saved.WEIGHTS_FILE
    data = path.read_bytes()
    path.write_bytes(data.replace(b"model.norm.weight", b"model.norm.wejght"))
    return r"has 0 of the 32 elements of (mean:|first:)?model\.norm\.weight"


def damage_missing(folder: Path) -> str:
    (folder / saved.WEIGHTS_FILE).unlink()
    return r"reference\.safetensors is missing"


def damage_record(folder: Path) -> str:
    path = folder / saved.PROVENANCE_FILE
    path.write_text(path.read_text()[:-20])
    return r"reference\.json is damaged"


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_flipped, damage_header, damage_missing, damage_record], ids=lambda d: d.__name__
)
def test_what_is_damaged_is_named_and_nothing_changes(damage: object, tmp_path: Path) -> None:
    moved().save(tmp_path / "saved")
    message = damage(tmp_path / "saved")  # type: ignore[operator]
    reference = build_reference(llama(), "clone")
    before = reference.fingerprint()
    with pytest.raises(ValueError, match=message):
        reference.load(tmp_path / "saved")
    assert reference.fingerprint() == before and not list(reference._mover.averages.weights())


class Killed(BaseException):
    pass


def test_a_save_that_is_killed_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename, before and after it."""
    first = build_reference(llama(), "clone")
    second, folder = moved(), tmp_path / "saved"
    prints = {first.fingerprint(), second.fingerprint()}
    rename, found = os.rename, []
    for number in range(4):
        monkeypatch.undo()
        first.save(folder)
        left = [number]

        def count(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        def counted(a: Path, b: Path) -> None:
            count()
            rename(a, b)
            count()

        monkeypatch.setattr(os, "rename", counted)
        with pytest.raises(Killed):
            second.save(folder)
        third = moved()
        third.load(folder)
        assert third.fingerprint() in prints
        found.append(third.fingerprint() == second.fingerprint())
    assert found == [False, False, False, True]
    monkeypatch.undo()
    first.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt' .* Name a folder for the reference only"):
        build_reference(llama(), "clone").save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
