"""`report.png`: reward and KL over the steps of one or more runs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from refkl.cli.report.runs import read_runs, running_mean
from refkl.files import file_written_whole

_PANELS = (
    ("reward", "mean reward"),
    ("rewards/margins", "reward margin, chosen over rejected"),
    ("kl", "KL to the reference (nats per token)"),
)


def draw_report(run: str | Path, *others: str | Path, output: str | Path | None = None) -> Path:
    """Draw reward and KL of a run, with other runs beside it for comparison, to `RUN/report.png`."""
    runs = read_runs([Path(run), *map(Path, others)])
    panels = [(key, title) for key, title in _PANELS if any(run.has(key) for run in runs)]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(5.2 * max(1, len(panels)), 3.8), squeeze=False)
    for axis, (key, title) in zip(axes[0], panels, strict=False):
        for number, one in enumerate(runs):
            steps, values = one.series(key)
            if steps:
                colour = f"C{number % 10}"  # the run's colour in all panels
                axis.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
                axis.plot(steps, running_mean(values), color=colour, linewidth=2)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        lines = [Line2D([], [], color=f"C{number % 10}", linewidth=2) for number in range(len(runs))]
        axes[0][0].legend(lines, [run.name for run in runs], frameon=False)
    figure.tight_layout()
    path = Path(output) if output is not None else runs[0].path / "report.png"
    with file_written_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    return path
