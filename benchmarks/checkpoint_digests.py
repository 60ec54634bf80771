"""What it costs to complete a checkpoint: SHA-256 of its files, beside the time to write them.

python benchmarks/checkpoint_digests.py FOLDER [--gb 1.2] [--rounds 4]

FOLDER is made on the disk to measure, and deleted. The checkpoint holds weights and two moments in fp32.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from refkl.checkpoint import Completion, complete, why_not_whole


def seconds(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def products() -> None:
    """Computes on one thread, as training does beside the completion."""
    a = torch.ones(1024, 1024)
    for _ in range(60):
        a @ a


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True)  # an existing folder is not deleted
    rows: dict[str, list[float]] = {}
    try:
        for number in range(options.rounds):
            checkpoint = options.folder / f"checkpoint-{number}"
            checkpoint.mkdir()
            weights = torch.randn(int(options.gb * 1e9 / 12))
            state = {"exp_avg": weights, "exp_avg_sq": weights.clone()}
            written = seconds(lambda w=weights, to=checkpoint: save_file({"w": w}, to / "model.safetensors"))
            written += seconds(lambda s=state, to=checkpoint: torch.save(s, to / "optimizer.pt"))
            completed = seconds(lambda to=checkpoint: complete(to, threads=1))
            compared = seconds(lambda to=checkpoint: why_not_whole(to))
            alone = seconds(products)
            start = time.perf_counter()
            completion = Completion(checkpoint, lambda: None)
            waited = time.perf_counter() - start
            beside = seconds(products)
            completion.wait()
            for name, value in {
                "write, s per GB": written / options.gb,
                "complete, s per GB": completed / options.gb,
                "complete / write": completed / written,
                "compare before a resume, s per GB": compared / options.gb,
                "training waits, ms": waited * 1e3,
                "a computation beside it / alone": beside / alone,
            }.items():
                rows.setdefault(name, []).append(value)
            shutil.rmtree(checkpoint)
    finally:
        shutil.rmtree(options.folder)
    for name, values in rows.items():
        print(f"{name:36} {median(values):6.2f}   ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
