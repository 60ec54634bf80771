"""The output folder of `refkl compare`: compare.json, tokens.jsonl, compare.png."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from transformers import PreTrainedTokenizerBase

from refkl.checkpoint import disk_failure
from refkl.compare import Comparison, Texts
from refkl.files import folder_written_whole
from refkl.messages import RunError
from refkl.versions import library_versions

_RARE = 500
"""Default limit of the table: a token is listed if at least one in this many scored tokens is that token."""


def check_free(output: Path) -> None:
    """Raise ValueError if the output already exists."""
    if output.exists():
        raise ValueError(f"{output} already exists. Remove it or choose another --output.")


def record_of(
    found: Comparison,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    column: str | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return all results, and how they were computed. The settings are the command's options."""
    least = settings["min_count"]
    least = max(1, found.tokens // _RARE) if least is None else least
    fitted = {"truncated": texts.truncated, "left_out": texts.left_out, "moved": texts.moved, "limit": texts.limit}
    return {
        "data": {"source": settings["data"], "scored": column or "samples of the policy", **fitted},
        "settings": settings | {"min_count": least},
        "sequences": len(found.texts),
        "tokens": found.tokens,
        "units": {"of": found.unit, "count": len(np.unique(found.units))},
        "interval": "95 %, cluster-robust over units, Student's t",
        "results": {name: _result(found, name) for name in (*found.kinds, *found.estimates)},
        "by_token": {
            kind: [
                {"text": _piece(tokenizer, mean.token), **asdict(mean)}
                for mean in found.by_token(kind, top=settings["top"], least=least)
            ]
            for kind in found.kinds
        },
        "by_position": {kind: [asdict(part) for part in found.by_position(kind)] for kind in found.kinds},
        "versions": library_versions(),
    }


def _result(found: Comparison, name: str) -> dict[str, Any]:
    means = {"per_token": asdict(found.per_token(name)), "per_sequence": asdict(found.per_sequence(name))}
    largest = max(float(values.max()) for values in found.values[name])
    return {"exact": name in found.kinds, **means, "largest": largest}


def write_comparison(
    output: Path, record: dict[str, Any], found: Comparison, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the folder, complete or not at all.

    Raises:
        ValueError: it exists.
        RunError: the disk is full, or fails.
    """
    check_free(output)
    try:
        with folder_written_whole(output) as temporary:
            temporary.mkdir(parents=True)
            text = json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)
            (temporary / "compare.json").write_text(text + "\n")
            with (temporary / "tokens.jsonl").open("w") as file:
                for number in range(len(found.texts)):
                    line = json.dumps(_finite(_line(found, number, tokenizer)), ensure_ascii=False, allow_nan=False)
                    file.write(line + "\n")
            _draw(found, temporary / "compare.png")
    except OSError as error:
        if (failure := disk_failure(error)) is None:
            raise
        raise RunError(f"{output} could not be written ({failure}).") from error


def _line(found: Comparison, number: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return one sequence, with one value of each kind per scored token."""
    text = found.texts[number]
    sampled = {} if text.sample is None else {"sample": text.sample}
    return {
        "row": text.row,
        **sampled,
        "prompt": text.prompt,
        "prompt_ids": text.prompt_ids,
        "token_ids": text.completion_ids,
        "tokens": [_piece(tokenizer, token) for token in text.completion_ids],
        "divergence": {kind: found.values[kind][number].tolist() for kind in found.kinds},
        "log_ratio": found.log_ratio[number].tolist(),
    }


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token as text; if it is part of a character, the tokenizer's own name for it."""
    text = str(tokenizer.decode([token]))
    return text if "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))


def _finite(value: Any) -> Any:
    """Replace infinities by text, since JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _draw(found: Comparison, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for kind in found.kinds:
        _histogram(left, found, kind)
        parts = found.by_position(kind)
        middles = [(part.first + part.last) / 2 for part in parts]
        line = right.plot(middles, [part.mean.mean for part in parts], marker="o", markersize=3, label=kind)[0]
        spans = [(p.mean.low, p.mean.high) if p.mean.low is not None else (math.nan, math.nan) for p in parts]
        lows, highs = zip(*spans, strict=True)
        right.fill_between(middles, lows, highs, alpha=0.2, color=line.get_color(), linewidth=0)
    low, high = left.get_xlim()
    left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_title("divergence of a token", fontsize=10)
    left.set_ylabel("tokens")
    right.set_title("mean by position in the completion, with its 95 % interval", fontsize=10)
    right.set_xlabel("position")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _histogram(axis: Axes, found: Comparison, kind: str) -> None:
    """Plot on a logarithmic axis. Zeros cannot be shown there; the legend counts them."""
    values = np.concatenate(found.values[kind])
    shown = values[(values > 0) & np.isfinite(values)]
    zeros, infinite = int((values == 0).sum()), int(np.isinf(values).sum())
    others = "".join(f", {count:,} {what}" for count, what in ((zeros, "exactly 0"), (infinite, "infinite")) if count)
    axis.set_xscale("log")
    if not len(shown):
        axis.plot([], [], label=f"{kind}{others}")
        return
    bins = np.geomspace(shown.min() / 1.1, shown.max() * 1.1, 50).tolist()
    axis.hist(shown, bins=bins, histtype="step", label=f"{kind}{others}")
