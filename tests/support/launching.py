"""Real runs in processes of their own: with a time-out, and with every process of theirs gone afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from refkl.backend import compile_lock

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT, COMPILING = 280, 400
TORCH_EXTENSIONS = ROOT / ".cache" / "torch_extensions"
"""Where DeepSpeed's ops are compiled: a folder of this checkout, so that another one's tests are not waited for."""


def run(
    command: list[str], *, timeout: int = TIMEOUT, fails: bool = False, cwd: Path = ROOT, **environment: str
) -> str:
    """Run a command, from the repository root by default; its output. Asserts that it ends in time, with 0 (or not, if
    `fails`)."""
    tests = f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # One thread a process: two processes with two threads each fight for two cores.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    env |= {"TORCH_EXTENSIONS_DIR": str(TORCH_EXTENSIONS), **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with _alone():
        if any("deepspeed" in word or "zero" in word for word in command):
            _compile(env)
        return _run(command, timeout, fails, env, cwd)


@contextmanager
def _alone() -> Iterator[None]:
    """Under xdist, one at a time of all workers' launches: two are four processes, that wait for each other."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with FileLock(Path(tempfile.gettempdir()) / f"refkl-launch-{os.environ['PYTEST_XDIST_TESTRUNUID']}.lock"):
        yield
    time.sleep(0.2)  # the other worker's turn: it looks every .05 s


def _run(command: list[str], timeout: int, fails: bool, env: dict[str, str], cwd: Path) -> str:
    if Path(env["TORCH_EXTENSIONS_DIR"]) == TORCH_EXTENSIONS:  # in a folder of its own, a lock is what a test is about
        _unlock(TORCH_EXTENSIONS)
    process = subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        output = process.communicate()[0]
        raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n{output[-4000:]}") from None
    finally:
        _kill(process)
    assert (process.returncode != 0) == fails, f"exit {process.returncode}: {' '.join(command)}\n{output[-6000:]}"
    return output


def _compile(env: dict[str, str]) -> None:
    """Compile the op that DeepSpeed communicates with, once: it takes minutes, which are not the launch's own."""
    folder = Path(env["TORCH_EXTENSIONS_DIR"])
    if folder == TORCH_EXTENSIONS and not (folder / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").exists():
        build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
        _run([sys.executable, "-c", build], COMPILING, False, env, ROOT)


def _unlock(extensions: Path) -> None:
    """Delete what a killed run has left locked: torch waits for ever for the process that compiles there."""
    for lock in extensions.glob("*/lock"):
        if compile_lock.holder(lock) is None:
            lock.unlink(missing_ok=True)


def accelerate_launch(
    config: str, script: str, *arguments: str, module: bool = False, flags: tuple[str, ...] = (), **options: object
) -> str:
    """`accelerate launch` with launch/accelerate/CONFIG.yaml, on two processes."""
    what = [*flags, *(["-m", script] if module else [script])]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    processes = "1" if config == "single" else "2"
    port = ["--num_processes", processes, "--main_process_port", str(free_port())]
    return run([*command, *port, *what, *arguments], **options)  # type: ignore[arg-type]


def deepspeed_launch(module: str, *arguments: str, **options: object) -> str:
    """`deepspeed --module`, on two processes."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), "--module", module]
    return run([sys.executable, *command, *arguments], **options)  # type: ignore[arg-type]


def free_port() -> int:
    """A port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill(process: subprocess.Popen[str]) -> None:
    """The whole process group, launcher's children too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
