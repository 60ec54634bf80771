"""How time, memory and errors are measured.

Time: every peer and one bare matrix product run once a round, in random order, in one process; rounds are repeated.
Whatever slows the machine for a while slows all of them, and ratios are taken within a round.

Memory: one process a peer and case. The inputs are made, everything is loaded and warm, then the high-water mark of
the resident memory is cleared and read again after one forward and backward. It counts what was touched on top of the
inputs: temporaries, what is kept for backward, and the gradients themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from kernel_cases import DTYPES, Case, Errors, Inputs, compare, float64_truth, make_inputs
from kernel_peers import PEERS, Outcome, Peer

MATMUL = "matmul"
# Marks the one line of a child's output that is the answer: libraries print what they like.
MARK = "kernel-memory-bytes:"


@dataclass
class Row:
    """One peer in one case. Seconds are for forward and backward together, one entry a round."""

    peer: str
    seconds: list[float] = field(default_factory=list)
    errors: Errors | None = None
    off: bool = False
    """An error beyond BOUNDS."""
    failure: str | None = None
    memory: int | None = None
    """Bytes on top of the inputs, gradients included."""


@dataclass
class Result:
    case: Case
    matmul: list[float]
    rows: dict[str, Row]

    def median(self, peer: str) -> float | None:
        seconds = self.rows[peer].seconds
        return statistics.median(seconds) if seconds else None

    def ratio(self, peer: str, base: str) -> float | None:
        """Median over rounds of peer / base within a round."""
        if base not in self.rows or not self.rows[base].seconds or not self.rows[peer].seconds:
            return None
        pairs = zip(self.rows[peer].seconds, self.rows[base].seconds, strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def units(self, peer: str) -> float | None:
        pairs = list(zip(self.rows[peer].seconds, self.matmul, strict=False))
        return statistics.median(mine / matmul for mine, matmul in pairs) if pairs else None

    def as_dict(self) -> dict:
        rows = []
        for name, row in self.rows.items():
            rows.append({**asdict(row), "median": self.median(name), "units": self.units(name)})
        return {
            "case": asdict(self.case),
            "gradient_bytes": self.case.gradient_bytes,
            "matmul_seconds": self.matmul,
            "rows": rows,
        }


def step(peer: Peer, case: Case, inputs: Inputs) -> Outcome:
    outcome = peer.run(case, inputs)
    outcome.loss.backward()
    return outcome


def _timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _attempt(row: Row, work: Callable[[], object]) -> object:
    """A peer that fails (out of memory, an unsupported dtype) is a row that says so: the others are still measured.
    Broad, since these are other people's kernels and compilers; refkl's own failures end the run with exit 1."""
    try:
        return work()
    except Exception as error:
        row.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
        row.seconds.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def measure_case(case: Case, peers: list[Peer], rounds: int, tick: Callable[[str], None]) -> Result:
    """Errors first, then times: a kernel that computes something else must be seen before its speed is."""
    if any(peer.compiled for peer in peers):
        # After a few shapes torch.compile would turn to slower code that fits any shape, or give up.
        torch.compiler.reset()
    inputs = make_inputs(case)
    result = Result(case, [], {peer.name: Row(peer.name) for peer in peers})
    tick("float64")
    truth = float64_truth(case, inputs)
    for peer in peers:
        tick(peer.name)
        row = result.rows[peer.name]
        inputs.clear_gradients()
        outcome = _attempt(row, lambda peer=peer: step(peer, case, inputs))
        if outcome is not None:
            row.errors = compare(truth, inputs, outcome.value)
            row.off = row.errors.off(case.dtype)
            # The check was the first warm-up; compiled kernels settle on the second.
            outcome = None
            inputs.clear_gradients()
            _attempt(row, lambda peer=peer: step(peer, case, inputs))
    del truth
    product = torch.empty(case.shape[0], case.shape[2], dtype=DTYPES[case.dtype], device=case.device)
    left, right = inputs.hidden.detach(), inputs.weight.detach().T
    torch.mm(left, right, out=product)
    order = [MATMUL, *(name for name, row in result.rows.items() if row.failure is None)]
    shuffle = random.Random(case.seed)
    gc.collect()
    for round_number in range(rounds):
        tick(f"round {round_number + 1}")
        shuffle.shuffle(order)
        for name in list(order):
            inputs.clear_gradients()
            if name == MATMUL:
                result.matmul.append(_timed(lambda: torch.mm(left, right, out=product), case.device))
                continue
            row = result.rows[name]
            seconds = _attempt(row, lambda name=name: _timed(lambda: step(PEERS[name], case, inputs), case.device))
            if seconds is None:
                order.remove(name)
            else:
                row.seconds.append(seconds)
    return result


def measure_memory(case: Case, peer: Peer, script: Path, threads: int) -> int | None:
    """In a process of its own: allocators keep what earlier work left behind."""
    if case.device == "cuda":
        # What this process keeps for later is missing to the child.
        torch.cuda.empty_cache()
    arguments = ["--memory-case", json.dumps({**asdict(case), "peer": peer.name}), "--threads", str(threads)]
    child = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    for line in child.stdout.splitlines():
        if line.startswith(MARK):
            return int(line.removeprefix(MARK))
    tail = "\n".join(child.stderr.splitlines()[-5:])
    print(f"no memory reading for {peer.name} ({case.title}), exit {child.returncode}:\n{tail}", file=sys.stderr)
    return None


def memory_case(text: str) -> None:
    """What the child does. Prints the bytes that one forward and backward needed on top of the inputs."""
    fields = json.loads(text)
    peer = PEERS[fields.pop("peer")]
    case = Case(**{**fields, "shape": tuple(fields["shape"])})
    # Loads libraries and starts thread pools at a size that does not count. What is compiled is compiled for a shape,
    # and the compiler's own memory must not count either.
    warm = case if peer.compiled else replace(case, shape=(8, 16, 64))
    for _ in range(2):
        step(peer, warm, make_inputs(warm))
    inputs = make_inputs(case)
    _ = inputs.all_scored
    gc.collect()
    peak = cuda_peak if case.device == "cuda" else host_peak
    print(f"{MARK}{peak(lambda: step(peer, case, inputs))}", flush=True)


def cuda_peak(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def host_peak(work: Callable[[], object]) -> int:
    with contextlib.suppress(OSError, AttributeError):
        # Freed blocks that glibc keeps would be used again without raising the resident size.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled_peak(work)
    before = _status_bytes("VmHWM")
    kept = work()
    after = _status_bytes("VmHWM")
    del kept
    return after - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: memory is measured on Linux alone")


def _sampled_peak(work: Callable[[], object]) -> int:
    """Where the high-water mark may not be cleared: look at the resident size every millisecond."""
    before = highest = _status_bytes("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = work()
        highest = max(highest, _status_bytes("VmRSS"))
        del kept
    finally:
        done.set()
        watcher.join()
    return highest - before
