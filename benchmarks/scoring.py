"""What a reference's scores take where completions share prompts, beside one plain pass over the padded batch.

python benchmarks/scoring.py                                                        # P=256 with L=64 and L=32
python benchmarks/scoring.py --grid --rounds 100 --seconds 12 --json benchmarks/out/scoring_grid.json \
    --plot docs/images/scoring.png                                                  # an hour on two cores
python benchmarks/scoring.py --prompts 256 --completions 64 --generations 8 --ragged --policy

One group of G completions of L tokens on a prompt of P. Both ways run in one process, once a round, in random order;
ratios are taken within a round. --json is written after each case, and cases that it holds of the same settings are not
measured again. The plain pass is refkl's own scorer on the batch as it is (`prefix="off"`), so that
the output head, which is the same for both, is fused in both. --ragged draws lengths from L/4 to L. --policy also times
a forward and backward pass of the policy over the same tokens, all weights and LoRA, and a score of its reference (a
clone; the policy with its adapter off): how much of a step that is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch
from kernel_report import machine, write
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from refkl import TokenBatch, build_reference, score_tokens
from refkl.scoring import prepare

matplotlib.use("Agg")

GRID = (16, 64, 256, 1024)
GENERATIONS = (1, 4, 8, 16)
WAYS = ("off", "auto")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
SETTINGS = ("ragged", "policy", "rounds", "seconds", "hidden", "layers", "vocabulary")
"""Options that a case's figures depend on."""
LEAST = 2
"""Rounds of a case, however long they take."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256], metavar="P")
    parser.add_argument("--completions", type=int, nargs="+", default=[64], metavar="L")
    parser.add_argument("--generations", type=int, nargs="+", default=[8], metavar="G")
    parser.add_argument("--grid", action="store_true", help="P, L of 16, 64, 256, 1024; G of 1, 4, 8, 16")
    parser.add_argument("--most", type=int, default=10**9, help="of the grid, cases of at most so many padded tokens")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--policy", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="no further round of a case after these")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """As SmolLM2-135M is made, with random weights."""
    torch.manual_seed(0)
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def batch_of(prompt: int, completion: int, group: int, options: argparse.Namespace, prefix: Any) -> TokenBatch:
    source = torch.Generator().manual_seed(1)
    shared = torch.randint(2, options.vocabulary, (1, prompt), generator=source).expand(group, -1)
    own = torch.randint(2, options.vocabulary, (group, completion), generator=source)
    ends = torch.full((group, 1), completion)
    if options.ragged:
        ends = torch.randint(max(2, completion // 4), completion + 1, (group, 1), generator=source)
    real = torch.cat([torch.ones(group, prompt, dtype=torch.bool), torch.arange(completion) < ends], 1)
    scored = real.clone()
    scored[:, :prompt] = False
    batch = TokenBatch(torch.cat([shared, own], 1), real, scored, prefix=prefix)
    return batch.to("cuda") if torch.cuda.is_available() else batch


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def scored(model: nn.Module, batch: TokenBatch) -> torch.Tensor:
    with torch.no_grad():
        return score_tokens(model, batch).logp


def stepped(model: nn.Module, batch: TokenBatch) -> None:
    score_tokens(model, batch).logp.sum().backward()
    model.zero_grad()


def measure(policies: dict[str, nn.Module], size: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way, round by round."""
    model = policies["full"]
    batches = {way: batch_of(*size, options, way) for way in WAYS}
    found: dict[str, torch.Tensor] = {}
    work: dict[str, Callable[[], Any]] = {
        way: (lambda way=way: found.update({way: scored(model, batches[way])})) for way in WAYS
    }
    for name, policy in policies.items() if options.policy else ():
        work[name] = lambda policy=policy: stepped(policy, batches["auto"])
        reference = build_reference(policy)
        work[f"reference of {name}"] = lambda reference=reference: reference.score(batches["auto"])
    times: dict[str, list[float]] = {name: [] for name in work}
    shuffle = random.Random(0)
    begun = time.perf_counter()
    while (done := len(times["off"])) < options.rounds:
        if done >= LEAST and time.perf_counter() - begun > options.seconds:
            break
        for name in shuffle.sample(list(work), len(work)):
            times[name].append(seconds(work[name]))
    layout = prepare(model, batches["auto"]).packed
    row: dict[str, Any] = {
        "P": size[0], "L": size[1], "G": size[2], "seconds": times,
        "tokens": {"plain": batches["off"].input_ids.numel(), "one row": None if layout is None else layout.tokens},
        "speedup": statistics.median(a / b for a, b in zip(times["off"], times["auto"], strict=True)),
        "difference": float((found["off"] - found["auto"]).abs().max()),
    }  # fmt: skip
    for name in policies if options.policy else ():
        pairs = zip(times[f"reference of {name}"], times[name], strict=True)
        row[f"of {name}"] = statistics.median(a / b for a, b in pairs)
    return row


def measured_before(path: Path | None, here: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases of an earlier run that was cut off, if it was this run."""
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    same = all(before["machine"].get(name) == here[name] for name in ("cpu", "cores", "threads", "torch"))
    return before["cases"] if same and before["settings"] == settings else []


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    view = Table(title="scoring a group of completions: one plain pass over one row with the prompt in it once")
    names = ["of full", "of LoRA"] if options.policy else []
    for column in ("P", "L", "G", "plain, s", "refkl, s", "speed-up", "tokens", "logp differs", *names):
        view.add_column(column, justify="right")
    for row in rows:
        medians = [f"{statistics.median(row['seconds'][way]):.3f}" for way in WAYS]
        one = row["tokens"]["one row"]
        tokens = f"{row['tokens']['plain']} → {one}" if one else f"{row['tokens']['plain']}"
        shares = [f"{row[name]:.2f}" for name in names]
        view.add_row(
            *(str(row[x]) for x in "PLG"),
            *medians,
            f"{row['speedup']:.2f}",
            tokens,
            f"{row['difference']:.0e}",
            *shares,
        )
    return view


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over P/L; dashed, what it would be if only tokens cost; hollow, where both are the same pass."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    ratios = [row["P"] / row["L"] for row in rows]
    steps = range(math.floor(math.log2(min(ratios))), math.ceil(math.log2(max(ratios))) + 1)
    fine = [2 ** (steps[0] + (steps[-1] - steps[0]) * i / 100) for i in range(101)]
    counts = sorted({row["G"] for row in rows})
    for number, (colour, group) in enumerate(zip(COLOURS, counts, strict=False)):
        aside = 1.06 ** (number - (len(counts) - 1) / 2)  # so that points do not hide each other
        for shared in (True, False):
            some = [r for r in rows if r["G"] == group and (r["tokens"]["one row"] is not None) == shared]
            at, fast = [r["P"] / r["L"] * aside for r in some], [r["speedup"] for r in some]
            axes.plot(at, fast, "o", color=colour, markerfacecolor=colour if shared else "white", alpha=0.85)
        axes.plot([], [], "o", color=colour, label=f"{group}")
        axes.plot(fine, [group * (x + 1) / (x + group) for x in fine], "--", color=colour, linewidth=1)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt : tokens of a completion", ylabel="times as fast")
    ticks = [2.0**step for step in steps if step % 2 == 0]
    axes.set_xticks(ticks, [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in ticks])
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.legend(title="completions of a prompt")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse()
    model = make_model(options)
    policies: dict[str, nn.Module] = {"full": model}
    if options.policy:
        adapted = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        policies["LoRA"] = get_peft_model(make_model(options), adapted)
    sizes = (
        [size for size in product(GRID, GRID, GENERATIONS) if size[2] * (size[0] + size[1]) <= options.most]
        if options.grid
        else list(product(options.prompts, options.completions, options.generations))
    )
    here = machine("cuda" if torch.cuda.is_available() else "cpu")
    settings = {name: getattr(options, name) for name in SETTINGS}
    rows = measured_before(options.json, here, settings)
    there = {(row["P"], row["L"], row["G"]) for row in rows}
    if missing := [size for size in sizes if size not in there]:
        for way in WAYS:  # the first call of a process is slow
            scored(model, batch_of(64, 64, 4, options, way))
    for size in missing:
        rows.append(measure(policies, size, options))
        print(f"P={size[0]} L={size[1]} G={size[2]}: {rows[-1]['speedup']:.2f}", flush=True)
        if options.json is not None:
            write(options.json, {"machine": here, "settings": settings, "cases": rows})
    console = Console(width=150)
    console.print(here)
    console.print(table(rows, options))
    if options.plot is not None:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
