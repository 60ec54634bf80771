"""`refkl compare`: the exact divergence between two checkpoints, over the whole vocabulary."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from refkl.cli.compare_folder import check_free, record_of, write_comparison
from refkl.cli.inputs import import_function, load_rows
from refkl.cli.tables import WIDTH, new_table
from refkl.compare import (
    Checkpoint,
    Comparison,
    Mean,
    Texts,
    Watch,
    check_vocabularies,
    column_of,
    compare_models,
    divergences,
    hold,
    load_checkpoint,
    positions,
    read_texts,
    sample_texts,
)
from refkl.config import DataConfig, is_import_path

_SAMPLING = {"max_new_tokens": 64, "samples_per_prompt": 1, "seed": 0}


def compare_command(arguments: list[str]) -> int:
    """Parse and run `refkl compare MODEL_A MODEL_B --data FILE [--option value …]`."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    paths = [_path(options.model_a, "MODEL_A"), _path(options.model_b, "MODEL_B")]
    output = options.output or Path(f"compare-{_name(paths[0])}-{_name(paths[1])}")
    check_free(output)
    rows = load_rows(DataConfig(source=options.data, limit=options.limit), "--data")
    column = column_of(rows.column_names, sample=options.sample)
    _settle(options, column)
    logging.set_verbosity_error()
    first, second = (load_checkpoint(path, dtype=options.dtype, device=options.device) for path in paths)
    check_vocabularies(first, second)
    if (tokenizer := first.tokenizer or second.tokenizer) is None:
        raise ValueError(f"Neither {first.path} nor {second.path} holds a tokenizer: save one in a model's folder.")
    limit = _limit(positions(first.model, second.model), options.max_length)
    if column is None:
        texts = _samples(options, first.model, tokenizer, rows, limit, _watching(console))
    else:
        texts = read_texts(tokenizer, rows, column=column, limit=limit)
    for note in texts.notes():
        console.print(f"note: {note}", markup=False)
    found = _compare(options, first, second, texts, column is None, _watching(console))
    settings = {key: value for key, value in vars(options).items() if key not in ("model_a", "model_b", "output")}
    models = {"policy": first.record(), "reference": second.record()}
    record = models | record_of(found, tokenizer, texts, column, settings)
    write_comparison(output, record, found, tokenizer)
    _print(record, found)
    console.print(f"written to {output}  (compare.json, tokens.jsonl, compare.png)", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refkl compare",
        description="The divergence between two checkpoints: exact, with a 95 % interval, per token and by position.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    models = "a model folder, an adapter folder, a run folder, a hub name, or package.module:function"
    add("model_a", metavar="MODEL_A", help=f"the policy: {models}")
    add("model_b", metavar="MODEL_B", help="the reference: as for MODEL_A")
    add("--data", required=True, help="a .jsonl, .json, .csv or .parquet file, a saved data set, or module:function")
    add("--limit", type=int, help="largest number of rows to use")
    add("--kind", default="reverse_kl", help="reverse_kl is KL(A || B); one of refkl.kl.DIVERGENCES, or several a,b,c")
    add("--order", type=float, help="order of amari and renyi")
    add("--jsd-weight", type=float, help="A's share of the mixture of jsd; 0.5 by default")
    add("--temperature", type=float, default=1.0, help="divides the logits of both models, also when A samples")
    add("--sample", action="store_true", help="sample from A at the prompts, even if the data has completions")
    add("--max-new-tokens", type=int, help="largest number of tokens of a sample; 64 by default")
    add("--samples-per-prompt", type=int, help="number of samples per prompt; 1 by default")
    add("--seed", type=int, help="seed of the samples; 0 by default")
    add("--max-length", type=int, help="largest number of tokens of a sequence; by default the limit of the models")
    add("--batch-size", type=int, default=8, help="sequences per forward pass")
    add("--dtype", default="float32", help="dtype of the weights: float32, bfloat16, float16 or float64")
    add("--device", help="such as cuda:1; by default a GPU if there is one")
    add("--top", type=int, default=20, help="number of tokens in the table")
    add("--min-count", type=int, help="smallest count of a token in the table; 1 in 500 scored tokens by default")
    add("--output", type=Path, help="the folder to write; compare-A-B by default")
    return parser


def _path(text: str, which: str) -> str:
    return str(import_function(text, which)()) if is_import_path(text) else text


def _name(path: str) -> str:
    """Return a name for a model folder; for the model of a run, the run's name."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _settle(options: argparse.Namespace, column: str | None) -> None:
    """Check the options, and fill in the defaults.

    Raises:
        ValueError: an invalid kind or device, or an option that would be ignored.
    """
    for name in ("top", "min_count"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}.")
    options.kind = [kind for kind in options.kind.split(",") if kind]
    if options.jsd_weight is not None and "jsd" not in options.kind:
        raise ValueError("--jsd-weight is for --kind jsd, which is not set. Leave it out.")
    options.jsd_weight = 0.5 if options.jsd_weight is None else options.jsd_weight
    divergences(options.kind, order=options.order, jsd_weight=options.jsd_weight)
    for name, default in _SAMPLING.items():
        if column is None and getattr(options, name) is None:
            setattr(options, name, default)
        if column is not None and getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is for samples, and the data has the column {column!r}, which is scored as it is. Add "
                f"--sample to sample at its prompts instead, or leave {option} out."
            )
    options.device = _device(options.device)


def _device(given: str | None) -> str:
    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"--device {given!r} is not a device: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {given!r}, and torch finds no GPU here. Use --device cpu.")
    return given


def _limit(*given: int | None) -> int | None:
    """Return the largest allowed number of tokens of a sequence; None for no limit."""
    limit = min((number for number in given if number is not None), default=None)
    if limit is not None and limit < 2:
        raise ValueError(f"--max-length must be at least 2, got {limit}: a scored token needs a token before it.")
    return limit


def _samples(
    options: argparse.Namespace,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Any],
    limit: int | None,
    watch: Watch,
) -> Texts:
    return sample_texts(
        model,
        tokenizer,
        rows,
        samples=options.samples_per_prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        limit=limit,
        watch=watch,
    )


def _compare(
    options: argparse.Namespace, first: Checkpoint, second: Checkpoint, texts: Texts, sampled: bool, watch: Watch
) -> Comparison:
    return compare_models(
        first.model,
        hold(second.model),
        texts.texts,
        kinds=options.kind,
        sampled=sampled,
        temperature=options.temperature,
        order=options.order,
        jsd_weight=options.jsd_weight,
        batch_size=options.batch_size,
        watch=watch,
    )


def _watching(console: Console) -> Watch:
    """Return a Watch that shows a progress bar if the console is a terminal."""

    def watch(items: Sequence[Any], what: str) -> Iterable[Any]:
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            yield from bar.track(items)

    return watch


def _print(record: dict[str, Any], found: Comparison) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    policy, reference = record["policy"], record["reference"]
    for letter, model in (("A", policy), ("B", reference)):
        on = f" on {model['base']}" if model["base"] else ""
        console.print(f"{letter}  {model['path']}{on}  ({model['fingerprint'][:12]})", markup=False)
    units = record["units"]
    console.print(
        f"{record['sequences']:,} sequences of {record['data']['source']}, {record['tokens']:,} tokens scored; 95 % "
        f"intervals over {units['count']:,} {units['of']}{'s' if units['count'] > 1 else ''}",
        markup=False,
    )
    table = new_table("divergence", "per token>", "95 %", "per sequence>", "95 %", "largest token>")
    for name, result in record["results"].items():
        what = name if result["exact"] else f"{name} (sampled)"
        means = (f"{result[key]['mean']:.4g}" for key in ("per_token", "per_sequence"))
        spans = (_span(getattr(found, key)(name)) for key in ("per_token", "per_sequence"))
        token, sequence = zip(means, spans, strict=True)
        table.add_row(what, *token, *sequence, f"{result['largest']:.4g}")
    console.print(table)
    kind = found.kinds[0]
    table = new_table("token", "id>", "count>", f"{kind}>", "log A - log B>")
    for entry in record["by_token"][kind]:
        ratio = f"{entry['log_ratio']:+.3g}"
        table.add_row(
            escape(repr(entry["text"])), str(entry["token"]), f"{entry['count']:,}", f"{entry['mean']:.4g}", ratio
        )
    console.print(table)
    table = new_table("position>", "tokens>", f"{kind}>", "95 %")
    for part in found.by_position(kind):
        place = f"{part.first}" if part.first == part.last else f"{part.first}-{part.last}"
        table.add_row(place, f"{part.tokens:,}", f"{part.mean.mean:.4g}", _span(part.mean))
    console.print(table)


def _span(mean: Mean) -> str:
    return "-" if mean.low is None or mean.high is None else f"{mean.low:.4g} to {mean.high:.4g}"
