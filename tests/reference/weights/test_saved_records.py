"""What a save leaves beside it is left alone, and a damaged record changes nothing in the reference that loads it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, gpt2, llama
from torch import nn

from refkl import Reference, ReferenceConfig, build_reference
from refkl.files import FolderLock, replaced_beside, temporary_beside
from refkl.reference.weights import saved
from refkl.reference.weights.fingerprint import combined


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True))


def moved_policy(policy: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def partly(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "ln_" in name)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], Any, bool]] = {
    "clone": (llama, "clone", False),
    "clone, moved": (llama, "clone", True),
    "clone, moved, gpt2": (gpt2, "clone", True),
    "swap": (lambda: partly(llama()), "swap", False),
    "swap, averaged": (lambda: partly(gpt2()), "swap", True),
    "adapter": (lambda: lora(llama()), "adapter", False),
    "adapter, moved": (lambda: lora(llama()), "adapter", True),
    "bf16, averaged": (llama, ReferenceConfig(strategy="clone", dtype="bfloat16"), True),
    "quantised": (llama, ReferenceConfig(strategy="clone", quantize="int8"), True),
}


def built(case: str, seed: int, *, move: bool | None = None) -> Reference:
    make, how, moves = CASES[case]
    torch.manual_seed(0)
    policy = make()
    reference = build_reference(policy, how)
    reference.score(batch())  # measures a KL floor
    torch.manual_seed(seed)
    if moves if move is None else move:
        reference.keep_first()
        reference.update(moved_policy(policy), alpha=0.5)
    reference.fingerprint()
    return reference


def state(reference: Reference) -> dict[str, Any]:
    mover = reference._mover  # type: ignore[attr-defined]
    return {
        "scores": reference.score(batch()).logp.clone(),
        "scored as": reference.scored_as,
        "recorded": reference.recorded_fingerprint,
        "digests": dict(reference.digests),
        "updates": reference.updates,
        "last": reference.last_update,
        "strategy": (reference.strategy, reference.reason),
        "initial": mover.initial_fingerprint,
        "kept": {w.name: w.local.clone() for w in mover.averages.weights()},
        "floor": reference.kl_floor,
    }


def assert_same(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(record: dict[str, Any]) -> None:
        record[name] = value

    return damage


def delete(name: str) -> Callable[[dict[str, Any]], None]:
    def damage(record: dict[str, Any]) -> None:
        del record[name]

    return damage


def first_of(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(record: dict[str, Any]) -> None:
        record[field][next(iter(record[field]))] = value

    return damage


def unknown_average(record: dict[str, Any]) -> None:
    name = next(iter(record["shapes"]))
    record["averages"]["second:" + name] = record["weights"].get(name, "torch.float32 [1] " + "0" * 16)


def one_weight_less(record: dict[str, Any]) -> None:
    record["weights"].pop(next(iter(record["weights"])))


def fingerprint_follows(record: dict[str, Any]) -> None:
    name = next(iter(record["weights"]))
    record["weights"][name] = record["weights"][name][:-16] + "0" * 16
    record["fingerprint"] = combined(record["weights"])


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"updates {value!r}": set_field("updates", value) for value in (-5, 1.5, True, "3", None, float("nan"), [1])},
    **{f"fingerprint {value!r}": set_field("fingerprint", value) for value in (None, "x", "0" * 64, 3)},
    **{f"first {value!r}": set_field("first", value) for value in (1, "x", ["a"])},
    **{f"files {value!r}": set_field("files", value) for value in (
        ["../reference.safetensors"], ["/etc/passwd"], ["a/../reference.safetensors"], "reference.safetensors", [3],
        [".."], ["sub/reference.safetensors"], None, {}, ["reference.json"],
    )},
    **{f"shapes {value!r}": first_of("shapes", value) for value in ([-1, 2], ["2"], 3, [1.5], None, [2**70])},
    **{f"weights {value!r}": first_of("weights", value) for value in ("", None, "torch.float32 [2]", 7)},
    **{f"averages {value!r}": set_field("averages", value) for value in (None, [], {"mean:x": 3})},
    **{f"scalings {value!r}": set_field("scalings", value) for value in (
        {"a": "2"}, {"a": float("inf")}, {"a": None}, [], 3
    )},
    **{f"kl_floor {value!r}": set_field("kl_floor", value) for value in (3, {}, {"mean": "a", "max": 1, "tokens": 2})},
    **{f"no {name}": delete(name) for name in ("updates", "fingerprint", "files", "shapes", "weights", "averages")},
    "an average of an unknown kind": unknown_average,
    "a weight less": one_weight_less,
    "another digest": fingerprint_follows,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in known:
            known[case] = tmp_path_factory.mktemp("saved") / "reference"
            built(case, seed=1, move=True).save(known[case])
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_record_changes_nothing(case: str, folders: Callable[[str], Path]) -> None:
    folder = folders(case)
    path = folder / saved.PROVENANCE_FILE
    right = json.loads(path.read_text())
    reference = built(case, seed=2)
    before = state(reference)
    try:
        for name, damage in DAMAGES.items():
            record = copy.deepcopy(right)
            damage(record)
            path.write_text(json.dumps(record))
            with pytest.raises(ValueError, match=r"\S+ .*\.") as raised:
                reference.load(folder)
            assert str(folder) in str(raised.value), name
            assert_same(before, state(reference))
        for text in ("", "[" * 100_000, '{"a":' * 100_000, "[]", "\xff", path.read_text()[:-9]):
            path.write_bytes(text.encode("latin-1"))
            start = time.monotonic()
            with pytest.raises(ValueError, match="is damaged"):
                reference.load(folder)
            assert time.monotonic() - start < 1.0
            assert_same(before, state(reference))
    finally:
        path.write_text(json.dumps(right))
    reference.load(folder)
    assert reference.fingerprint() == right["fingerprint"] and reference.updates == 1


@pytest.mark.parametrize("case", ["clone, moved", "swap, averaged", "adapter", "bf16, averaged"])
def test_damaged_weights_change_nothing(case: str, folders: Callable[[str], Path]) -> None:
    path = folders(case) / saved.WEIGHTS_FILE
    right = path.read_bytes()
    reference = built(case, seed=2)
    before = state(reference)
    flipped = [bytearray(right) for _ in range(4)]
    for number, data in enumerate(flipped):
        data[len(data) - 1 - number * (len(data) // 5)] ^= 4
    try:
        for data in (*map(bytes, flipped), right[:-5], b"", right[:100]):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"\."):
                reference.load(path.parent)
            assert_same(before, state(reference))
    finally:
        path.write_bytes(right)


def test_files_that_change_during_the_load_are_noticed(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference then refuses to score, until it is loaded again."""
    reference = built("clone", seed=2)
    folder = folders("clone")

    def altered(self: saved.Saved, weights: Any) -> None:
        for name, local, layout in weights:
            local.copy_(self._files.read(name, layout) + 1)

    with monkeypatch.context() as patched:
        patched.setattr(saved.Saved, "copy_into", altered)
        with pytest.raises(ValueError, match="changed while they were loaded"):
            reference.load(folder)
    with pytest.raises(ValueError, match="half-way"):
        reference.score(batch())
    reference.load(folder)
    reference.score(batch())


def test_siblings_of_a_saved_reference_are_left_alone(tmp_path: Path) -> None:
    """Also those with names like refkl's own temporary ones."""
    reference, folder = built("clone", seed=1), tmp_path / "ref"
    others = [tmp_path / name for name in ("ref.old", "ref.tmp", ".ref.tmp", ".ref.refkl-tmp", ".ref.old")]
    others += [temporary_beside(folder), replaced_beside(folder), temporary_beside(tmp_path / "other")]
    for number, other in enumerate(others):
        other.mkdir()
        (other / "thesis.txt").write_text(str(number))
        if number % 2:
            (other / saved.PROVENANCE_FILE).write_text("{}")
            (other / saved._WRITER).write_text("")
    link = temporary_beside(folder)
    link.symlink_to(others[0])
    file = temporary_beside(folder)
    file.write_text("mine")
    for _ in range(3):
        reference.save(folder)
    assert [(other / "thesis.txt").read_text() for other in others] == [str(n) for n in range(len(others))]
    assert link.is_symlink() and file.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (*others, link, file, folder)}


def test_what_a_killed_save_left_is_deleted_unless_it_is_still_written(tmp_path: Path) -> None:
    reference, folder = built("clone", seed=1), tmp_path / "ref"
    dead, alive = temporary_beside(folder), temporary_beside(folder)
    for left in (dead, alive):
        left.mkdir()
        (left / saved.WEIGHTS_FILE).write_bytes(b"half")
        (left / saved._WRITER).write_text("")
    code = (
        "import sys; from pathlib import Path; from refkl.files import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(alive / saved._WRITER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        reference.save(folder)
        assert not dead.exists() and (alive / saved.WEIGHTS_FILE).read_bytes() == b"half"
    finally:
        process.kill()
        process.wait()
    reference.save(folder)
    assert not alive.exists()


def test_a_killed_replacement_is_found_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, folder = built("clone", seed=1), built("clone", seed=2, move=True), tmp_path / "ref"
    first.save(folder)
    old = replaced_beside(folder)
    os.rename(folder, old)  # killed here
    decoy = replaced_beside(folder)
    decoy.mkdir()
    (decoy / "notes.txt").write_text("mine")
    second.load(folder)
    assert second.fingerprint() == first.fingerprint()
    first.save(folder)
    assert not old.exists() and (decoy / "notes.txt").read_text() == "mine"


def test_a_file_or_a_folder_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    reference = built("clone", seed=1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, and a reference is saved as a folder"):
        reference.save(tmp_path / "file")
    (tmp_path / "folder" / saved.WEIGHTS_FILE).mkdir(parents=True)
    (tmp_path / "folder" / saved.WEIGHTS_FILE / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'reference\.safetensors'"):
        reference.save(tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "folder" / saved.WEIGHTS_FILE / "notes.txt").read_text() == "mine"


def test_links_in_a_saved_folder(tmp_path: Path) -> None:
    """A linked file is read, as in the Hub's cache, and its contents are compared; a save replaces the link."""
    first, second = built("clone", seed=1), built("clone", seed=2, move=True)
    first.save(tmp_path / "ref")
    blob = tmp_path / "blob"
    os.rename(tmp_path / "ref" / saved.WEIGHTS_FILE, blob)
    (tmp_path / "ref" / saved.WEIGHTS_FILE).symlink_to(blob)
    second.load(tmp_path / "ref")
    assert second.fingerprint() == first.fingerprint()
    before = blob.read_bytes()
    built("clone", seed=3, move=True).save(tmp_path / "ref")
    assert blob.read_bytes() == before and not (tmp_path / "ref" / saved.WEIGHTS_FILE).is_symlink()


def test_a_lock_is_of_one_process_and_ends_with_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "lock")
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path / "lock")
    child = os.fork()
    if child == 0:  # a child inherits the open file, but must not keep the lock
        time.sleep(20)
        os._exit(0)
    try:
        lock.release()
        assert not (tmp_path / "lock").exists()
        FolderLock(tmp_path / "lock").release()
        held = os.open(tmp_path / "stale", os.O_CREAT | os.O_RDWR)  # left behind by a process that was killed
        os.close(held)
        FolderLock(tmp_path / "stale").release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
