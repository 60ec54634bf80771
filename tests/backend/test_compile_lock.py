"""A compile lock that nobody holds is named and taken over; one that a process holds is waited for."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launching import TORCH_EXTENSIONS, accelerate_launch
from support.train_inputs import write_config
from torch.utils.file_baton import FileBaton

from refkl.backend import compile_lock, watch_compile_locks
from refkl.messages import RunError

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("holds", flush=True)
time.sleep(float(sys.argv[2]))
baton.release()
"""


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The warnings; with the patience of a test."""
    watch_compile_locks()
    lines: list[str] = []
    monkeypatch.setattr(compile_lock.logger, "warning", lines.append)
    monkeypatch.setattr(compile_lock, "PATIENCE", 0.5)
    monkeypatch.setattr(compile_lock, "_LOOK", 0.05)
    yield lines


def _holder(lock: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


def test_nobody_holds_it(tmp_path: Path, said: list[str]) -> None:
    (lock := tmp_path / "lock").touch()
    start = time.monotonic()
    baton = FileBaton(str(lock))
    assert baton.try_acquire() and time.monotonic() - start > 0.5
    assert len(said) == 1 and f"Took over the compile lock {lock}: no process has held it" in said[0]
    assert lock.exists()  # ours now
    baton.release()
    assert not lock.exists()


@pytest.mark.parametrize("attempt", range(5))
def test_of_several_that_wait_one_compiles(tmp_path: Path, attempt: int) -> None:
    """The file system gives a new file the inode of the one deleted before it: an inode alone tells no lock apart."""
    (lock := tmp_path / "lock").touch()
    batons = [FileBaton(str(lock)) for _ in range(8)]
    found: list[bool | None] = []
    threads = [threading.Thread(target=lambda baton=baton: found.append(baton.try_acquire())) for baton in batons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(map(bool, found)) == [False] * 7 + [True]
    next(baton for baton in batons if baton.fd is not None).release()
    assert not lock.exists()


def test_a_lock_that_was_made_anew_is_not_taken_over(tmp_path: Path) -> None:
    (lock := tmp_path / "lock").touch()
    left = compile_lock._file(lock)
    assert left is not None
    lock.unlink()
    time.sleep(0.02)
    baton = FileBaton(str(lock))
    assert baton.try_acquire() and compile_lock._take_over(lock, left) is None
    assert lock.exists()
    baton.release()


def test_a_process_holds_it(tmp_path: Path, said: list[str]) -> None:
    lock = tmp_path / "lock"
    process = _holder(lock, 2.5)
    baton = FileBaton(str(lock))
    assert not baton.try_acquire()
    baton.wait()
    assert process.wait(30) == 0 and not lock.exists()
    assert said == [f"Waiting for process {process.pid}, which compiles a DeepSpeed op in {tmp_path}."]


def test_the_process_that_holds_it_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    process = _holder(lock, 60)
    threading.Timer(0.5, process.send_signal, [signal.SIGKILL]).start()
    with pytest.raises(RunError, match="ended before it was done"):
        FileBaton(str(lock)).wait()
    assert process.wait(30) == -signal.SIGKILL
    baton = FileBaton(str(lock))
    assert baton.try_acquire()  # as the next run does
    baton.release()


def test_on_a_network_file_system_it_is_named_and_left(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lock := tmp_path / "lock").touch()
    monkeypatch.setattr(compile_lock, "_network_file_system", lambda path: "nfs4")
    threading.Timer(2.0, lock.unlink).start()
    FileBaton(str(lock)).wait()
    assert len(said) == 1 and str(lock) in said[0] and "(nfs4)" in said[0] and "delete that file" in said[0]


def test_the_file_system_of_this_folder_is_local(tmp_path: Path) -> None:
    assert compile_lock._network_file_system(tmp_path / "lock") is None


@pytest.mark.slow
def test_a_launch_goes_on_past_a_lock_that_a_killed_compile_left(tmp_path: Path) -> None:
    write_config(tmp_path, "dpo", trainer={"max_steps": 1, "per_device_train_batch_size": 2})
    arguments = ["train", str(tmp_path / "config.yaml")]
    accelerate_launch("zero2", "refkl", *arguments, module=True)  # compiles the op, if it is not yet
    shutil.copytree(TORCH_EXTENSIONS, tmp_path / "extensions")
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "lock").touch()
    output = accelerate_launch(
        "zero2", "refkl", *arguments, module=True, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")
    )
    assert output.count("Took over the compile lock") == 1 and "finished after 1 step" in output
