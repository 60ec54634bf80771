"""Two runs in one folder: the second is refused, and a run that was killed blocks nobody."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.models import llama
from support.train_inputs import write_config
from support.trl_runs import dpo

from refkl.cli import main
from refkl.files import FolderLock
from refkl.output_folder import LOCK, renamed, writing_into
from refkl.trl import KLDPOTrainer

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
HOLD = (
    "import sys; from pathlib import Path; from types import SimpleNamespace\n"
    "from refkl.output_folder import writing_into\n"
    "with writing_into(Path(sys.argv[1]), SimpleNamespace(is_main_process=True, num_processes=1)):\n"
    "    print('locked', flush=True); sys.stdin.read()"
)


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes into a folder, until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None and b"locked" in process.stdout.read(7)
        yield process
    finally:
        process.kill()
        process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


def test_the_command_refuses_a_folder_that_another_run_writes_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    config = write_config(tmp_path, "dpo", trainer=trainer, samples={"prompts": 0})
    assert main(["train", str(config)]) == 0
    assert not (tmp_path / "run" / LOCK).exists()
    before = contents(tmp_path)
    with another_run(tmp_path / "run") as process:
        for resume in ([], ["--resume"]):
            capsys.readouterr()
            assert main(["train", str(config), *resume]) == 2
            error = capsys.readouterr().err
            assert f"run is in use: another run (process {process.pid} on " in error and "output_dir" in error
        assert contents(tmp_path) == before
        assert main(["train", str(config), "--trainer.output_dir", str(tmp_path / "other")]) == 0
    # The process was killed, and its lock's file is still there.
    assert (tmp_path / "run" / LOCK).is_file()
    assert main(["train", str(config), "--resume", "--trainer.max_steps", "2"]) == 0
    assert main(["train", str(config)]) == 0  # renames the earlier run, with the lock in it
    assert sorted(p.name for p in tmp_path.glob("run*")) == ["run", "run.1"]
    assert not list(tmp_path.rglob(LOCK))


def test_a_trainer_that_saves_locks_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    with another_run(tmp_path / "run"):
        with pytest.raises(ValueError, match=r"run is in use: another run \(process \d+"):
            dpo(KLDPOTrainer, llama(), tmp_path, saving).train()
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        dpo(KLDPOTrainer, llama(), tmp_path, {"max_steps": 1}).train()  # writes nothing
    dpo(KLDPOTrainer, llama(), tmp_path, saving).train()
    dpo(KLDPOTrainer, llama(), tmp_path, saving).train()
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_follows_a_rename_and_nests(tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "run.1"
    with writing_into(run, ALONE):
        with writing_into(run, ALONE):
            os.replace(run, aside)
            renamed(run, aside)
        assert not (aside / LOCK).exists()
        with pytest.raises(BlockingIOError):
            FolderLock(run / LOCK)
        shutil.rmtree(aside)
    assert not (run / LOCK).exists()
    FolderLock(run / LOCK).release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/run cannot be written into \("),
        writing_into(tmp_path / "file" / "run", ALONE),
    ):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="has no locks"), writing_into(tmp_path / "run", ALONE):
        assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("name", ["config.yaml", "model", "samples.jsonl", "reference.json"])
def test_files_of_others_in_the_output_folder_are_not_overwritten(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "dpo", trainer={"max_steps": 1}, samples={"prompts": 0})
    (tmp_path / "run").mkdir()
    if name == "model":
        shutil.copytree(tmp_path / "model", tmp_path / "run" / "model")
    else:
        (tmp_path / "run" / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    assert main(["train", str(config)]) == 2
    assert f"holds {name!r}, which is of no earlier run" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_link_in_the_output_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, "dpo", trainer={"max_steps": 1, "save_strategy": "steps", "save_steps": 1}, samples={"prompts": 0}
    )
    assert main(["train", str(config)]) == 0
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "run" / "config.yaml").symlink_to(config)
    before = config.read_bytes()
    assert main(["train", str(config), "--resume", "--trainer.max_steps", "2"]) == 0
    assert config.read_bytes() == before and not (tmp_path / "run" / "config.yaml").is_symlink()


@pytest.mark.parametrize("damage", ["", "[]", "[" * 50_000, '{"before": 3}', '{"before": {"fingerprint": 1}}'])
def test_a_damaged_record_of_a_resumed_run_is_named(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    config = write_config(tmp_path, "dpo", trainer=trainer, samples={"prompts": 0})
    assert main(["train", str(config)]) == 0
    (tmp_path / "run" / "reference.json").write_text(damage)
    assert main(["train", str(config), "--resume"]) == 2
    assert "reference.json is damaged" in capsys.readouterr().err
    (tmp_path / "run" / "reference.json").unlink()
    assert main(["train", str(config), "--resume"]) == 2
    assert "Put reference.json back" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
