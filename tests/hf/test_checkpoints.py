"""Checkpoints are whole or do not count: the mark, what it finds, rotation, a full disk, a process that is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launching import accelerate_launch
from support.models import llama
from support.train_inputs import write_config
from support.trl_runs import dpo
from transformers import Trainer, TrainingArguments

import refkl.checkpoint
import refkl.hf.checkpoint_writing
import refkl.hf.checkpoints
from refkl import SyncConfig, SyncReferenceCallback, build_reference
from refkl.checkpoint import BEGUN, MARK, CheckpointError, disk_failure, is_whole, newest_whole, why_not_whole
from refkl.cli import main
from refkl.trl import KLDPOTrainer

EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
SYNC = SyncConfig(every=1, alpha=0.5)


def run(tmp_path: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    torch.manual_seed(0)
    return dpo(KLDPOTrainer, llama(), tmp_path, {**EACH_STEP, **(options or {})}, **refkl)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run whose reference has moved."""
    folder = tmp_path_factory.mktemp("written")
    run(folder, {"max_steps": 1}, sync=SYNC).train()
    return folder / "run" / "checkpoint-1"


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


def test_a_whole_checkpoint_is_marked_with_all_of_its_files(checkpoint: Path) -> None:
    files = json.loads((checkpoint / MARK).read_text())["files"]
    there = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert set(files) == there - {MARK}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "reference/reference.safetensors"} <= set(files)
    assert is_whole(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "reference/reference.safetensors"]
)
def test_a_missing_and_a_truncated_file_are_named(name: str, checkpoint: Path) -> None:
    size = (checkpoint / name).stat().st_size
    os.truncate(checkpoint / name, size - 1)
    assert why_not_whole(checkpoint) == f"has {size - 1} of the {size} bytes of {name}"
    assert not is_whole(checkpoint)
    (checkpoint / name).unlink()
    assert why_not_whole(checkpoint) == f"lacks {name}"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "reference/reference.safetensors", "reference.json", "kl_penalty.json"]
)
def test_an_altered_file_is_named(name: str, checkpoint: Path) -> None:
    data = bytearray((checkpoint / name).read_bytes())
    data[-9] ^= 1
    (checkpoint / name).write_bytes(data)
    assert why_not_whole(checkpoint) == f"has an altered {name}"
    assert why_not_whole(checkpoint, contents=False) is None
    of_reference = name.startswith("reference")
    assert (why_not_whole(checkpoint, without_reference=True) is None) == of_reference


def test_a_damaged_mark_and_none(checkpoint: Path) -> None:
    (checkpoint / MARK).write_text((checkpoint / MARK).read_text()[:-9])
    assert why_not_whole(checkpoint) == f"has a damaged {MARK}"
    (checkpoint / MARK).unlink()
    assert why_not_whole(checkpoint) == f"is not marked as complete (no {MARK})"
    (checkpoint / BEGUN).write_text("{}")
    assert why_not_whole(checkpoint) == f"was not written to its end (no {MARK})"
    assert why_not_whole(checkpoint.parent / "checkpoint-9") == "is not there"


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int, *, after: bool = False) -> None:
    """End the process, as far as a test can, at the `call`-th call of a function."""
    original, calls = getattr(module, name), iter(range(1, 1000))

    def killed(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == call
        if now and not after:
            raise Killed
        result = original(*args, **kwargs)
        if now:
            raise Killed
        return result

    monkeypatch.setattr(module, name, killed)


KILLS = {
    "before it begins": (refkl.hf.checkpoint_writing, "begin", False),
    "before the reference": (refkl.hf.checkpoints, "write_json", False),
    "within transformers' part": (torch, "save", False),
    "before the mark": (refkl.checkpoint, "complete", False),
    "after the mark": (refkl.checkpoint, "complete", True),
    "after the rotation": (refkl.hf.checkpoint_writing, "rotate", True),
}


@pytest.mark.parametrize("when", KILLS)
def test_one_checkpoint_is_whole_whenever_the_run_is_killed(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With save_total_limit 1, transformers deletes the last one before the next is complete."""
    module, name, after = KILLS[when]
    per_save = {"write_json": 2, "save": 3}.get(name, 1)
    options = {"save_total_limit": 1}
    with monkeypatch.context() as patched:
        kill_at(patched, module, name, 2 * per_save, after=after)
        with pytest.raises(Killed):
            run(tmp_path, options, sync=SYNC).train()
    newest = newest_whole(tmp_path / "run").path
    assert newest is not None and newest.name == ("checkpoint-2" if after else "checkpoint-1")
    second = run(tmp_path, options, sync=SYNC)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 3
    # What the kill left is gone too.
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert is_whole(tmp_path / "run" / "checkpoint-3")


def test_rotation_counts_marked_checkpoints_alone(tmp_path: Path) -> None:
    run(tmp_path, {"max_steps": 2}).train()
    folder = tmp_path / "run"
    (folder / "checkpoint-1" / MARK).rename(folder / "checkpoint-1" / BEGUN)  # interrupted
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9")
    (folder / "checkpoint-9" / MARK).unlink()  # someone else's
    again = run(tmp_path, {"max_steps": 5, "save_total_limit": 2})
    again.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5", "checkpoint-9"]
    assert again.args.save_total_limit == 2


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    options = {
        "save_total_limit": 1, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True,
    }  # fmt: skip
    from support.trl_runs import PAIRS

    trainer = run(tmp_path, options, eval_dataset=PAIRS.select(range(4)))
    trainer.train()
    assert trainer.state.best_global_step == 1  # the loss falls
    assert is_whole(tmp_path / "run" / "checkpoint-1")


def plain_trainer(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = llama()
    settings = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 64
    callback = SyncReferenceCallback(build_reference(model), SYNC)
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data, callbacks=[callback])


def test_the_callback_of_a_plain_trainer_marks_its_checkpoints(tmp_path: Path) -> None:
    plain_trainer(tmp_path, save_total_limit=2).train()
    assert is_whole(tmp_path / "checkpoint-1") and is_whole(tmp_path / "checkpoint-2")
    assert "reference/reference.safetensors" in json.loads((tmp_path / "checkpoint-2" / MARK).read_text())["files"]


def test_the_callback_refuses_a_rotation_that_could_leave_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_total_limit 1, .* Set it to 2"):
        plain_trainer(tmp_path, save_total_limit=1).train()
    plain_trainer(tmp_path, save_total_limit=1, save_strategy="no").train()
    run(tmp_path, {"save_total_limit": 1, "max_steps": 1}, sync=SYNC).train()  # rotates afterwards


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints and a part of a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2300k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_full_disk_ends_the_run_and_leaves_the_last_whole_checkpoint(small_disk: Path) -> None:
    trainer = run(small_disk, {"max_steps": 20}, sync=SYNC)
    with pytest.raises(CheckpointError) as raised:
        trainer.train()
    folder = small_disk / "run"
    newest = newest_whole(folder).path
    assert newest is not None
    step = int(newest.name.split("-")[1])
    message = rf"checkpoint-{step + 1} could not be written \(.*; .* free there\); the newest whole checkpoint is \S+"
    assert re.search(message + rf"checkpoint-{step}\.", str(raised.value)), raised.value
    assert not (folder / f"checkpoint-{step + 1}").exists() and trainer.state.global_step == step + 1
    # With room again the run goes on from there.
    for number in range(1, step):
        shutil.rmtree(folder / f"checkpoint-{number}")
    again = run(small_disk, {"max_steps": step + 1, "save_total_limit": 1}, sync=SYNC)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == step + 1


def test_a_run_may_go_on_without_a_checkpoint(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(small_disk, {"max_steps": 8}, sync=SYNC, on_checkpoint_error="continue")
    warned: list[str] = []
    refkl.hf.checkpoint_writing.logger.warning = warned.append  # type: ignore[method-assign,assignment]
    try:
        trainer.train()
    finally:
        del refkl.hf.checkpoint_writing.logger.warning
    assert trainer.state.global_step == 8
    assert any("could not be written" in text and text.endswith("Training goes on without it.") for text in warned)
    left = list((small_disk / "run").glob("checkpoint-*"))
    assert left and all(map(is_whole, left)) and len(left) < 8


@pytest.mark.parametrize("name", ["save_file", "save", "write_json"])
def test_each_kind_of_full_disk_is_one(name: str, small_disk: Path) -> None:
    """safetensors and torch.save do not raise OSError."""
    from safetensors.torch import save_file

    from refkl.files import write_json

    big = torch.randn(1_000_000)
    writers = {
        "save_file": lambda: save_file({"a": big}, small_disk / "a.safetensors"),
        "save": lambda: torch.save(big, small_disk / "a.pt"),
        "write_json": lambda: write_json(small_disk / "a.json", big.tolist()),
    }
    with pytest.raises(Exception) as raised:
        writers[name]()
    assert disk_failure(raised.value) is not None, raised.value


def test_other_errors_are_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk_failure(ConnectionResetError(104, "reset")) is None
    assert disk_failure(RuntimeError("shape mismatch")) is None

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Trainer, "save_model", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tmp_path, {"max_steps": 1}, on_checkpoint_error="continue").train()


def test_the_command_says_so_too(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = {"save_strategy": "steps", "save_steps": 1, "max_steps": 20, "output_dir": str(small_disk / "run")}
    config = write_config(tmp_path, "dpo", trainer=trainer, sync={"every": 1, "alpha": 0.5}, samples={"prompts": 0})
    assert main(["train", str(config)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"refkl: error: \S+ could not be written .* the newest whole checkpoint is", error), error


@pytest.mark.slow
def test_two_processes_go_on_together_without_a_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    """The disk fails on one of them."""
    torch.manual_seed(0)
    trainer = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "per_device_train_batch_size": 2}
    sections: dict[str, Any] = {"sync": {"every": 1, "alpha": 0.5}, "checkpoint": {"on_error": "continue"}}
    options = trainer | {"output_dir": str(small_disk / "run")}
    config = write_config(tmp_path, "dpo", trainer=options, samples={"prompts": 0}, **sections)
    # Room for the trained model, which is smaller than a checkpoint, beside four of these.
    subprocess.run(["mount", "-o", "remount,size=2600k", str(small_disk)], check=True)
    output = accelerate_launch("multi", "refkl", "train", str(config), module=True)
    assert output.count("Training goes on without it.") >= 2, output[-3000:]  # each of them says so
    steps = [
        json.loads(line).get("step", 0) for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 6
    assert all(map(is_whole, (small_disk / "run").glob("checkpoint-*")))


def test_a_rank_that_is_gone(tmp_path: Path) -> None:
    """The other one ends too, soon, and says how to go on."""
    torch.manual_seed(0)
    trainer = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1000, "per_device_train_batch_size": 2}
    config = write_config(tmp_path, "dpo", trainer=trainer | {"save_total_limit": 2}, samples={"prompts": 0})
    pid = tmp_path / "pid"
    (tmp_path / "victim.py").write_text(
        "import os, sys\n"
        f"if os.environ.get('RANK') == '1': open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "from refkl.cli import main\n"
        "sys.exit(main())\n"
    )
    watch = (
        "import os, pathlib, signal, time\n"
        f"pid, mark = pathlib.Path({str(pid)!r}), pathlib.Path({str(tmp_path / 'run' / 'checkpoint-1' / MARK)!r})\n"
        "while not mark.exists(): time.sleep(0.1)\n"
        "os.kill(int(pid.read_text()), signal.SIGKILL)\n"
    )
    watcher = subprocess.Popen([sys.executable, "-c", watch])
    try:
        output = accelerate_launch("multi", str(tmp_path / "victim.py"), "train", str(config), fails=True)
    finally:
        watcher.kill()
    assert "Another process of this run is gone" in output, output[-3000:]
    assert re.search(r"The newest whole checkpoint is \S+checkpoint-\d+", output)
    assert f"refkl train {config} --resume" in output
