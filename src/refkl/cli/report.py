"""`report.png`: reward and KL over the steps of one or more runs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_PANELS = (
    ("reward", "mean reward"),
    ("rewards/margins", "reward margin, chosen over rejected"),
    ("kl", "KL to the reference (nats per token)"),
)


def report_command(arguments: list[str]) -> int:
    """Parse and run `refkl report RUN [RUN …] [--output FILE]`."""
    parser = argparse.ArgumentParser(prog="refkl report", description=draw_report.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first one's report.png is written")
    parser.add_argument("--output", type=Path, help="write this PNG file instead")
    options = parser.parse_args(arguments)
    print(draw_report(*options.runs, output=options.output))
    return 0


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The training steps that a run logged.

    Raises:
        ValueError: no run folder there.
    """
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} is no run folder: it has no metrics.jsonl.")
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def draw_report(run: str | Path, *others: str | Path, output: str | Path | None = None) -> Path:
    """Draw reward and KL of a run, with other runs beside it for comparison, to `RUN/report.png`."""
    runs = [Path(run), *map(Path, others)]
    metrics = {path.name: read_metrics(path) for path in runs}
    panels = [(k, title) for k, title in _PANELS if any(k in row for rows in metrics.values() for row in rows)]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(5.2 * max(1, len(panels)), 3.8), squeeze=False)
    for axis, (key, title) in zip(axes[0], panels, strict=False):
        for name, rows in metrics.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                line = axis.plot(steps, values, alpha=0.3, linewidth=1)[0]
                axis.plot(steps, _running_mean(values), color=line.get_color(), linewidth=2, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes[0][0].legend(frameon=False)
    figure.tight_layout()
    path = Path(output) if output is not None else runs[0] / "report.png"
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _running_mean(values: tuple[float, ...], span: int = 5) -> list[float]:
    """Mean of each value with up to `span` - 1 before it."""
    return [
        sum(values[max(0, i - span + 1) : i + 1]) / len(values[max(0, i - span + 1) : i + 1])
        for i in range(len(values))
    ]
