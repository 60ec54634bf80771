"""`refkl plan`: memory of a run on each rank, the possible reference strategies, and a recommendation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from transformers.utils import logging

from refkl.cli.tables import WIDTH, new_table
from refkl.messages import nearest, size
from refkl.planner import Plan, PlanConfig, Row, count, make_plans, memory_bytes, read_config, recommend

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def plan_command(arguments: list[str]) -> int:
    """Parse and run `refkl plan --model DIR_OR_CONFIG [--option value …]`."""
    parser = _parser()
    _check_options(parser, arguments)
    try:
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    config = PlanConfig(
        model=_model(options.model),
        world_size=options.world_size,
        backend=options.backend,
        method=options.method,
        dtype=_SHORT.get(options.dtype, options.dtype),
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        memory=memory_bytes(options.memory),
        gradient_checkpointing=options.gradient_checkpointing,
        lora_rank=options.lora_rank,
        lora_target=options.lora_target.split(","),
        freeze=options.freeze.split(",") if options.freeze else [],
    )
    plans = make_plans(config)
    taken, why = recommend(config, plans)
    if options.json:
        print(json.dumps(_as_json(config, plans, taken, why), indent=2))
    else:
        _print(config, plans, taken, why)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="refkl plan", description=plan_command.__doc__, exit_on_error=False)
    add, default = parser.add_argument, {f.name: f.default for f in dataclasses.fields(PlanConfig)}
    add("--model", type=str, help="a model folder, a config.json, or package.module:function that returns a folder")
    add("--world-size", type=int, default=default["world_size"], help="ranks")
    add("--backend", type=str, default=None, help="plain, ddp, zero1, zero2, zero3 or fsdp2; default: compares some")
    add("--method", type=str, default=None, help="full or lora; by default both are compared")
    add("--dtype", type=str, default="bf16", help="dtype of the weights: bf16, fp16 or fp32")
    add("--batch-size", type=int, default=default["batch_size"], help="sequences that a rank processes at once")
    add("--seq-len", type=int, default=default["seq_len"], help="tokens of a sequence: prompt and completion")
    add("--memory", type=str, default="80GiB", help="memory of a device")
    add("--gradient-checkpointing", type=bool, default=True, help="recompute activations in backward: true or false")
    add("--lora-rank", type=int, default=default["lora_rank"], help="rank of the adapter, for lora")
    add("--lora-target", type=str, default="all-linear", help="modules of the adapter, separated by commas, for lora")
    add("--freeze", type=str, default="", help="module paths to freeze, separated by commas, for full")
    add("--json", action="store_true", help="print everything as JSON")
    return parser


def _check_options(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Raise ValueError for an unknown option; the message names the nearest one."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        if argument.startswith("-") and (option := argument.split("=")[0]) not in known:
            raise ValueError(
                f"refkl plan has no option {option}.{nearest(option, known)} refkl plan --help lists them."
            )


def _model(path: str | None) -> Any:
    from refkl.config import is_import_path

    if path is None:
        raise ValueError("refkl plan needs a model's configuration: --model with a model folder or a config.json.")
    if is_import_path(path):
        from refkl.cli.inputs import import_function

        path = str(import_function(path, "--model")())
    logging.set_verbosity_error()  # missing generation settings do not matter here
    return read_config(path)


def _print(config: PlanConfig, plans: Sequence[Plan], taken: Plan | None, why: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    name = Path(str(config.model.name_or_path)).name
    console.print(
        f"{config.model.model_type} {name}: {count(plans[0].parameters)} parameters, {config.dtype}; "
        f"{config.world_size} rank{'s' if config.world_size > 1 else ''} of {size(config.memory)}, of which "
        f"{size(config.available)} can be filled; {config.batch_size} x {config.seq_len:,} tokens a step on each",
        markup=False,
    )
    shown = plans
    if len(config.backends) > 1:
        _print_comparison(console, plans)
        shown = [p for p in plans if p is taken] or [plans[-1]]
    for plan in shown:
        _print_plan(console, config, plan)
    console.print(f"\n{'take' if taken else 'no way'}: {why}", markup=False)


def _print_comparison(console: Console, plans: Sequence[Plan]) -> None:
    """Print one line per plan, with the choice of "auto"."""
    table = new_table(
        "method", "backend", *(f"{t.name}>" for t in plans[0].terms), "reference", "adds>", "all>", "fits"
    )
    for plan in plans:
        row = plan.auto
        terms = (size(t.bytes) for t in plan.terms)
        added = size(row.cost.device + row.cost.scoring)
        table.add_row(plan.method, plan.backend.name, *terms, row.strategy, added, size(row.device), _yes(row.fits))
    console.print(table)


def _print_plan(console: Console, config: PlanConfig, plan: Plan) -> None:
    method = "full fine-tuning" if plan.method == "full" else f"LoRA of rank {config.lora_rank}"
    console.print(f"\n{method} on {plan.backend}, {count(plan.trained)} parameters train; on each rank:", markup=False)
    for term in plan.terms:
        console.print(f"  {term.name:<12}{size(term.bytes):>10} = {term.arithmetic}", markup=False)
    console.print(f"  {'':<12}{size(sum(t.bytes for t in plan.terms)):>10}")
    table = new_table("reference", "device>", "host>", "scoring>", "FLOPs>", "moved>", "all on device>", "fits")
    for row in plan.rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(f"auto: {plan.auto.strategy}: {plan.reason}", markup=False)
    for strategy, why_not in plan.refused.items():
        console.print(f"not {strategy}: {why_not}", markup=False)


def _cells(row: Row) -> tuple[str, ...]:
    cost = row.cost
    name = " ".join(filter(None, (row.strategy, row.option, "(auto)" if row.auto else "")))
    flops = _flops(cost.flops) if cost.flops else f"{_flops(cost.host_flops)} (CPU)"
    numbers = (cost.device, cost.host, cost.scoring, cost.moved, row.device)
    device, host, scoring, moved, total = (size(number) if number else "0" for number in numbers)
    return name, device, host, scoring, flops, moved, total, _yes(row.fits)


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _flops(number: int) -> str:
    return f"{number / 1e12:,.3g} T"


def _as_json(config: PlanConfig, plans: Sequence[Plan], taken: Plan | None, why: str) -> dict[str, Any]:
    """Return the plans for JSON, with bytes and operations as plain numbers."""
    best = taken.best if taken is not None else None
    asked = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "model"}
    recommended = None
    if taken is not None and best is not None:
        recommended = {"method": taken.method, "backend": taken.backend.name}
        recommended |= {"strategy": best.strategy, "option": best.option}
    return {
        "asked": {"model": config.model.name_or_path, **asked},
        "recommended": recommended,
        "why": why,
        "plans": [dataclasses.asdict(plan) | {"auto": plan.auto.strategy} for plan in plans],
    }
