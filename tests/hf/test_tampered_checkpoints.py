"""Every file of a checkpoint, damaged in every way: it is named, and an older whole checkpoint is resumed from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import gpt2, llama
from support.trl_runs import dpo, logged

import refkl.checkpoint
import refkl.hf.checkpoints
from refkl import KLConfig, SyncConfig
from refkl.checkpoint import (
    BEGUN,
    MARK,
    CheckpointError,
    Completion,
    begin,
    checkpoints,
    complete,
    is_whole,
    newest_whole,
    rotate,
    why_not_whole,
)
from refkl.trl import KLDPOTrainer

FILES = [
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"),
    *("kl_penalty.json", "reference.json", "reference/reference.json", "reference/reference.safetensors"),
]
MODELS = {"llama": llama, "gpt2": gpt2}


def trainer(folder: Path, model: str = "llama", steps: int = 2, **refkl: Any) -> Any:
    torch.manual_seed(0)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps}
    kl = KLConfig(coef=0.5, controller="adaptive", target=0.5, horizon=20)
    settings: dict[str, Any] = {"sync": SyncConfig(every=1, alpha=0.5), "kl": kl, **refkl}
    return dpo(KLDPOTrainer, MODELS[model](), folder, options, **settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def of(model: str) -> Path:
        if model not in known:
            known[model] = tmp_path_factory.mktemp(model) / "run"
            trainer(known[model].parent, model).train()
        return known[model]

    return of


@pytest.fixture
def run(written: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(written("llama"), tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)  # one byte is the mark's newline


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = (flip, truncate, empty, delete, swap)


def test_the_list_of_files_is_that_of_a_checkpoint(run: Path) -> None:
    there = {p.relative_to(run / "checkpoint-2").as_posix() for p in (run / "checkpoint-2").rglob("*") if p.is_file()}
    assert there == {*FILES, MARK}
    listed = json.loads((run / "checkpoint-2" / MARK).read_text())
    assert listed["format"] == 2
    assert listed["files"] == {
        name: {
            "bytes": (run / "checkpoint-2" / name).stat().st_size,
            "sha256": hashlib.sha256((run / "checkpoint-2" / name).read_bytes()).hexdigest(),
        }
        for name in FILES
    }


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", [*FILES, MARK])
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(
    name: str, damage: Callable[[Path, Path], None], run: Path
) -> None:
    first, second = run / "checkpoint-1", run / "checkpoint-2"
    same = (first / name).read_bytes() == (second / name).read_bytes()
    damage(second / name, first / name)
    why_not = why_not_whole(second)
    if damage is swap and same:
        assert why_not is None
        return
    assert why_not is not None and (name in why_not or name == MARK), why_not
    found = newest_whole(run)
    if damage is swap:  # both are damaged
        assert found.path is None and len(found.skipped) == 2
    else:
        assert found.path == first and found.skipped == [f"checkpoint-2 {why_not}"]


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "rng_state.pth", "scheduler.pt"])
@pytest.mark.parametrize("model", MODELS)
def test_a_run_with_altered_training_state_comes_to_the_same_end(
    model: str, name: str, written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written(model), run)
    path = run / "checkpoint-2" / name
    if name == "trainer_state.json":
        text = path.read_text()
        assert '"global_step": 2' in text
        path.write_text(text.replace('"global_step": 2', '"global_step": 1'))
    else:
        flip(path, path)
    warned: list[str] = []
    monkeypatch.setattr(refkl.hf.checkpoints.logger, "warning", warned.append)
    resumed = trainer(tmp_path, model, steps=3)
    with pytest.raises(ValueError, match=rf"checkpoint-2 has an altered {name}\. \S+checkpoint-1 is the newest"):
        resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    resumed.train(resume_from_checkpoint=True)
    assert warned[0] == f"checkpoint-2 has an altered {name}: it is not resumed from."
    whole = trainer(tmp_path / "whole", model, steps=3)
    whole.train()
    for key in ("loss", "kl", "grad_norm"):
        assert len(logged(whole, key)) >= 3 and logged(resumed, key) == logged(whole, key)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert is_whole(run / "checkpoint-2") and is_whole(run / "checkpoint-3")  # written again


def test_any_flipped_bit_of_the_mark_is_found_or_changes_nothing(run: Path) -> None:
    mark = run / "checkpoint-2" / MARK
    right = mark.read_bytes()
    listed = json.loads(right)
    for at in range(0, len(right), 7):
        for bit in (0, 5):
            data = bytearray(right)
            data[at] ^= 1 << bit
            mark.write_bytes(data)
            if why_not_whole(run / "checkpoint-2") is None:
                assert json.loads(bytes(data)) == listed, (at, bit, data[at - 10 : at + 10])


@pytest.mark.parametrize(
    "damage",
    [
        {"files": {"../other/model.safetensors": {"bytes": 3}}},
        {"files": {"/etc/passwd": {"bytes": 3}}},
        {"files": {"model.safetensors": {"bytes": -3}}},
        {"files": {"model.safetensors": {"bytes": True}}},
        {"files": {"model.safetensors": {"bytes": 3, "sha257": "0"}}},
        {"files": {"model.safetensors": 3}},
        {"files": []},
        {"format": 3, "files": {}},
        {"format": 2, "files": {"model.safetensors": {"bytes": 3}}},
        {},
        [],
        "[" * 100_000,
    ],
    ids=lambda d: str(d)[:50],
)
def test_a_mark_that_refkl_does_not_write_is_damaged(damage: Any, run: Path) -> None:
    text = damage if isinstance(damage, str) else json.dumps(damage)
    (run / "checkpoint-2" / MARK).write_text(text)
    assert why_not_whole(run / "checkpoint-2") == f"has a damaged {MARK}"
    assert newest_whole(run).path == run / "checkpoint-1"


@pytest.mark.parametrize("crc", [True, False])
def test_marks_without_digests_are_compared_by_size(crc: bool, run: Path, tmp_path: Path) -> None:
    import zlib

    for checkpoint in checkpoints(run):
        files = json.loads((checkpoint / MARK).read_text())["files"]
        old = {name: {"bytes": about["bytes"]} for name, about in files.items()}
        if crc:
            old["model.safetensors"]["crc32"] = zlib.crc32((checkpoint / "model.safetensors").read_bytes())
        (checkpoint / MARK).write_text(json.dumps({"files": old}))
        assert is_whole(checkpoint)
    resumed = trainer(tmp_path, steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert [m["step"] for m in resumed.state.log_history if "loss" in m] == [1, 2, 3]
    flip(run / "checkpoint-1" / "model.safetensors", run)
    assert (why_not_whole(run / "checkpoint-1") == "has an altered model.safetensors") == crc
    truncate(run / "checkpoint-1" / "optimizer.pt", run)
    assert "of the" in str(why_not_whole(run / "checkpoint-1"))


@pytest.mark.parametrize(
    "field, value",
    [
        *[("updates", value) for value in (-5, 1.5, None, "1")],
        *[("fingerprint", value) for value in (None, "x", 3)],
        *[("saved", value) for value in (None, 1, "yes")],
        *[("strategy", 3), ("source", None), ("kl_floor", {"mean": "a"})],
    ],
)
def test_a_damaged_record_of_the_reference_is_named(field: str, value: Any, run: Path, tmp_path: Path) -> None:
    """Beneath the mark: as in a checkpoint whose mark has no digests."""
    path = run / "checkpoint-2" / "reference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    resumed = trainer(tmp_path)
    before = resumed.reference.fingerprint()
    with pytest.raises(ValueError, match=rf"reference\.json is damaged: '{field}' is "):
        resumed._load_reference(run / "checkpoint-2")
    assert resumed.reference.fingerprint() == before and resumed.reference.updates == 0


@pytest.mark.parametrize(
    "state", [{"controller": {}}, {"controller": 3}, {"coef": "1"}, {"coef": None}, {"steps": "a"}]
)
def test_a_damaged_state_of_the_penalty_is_named(state: dict[str, Any], run: Path, tmp_path: Path) -> None:
    path = run / "checkpoint-2" / "kl_penalty.json"
    right = json.loads(path.read_text())
    if "coef" in state:
        state = {"controller": {**right["controller"], **state}}
    path.write_text(json.dumps({**right, **state}))
    resumed = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"kl_penalty\.json\."):
        resumed._load_controller(path)
    assert resumed.penalty.coef == 0.5


# Completion in a thread.


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Completion waits for this event before it reads anything."""
    go, original = threading.Event(), refkl.checkpoint.complete

    def waiting(checkpoint: Path, **options: Any) -> None:
        assert go.wait(60)
        original(checkpoint, **options)

    monkeypatch.setattr(refkl.checkpoint, "complete", waiting)
    yield go
    go.set()


def test_training_goes_on_while_a_checkpoint_is_completed(tmp_path: Path, held_up: threading.Event) -> None:
    from transformers import TrainerCallback

    seen: list[tuple[int, bool, bool]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = tmp_path / "run" / f"checkpoint-{state.global_step}"
            if state.global_step:
                seen.append((state.global_step, (last / BEGUN).is_file(), is_whole(last)))
                held_up.set()

    trainer(tmp_path, steps=3, callbacks=[Look()]).train()
    assert seen[0] == (1, True, False)  # not whole before its digests are recorded, but the second step has begun
    assert [p.name for p in checkpoints(tmp_path / "run") if is_whole(p)] == [f"checkpoint-{n}" for n in (3, 2, 1)]
    assert not any(thread.name.startswith("completes") for thread in threading.enumerate())


def test_an_error_of_training_leaves_the_last_checkpoint_complete(tmp_path: Path, held_up: threading.Event) -> None:
    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                held_up.set()
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trainer(tmp_path, steps=3, callbacks=[Fail()]).train()
    assert newest_whole(tmp_path / "run").path == tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize("reaction", ["stop", "continue"])
def test_a_mark_that_cannot_be_written(reaction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    original = refkl.checkpoint.complete

    def full(checkpoint: Path, **options: Any) -> None:
        if checkpoint.name == "checkpoint-2":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(checkpoint, **options)

    monkeypatch.setattr(refkl.checkpoint, "complete", full)
    run = trainer(tmp_path, steps=3, on_checkpoint_error=reaction)
    if reaction == "stop":
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .* whole checkpoint is \S+-1\."):
            run.train()
        left = ["checkpoint-1"]
    else:
        run.train()
        left = ["checkpoint-3", "checkpoint-1"]
    assert [p.name for p in checkpoints(tmp_path / "run")] == left


def test_the_error_of_a_completion_is_raised_once(tmp_path: Path) -> None:
    completion = Completion(tmp_path / "nothing" / "there", lambda: None)
    with pytest.raises(FileNotFoundError):
        completion.wait()
    completion.wait()


# Folders of others.


def test_a_folder_of_another_in_the_way_is_renamed(tmp_path: Path) -> None:
    def content(folder: Path) -> str:
        return (folder / "notes.txt").read_text()

    checkpoint = tmp_path / "checkpoint-5"
    aside = [tmp_path / f"abandoned-{number}-checkpoint-5" for number in (1, 2, 3)]
    checkpoint.mkdir()
    (checkpoint / "notes.txt").write_text("mine")  # no mark at all
    begin(checkpoint)
    assert content(aside[0]) == "mine" and [p.name for p in checkpoint.iterdir()] == [BEGUN]
    (checkpoint / "model.bin").write_text("a")
    complete(checkpoint)
    (checkpoint / "notes.txt").write_text("later")  # not in the mark
    begin(checkpoint)
    assert content(aside[1]) == "later"
    complete(checkpoint)
    begin(checkpoint)  # nothing but refkl's own
    assert not aside[2].exists()
    discarded = tmp_path / "elsewhere"
    os.rename(checkpoint, discarded)
    checkpoint.symlink_to(discarded)
    begin(checkpoint)
    assert aside[2].is_symlink() and (discarded / BEGUN).is_file() and not checkpoint.is_symlink()


def test_rotation_does_not_follow_links(tmp_path: Path) -> None:
    for name in ("one/checkpoint-1", "two/checkpoint-2", "two/checkpoint-3", "other/checkpoint-4"):
        begin(tmp_path / name)
        if name != "other/checkpoint-4":
            complete(tmp_path / name)
    (tmp_path / "two" / "checkpoint-1").symlink_to(tmp_path / "one" / "checkpoint-1")
    (tmp_path / "two" / "checkpoint-4").symlink_to(tmp_path / "other" / "checkpoint-4")
    rotate(tmp_path / "two", 1, [tmp_path / "two" / "checkpoint-3"])
    assert is_whole(tmp_path / "one" / "checkpoint-1") and (tmp_path / "other" / "checkpoint-4" / BEGUN).is_file()
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}
