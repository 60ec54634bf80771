"""How fast refkl's fused heads are, how much memory they take, and whether they are right, beside everything else that
does the same. One process; method and results are in docs/benchmarks.md.

    python benchmarks/kernels.py                                       # CPU: each op, head frozen and trained, fp32
    python benchmarks/kernels.py --masked 0 50 90 --heads frozen       # with unscored tokens
    python benchmarks/kernels.py --dtypes bf16
    python benchmarks/kernels.py --preset large --json benchmarks/out/large.json
    python benchmarks/kernels.py --scaling                             # refkl alone, N = 256 … 8192
    python benchmarks/kernels.py --device cuda                         # one GPU: bf16, the heads of 7B and 8B models

The peers that are not part of refkl's own install: pip install --no-deps liger-kernel==0.8.5 triton
Ends with 1 if a kernel of refkl failed or is off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from kernel_cases import DTYPES, ENTROPY, HEADS, KL, LOGP, OPS, Case, Shape
from kernel_measure import Result, measure_case, measure_memory, memory_case
from kernel_peers import PEERS, Peer
from kernel_report import case_table, console, legend, machine, scaling_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# NxHxV
PRESETS: dict[str, dict[str, list[Shape]]] = {
    "cpu": {
        "small": [(1024, 512, 32000)],
        "default": [(1024, 1024, 32768)],
        "large": [(1024, 512, 32000), (1024, 1024, 32768), (2048, 1536, 65536), (1024, 2048, 128256)],
    },
    # vocabulary and width of Qwen2.5-0.5B, Llama-3-8B, Qwen2.5-7B
    "cuda": {
        "small": [(4096, 896, 151936)],
        "default": [(8192, 3584, 152064), (8192, 4096, 128256)],
        "large": [(4096, 896, 151936), (8192, 4096, 128256), (8192, 3584, 152064), (32768, 3584, 152064)],
    },
}
SCALING_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
OWN = ("refkl", "refkl token_loss")


def _shape(text: str) -> Shape:
    try:
        n, h, v = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write NxHxV, such as 1024x1024x32768") from None
    if min(n, h, v) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: N, H and V are at least 1")
    return n, h, v


def _percent(text: str) -> int:
    if not text.isdigit() or int(text) > 99:
        raise argparse.ArgumentTypeError(f"{text!r}: percent of tokens that are not scored, 0 to 99")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=("small", "default", "large"), default="default", help="list of shapes")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="NxHxV", help="instead of a preset")
    parser.add_argument("--ops", choices=OPS, nargs="+", default=[LOGP, ENTROPY, KL])
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=list(HEADS))
    parser.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", help="fp32 on CPU, bf16 on CUDA")
    parser.add_argument("--masked", type=_percent, nargs="+", default=[0], metavar="PERCENT", help="tokens not scored")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"peers whose name contains it: {', '.join(PEERS)}")
    parser.add_argument("--scaling", action="store_true", help="time and memory over N, H and V of the first shape")
    parser.add_argument("--rounds", type=_count, help="7, or 3 with --scaling")
    parser.add_argument("--threads", type=_count, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="no memory readings: one process less a row")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    options.dtypes = options.dtypes or ["fp32" if options.device == "cpu" else "bf16"]
    options.rounds = options.rounds or (3 if options.scaling else 7)
    options.shapes = options.shapes or PRESETS[options.device][options.preset]
    if options.only:
        for part in options.only:
            if not any(part.lower() in name.lower() for name in PEERS):
                parser.error(f"--only {part}: no such peer; there are {', '.join(PEERS)}")
    return options


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    if not options.only:
        return [PEERS[name] for name in OWN] if options.scaling else list(PEERS.values())
    wanted = [part.lower() for part in options.only]
    return [peer for name, peer in PEERS.items() if any(part in name.lower() for part in wanted)]


def cases_of(options: argparse.Namespace) -> list[Case]:
    shapes = options.shapes
    if options.scaling:
        shapes = [(n, *options.shapes[0][1:]) for n in SCALING_TOKENS]
    axes = product(shapes, options.dtypes, options.ops, options.heads, options.masked)
    return [
        Case(op, head, dtype, masked, shape, options.device, options.seed) for shape, dtype, op, head, masked in axes
    ]


def measure(cases: list[Case], peers: list[Peer], options: argparse.Namespace, out: Console) -> list[Result]:
    """Prints each case's table when it is done, so that a run that is cut short has said what it knew."""
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(cases))
        for index, case in enumerate(cases):
            takers = [peer for peer in peers if peer.takes(case)]
            steps = 1 + len(takers) + options.rounds + (0 if options.no_memory else len(takers))
            done = 0

            def tick(what: str, index=index, case=case, steps=steps) -> None:
                nonlocal done
                progress.update(bar, completed=index + done / steps, description=f"{case.op} {case.head}: {what}")
                done += 1

            result = measure_case(case, takers, options.rounds, tick)
            for peer in takers if not options.no_memory else []:
                tick(f"memory of {peer.name}")
                row = result.rows[peer.name]
                if row.failure is None:
                    row.memory = measure_memory(case, peer, Path(__file__), torch.get_num_threads())
            results.append(result)
            progress.update(bar, completed=index + 1)
            if not options.scaling:
                out.print(case_table(result), "")
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_case:
        memory_case(options.memory_case)
        return 0
    out, here = console(), machine(options.device)
    absent = {name: reason for name, peer in PEERS.items() if (reason := peer.absent(options.device))}
    peers = [peer for peer in chosen_peers(options) if peer.name not in absent]
    out.print(", ".join(f"{key} {value}" for key, value in here.items() if value is not None), highlight=False)
    if here["load"] > 0.5:
        out.print(f"[yellow]Something else is running here (load {here['load']}): these times are not quiet ones.")
    if not peers:
        out.print("[red]None of the chosen peers can run here.")
        legend(out, absent)
        return 1
    results = measure(cases_of(options), peers, options, out)
    if options.scaling:
        print_scaling(results, peers, out)
    legend(out, absent)
    if options.json:
        settings = {key: getattr(options, key) for key in ("rounds", "seed", "preset", "scaling", "only")}
        peers_said = {
            name: {"absent": absent.get(name), "called": peer.called, "ops": list(peer.ops)}
            for name, peer in PEERS.items()
        }
        saved = {"machine": here, "settings": settings, "peers": peers_said, "cases": [r.as_dict() for r in results]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
        out.print(f"saved: {options.json}", highlight=False)
    bad = Counter(
        f"{name}: {row.failure or 'numbers off'}"
        for result in results
        for name, row in result.rows.items()
        if name in OWN and (row.failure or row.off)
    )
    for line, cases in bad.items():
        out.print(f"{line} (in {cases} of {len(results)} cases)", style="red", markup=False)
    return 1 if bad else 0


def print_scaling(results: list[Result], peers: list[Peer], out: Console) -> None:
    lines: dict[tuple, list[Result]] = {}
    for result in results:
        case = result.case
        lines.setdefault((case.op, case.head, case.dtype, case.masked, *case.shape[1:]), []).append(result)
    for (op, head, dtype, masked, h, v), line in lines.items():
        for peer in peers:
            if peer.name in line[0].rows:
                title = f"{peer.name}: {op}, {head} head, {dtype}, {masked} % masked, H={h} V={v}"
                out.print(scaling_table(title, line, peer.name), "")


if __name__ == "__main__":
    raise SystemExit(main())
