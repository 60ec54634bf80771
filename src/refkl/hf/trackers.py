"""The histogram of log-ratios in TensorBoard, Weights & Biases and Trackio: a trainer's log takes only numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from refkl.kl import Histogram

NAME = "kl/log_ratio"
"""The name under which the histogram is logged."""


def send(histogram: Histogram, callbacks: Iterable[TrainerCallback], step: int) -> None:
    """Send a histogram to each tracker among a trainer's callbacks."""
    for callback in callbacks:
        for kind, to_tracker in _TRACKERS.items():
            if isinstance(callback, kind):
                to_tracker(callback, histogram, step)


def _to_tensorboard(callback: Any, histogram: Histogram, step: int) -> None:
    if callback.tb_writer is None:
        return
    counts, edges = _drawn(histogram)
    centres = (edges[:-1] + edges[1:]) / 2
    callback.tb_writer.add_histogram_raw(
        f"train/{NAME}",
        min=float(edges[0]),
        max=float(edges[-1]),
        num=histogram.tokens,
        sum=float(counts @ centres),
        sum_squares=float(counts @ centres**2),
        bucket_limits=edges.tolist(),
        bucket_counts=[0, *counts.tolist()],  # the first count is for values below the first edge
        global_step=step,
    )


def _to_wandb(callback: Any, histogram: Histogram, step: int) -> None:
    import wandb

    if wandb.run is not None:
        drawn = wandb.Histogram(np_histogram=_drawn(histogram))
        wandb.log({f"train/{NAME}": drawn, "train/global_step": step})


def _to_trackio(callback: Any, histogram: Histogram, step: int) -> None:
    import trackio

    drawn = trackio.Histogram(np_histogram=_drawn(histogram))
    trackio.log({f"train/{NAME}": drawn, "train/global_step": step})


_TRACKERS: dict[type, Callable[[Any, Histogram, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    TrackioCallback: _to_trackio,
}


def _drawn(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and edges. The bin of 0 gets some width, because trackers do not show it otherwise."""
    found = histogram.trimmed()
    counts, edges = np.array(found["counts"]), np.array(found["edges"])
    half = min(x for x in Histogram.edges if x > 0) / 2
    for at in np.flatnonzero(np.diff(edges) == 0):
        edges[at : at + 2] = -half, half
    return counts, edges
