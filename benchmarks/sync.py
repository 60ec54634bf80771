"""What one update of the reference takes, beside TRL's callback on the same model and backend: time and peak memory.

python benchmarks/sync.py                                  # one process, and ZeRO-3 on two
python benchmarks/sync.py --backends single --rounds 5 --json benchmarks/out/sync.json

One line a case: fp32 and bf16, alpha 0.6 and 1. Both sides hold the same reference and move it to the same policy, in
turn, in one process; the ratio is the median over rounds. Memory is the resident peak of one update above what was
there before it, the most of any rank; what refkl keeps from then on (fp32 averages of a bf16 reference) is a column of
its own. "left" is what is left of the way to the policy after 50 updates with alpha 0.01: .605 is right.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from kernel_measure import cuda_peak, host_peak
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.models.utils import prepare_deepspeed
from trl.trainer.callbacks import SyncRefModelCallback

from refkl import Reference, ReferenceConfig, build_reference
from refkl.backend import layout_of, local_shard, named_weights, unwrap

MARK = "sync-benchmark:"
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=["single", "zero3"], default=["single", "zero3"])
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2-135M's; weights are random")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--worker", choices=["single", "zero3"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        rows = worker(options.worker, options.layers, options.rounds)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{MARK}{json.dumps(rows)}", flush=True)
        return
    found = [row for backend in options.backends for row in launched(backend, options.layers, options.rounds)]
    Console().print(table(found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def launched(backend: str, layers: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of a backend, each dtype from a run of its own."""
    root = Path(__file__).resolve().parents[1]
    rows: list[dict[str, Any]] = []
    for dtype in ("fp32", "bf16"):
        command = [sys.executable]
        if backend == "zero3":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            command += ["-m", "accelerate.commands.launch", "--config_file", str(root / "launch/accelerate/zero3.yaml")]
            command += ["--num_processes", "2", "--main_process_port", port]
            command += ["--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0"]
            command += ["--mixed_precision", "bf16"] if dtype == "bf16" else []
        command += [__file__, "--worker", backend, "--layers", str(layers), "--rounds", str(rounds)]
        child = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "SYNC_DTYPE": dtype}
        )
        lines = [line for line in child.stdout.splitlines() if MARK in line]
        if not lines:
            raise SystemExit(f"{backend} in {dtype} gave nothing, exit {child.returncode}:\n{child.stderr[-3000:]}")
        rows += json.loads(lines[0].split(MARK)[1])
    return rows


def worker(backend: str, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Both sides' updates, in one process or as one rank of two."""
    dtype = os.environ["SYNC_DTYPE"]
    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    policy: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES))
    if backend == "single":
        policy = policy.to(accelerator.device, getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))
        theirs: nn.Module = copy.deepcopy(policy).requires_grad_(False)
    else:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        theirs = copy_of(policy)
        policy, _ = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=1e-3))
        theirs = prepare_deepspeed(theirs, accelerator)
    inner = unwrap(policy)
    torch.manual_seed(1)
    rows = []
    for alpha in (0.6, 1.0):
        reference = build_reference(
            policy, ReferenceConfig(strategy="clone" if backend == "single" else "zero3"), accelerator
        )
        change(inner)
        sides: dict[str, Callable[[], Any]] = {
            "refkl": lambda r=reference, a=alpha: r.update(policy, a),  # type: ignore[misc]
            "TRL": lambda a=alpha: SyncRefModelCallback.sync_target_model(inner, unwrap(theirs), a),  # type: ignore[misc]
        }
        before = reference.memory().total
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side()
        for _ in range(rounds):
            change(inner)
            for name, side in sides.items():
                together()
                start = time.perf_counter()
                side()
                together()
                seconds[name].append(time.perf_counter() - start)
        peak = cuda_peak if accelerator.device.type == "cuda" else host_peak
        memory = {name: most(peak(side)) for name, side in sides.items()}
        row = {"backend": backend, "dtype": dtype, "alpha": alpha, "seconds": seconds, "peak": memory,
               "kept": most(reference.memory().total - before),
               "model": sum(layout_of(p).shape.numel() * p.element_size() for p in inner.parameters())}  # fmt: skip
        if alpha < 1.0:
            row["left"] = left(policy, inner, unwrap(theirs), accelerator, backend)
        rows.append(row)
        del reference
    return rows


def copy_of(policy: nn.Module) -> nn.Module:
    """Partitioned as it is made, as TRL loads its own."""
    config: Any = policy.config
    return LlamaForCausalLM(copy.deepcopy(config))


def change(model: nn.Module) -> None:
    """As training would: every weight moves a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = local_shard(parameter)
            local.add_(torch.randn_like(local), alpha=0.01)


def left(
    policy: nn.Module, inner: nn.Module, theirs: nn.Module, accelerator: Accelerator, backend: str
) -> dict[str, float]:
    """Of one weight: the share of the way to the policy that is left after 50 updates with alpha 0.01."""
    name = "model.layers.0.mlp.up_proj.weight"
    reference: Reference = build_reference(
        policy, ReferenceConfig(strategy="clone" if backend == "single" else "zero3"), accelerator
    )
    SyncRefModelCallback.sync_target_model(inner, theirs, 1.0)
    change(inner)
    mine = {"refkl": dict(named_weights(reference.model)), "TRL": dict(named_weights(theirs))}  # type: ignore[attr-defined]
    right = local_shard(dict(named_weights(inner))[name]).float()
    gaps = {side: (local_shard(weights[name]).float() - right).norm() for side, weights in mine.items()}
    for _ in range(50):
        reference.update(policy, 0.01)
        SyncRefModelCallback.sync_target_model(inner, theirs, 0.01)
    return {s: float((local_shard(w[name]).float() - right).norm() / gaps[s]) for s, w in mine.items()}


def together() -> None:
    if dist.is_initialized():
        dist.barrier()


def most(value: int) -> int:
    """Of all ranks."""
    if not dist.is_initialized():
        return value
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return max(v for v in found if v is not None)


def table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    view = Table(title=f"one update; the model is {rows[0]['model'] / 2**20:,.0f} MiB in {rows[0]['dtype']}")
    for column in ("backend", "dtype", "alpha", "refkl, s", "TRL, s", "TRL : refkl", "refkl peak, MiB", "TRL peak, MiB",
                   "refkl keeps, MiB", "left, refkl", "left, TRL"):  # fmt: skip
        view.add_column(column, justify="right")
    for row in rows:
        ratio = statistics.median(b / a for a, b in zip(row["seconds"]["refkl"], row["seconds"]["TRL"], strict=True))
        medians = [f"{statistics.median(row['seconds'][side]):.3f}" for side in ("refkl", "TRL")]
        mib = [f"{value / 2**20:,.0f}" for value in (row["peak"]["refkl"], row["peak"]["TRL"], row["kept"])]
        rest = [f"{row['left'][side]:.3f}" if "left" in row else "" for side in ("refkl", "TRL")]
        view.add_row(row["backend"], row["dtype"], f"{row['alpha']:g}", *medians, f"{ratio:.2f}", *mib, *rest)
    return view


if __name__ == "__main__":
    main()
