"""What is printed and saved."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from kernel_measure import Result, Row
from kernel_peers import PEERS
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BASE = "refkl"
MIB = 1 << 20


def console() -> Console:
    """Wide enough for every column where the output is a file or a pipe, which have no width of their own."""
    out = Console()
    return out if out.is_terminal else Console(width=150)


def machine(device: str) -> dict:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    described = {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    for package, name in (("refkl", "refkl"), ("trl", "trl"), ("liger_kernel", "liger-kernel"), ("triton", "triton")):
        described[package] = version(name) if find_spec(package) else None
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
    return described


def write(path: Path, found: dict) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(found, indent=2) + "\n")
    path.with_suffix(".tmp").replace(path)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.0f}"


def _spread(row: Row) -> str:
    return f"{min(row.seconds):.4g} .. {max(row.seconds):.4g}" if len(row.seconds) > 1 else "-"


def case_table(result: Result) -> Table:
    matmul = sorted(result.matmul)[len(result.matmul) // 2] if result.matmul else None
    caption = (
        f"1 unit = one product 2·N·V·H, all N tokens: {_number(matmul, '.4g')} s. "
        f"The gradients take {_mib(result.case.gradient_bytes)} MiB of the extra memory."
    )
    table = Table(title=result.case.title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("kernel", no_wrap=True)
    for heading in ("seconds", "least .. most", f"vs {BASE}", "units", "extra MiB", "value error", "gradient error"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, row in sorted(result.rows.items(), key=lambda item: result.median(item[0]) or float("inf")):
        errors = row.errors
        gradients = [error for error in (errors.hidden, errors.weight) if error is not None] if errors else []
        # NaN does not compare: max() would hide it behind the other gradient.
        worst = next((error for error in gradients if error != error), max(gradients, default=None))
        table.add_row(
            name,
            _number(result.median(name), ".4g"),
            _spread(row),
            _number(result.ratio(name, BASE), ".2f"),
            _number(result.units(name), ".2f"),
            _mib(row.memory),
            _number(errors.value if errors else None, ".1e"),
            _number(worst, ".1e"),
            escape(row.failure or ("OFF" if row.off else "")),
            style="red" if row.failure or row.off else None,
        )
    return table


def scaling_table(title: str, results: list[Result], peer: str) -> Table:
    """Time a token and memory without the gradients must not grow with N."""
    table = Table(title=title, title_justify="left")
    for heading in ("N", "seconds", "µs a token", "units", "extra MiB", "of which gradients", "scratch MiB", "errors"):
        table.add_column(heading, justify="right")
    for result in results:
        row, n = result.rows[peer], result.case.shape[0]
        median = result.median(peer)
        scratch = None if row.memory is None else row.memory - result.case.gradient_bytes
        table.add_row(
            str(n),
            _number(median, ".4g"),
            _number(median and median / n * 1e6, ".1f"),
            _number(result.units(peer), ".2f"),
            _mib(row.memory),
            _mib(result.case.gradient_bytes),
            _mib(scratch),
            escape(row.failure or ("OFF" if row.off else "ok")),
        )
    return table


def legend(out: Console, absent: dict[str, str]) -> None:
    table = Table(title="How each is called", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, peer in PEERS.items():
        note = f"absent: {absent[name]}" if name in absent else f"{peer.installed}. {peer.called}"
        table.add_row(name, escape(note), style="yellow" if name in absent else None)
    out.print(table)
