"""Logging: the KL's metrics go to the trainer's log, and its histogram to the trackers, since the log takes only
numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from refkl.kl import Histogram
from refkl.kl.statistics import quantiles_of

if TYPE_CHECKING:
    from refkl.hf.trainer_mixin import KLTrainerMixin

NAME = "kl/log_ratio"
"""The name under which the histogram is logged."""


def record(trainer: KLTrainerMixin, metrics: dict[str, float]) -> None:
    """Keep a step's metrics for the trainer's log, which shows means over the steps since the last log.

    Largest values and quantiles are not means: they are recomputed over all tokens of these steps.
    """
    logged = trainer._metrics["train"]
    if "kl/max" not in logged:
        trainer.kl_histogram = None  # the trainer has logged, and cleared its metrics
    for name, value in metrics.items():
        logged[trainer.kl_metric if name == "kl" else name].append(value)
    if (latest := trainer.penalty.histogram) is None:
        return
    trainer.kl_histogram = latest if trainer.kl_histogram is None else trainer.kl_histogram + latest
    for name, value in quantiles_of(trainer.kl_histogram).items():
        logged[name] = [value]


class HistogramCallback(TrainerCallback):
    """Sends the log-ratios' histogram to TensorBoard, Weights & Biases and Trackio, if `report_to` names them."""

    def __init__(self, trainer: KLTrainerMixin) -> None:
        self.trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        histogram = self.trainer.kl_histogram
        if histogram is None or not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        for callback in self.trainer.callback_handler.callbacks:
            for kind, send in _TRACKERS.items():
                if isinstance(callback, kind):
                    send(callback, histogram, state.global_step)


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
    """Return counts and edges. The bin of 0 gets some width, since a tracker would not show it otherwise."""
    found = histogram.trimmed()
    counts, edges = np.array(found["counts"]), np.array(found["edges"])
    half = min(x for x in Histogram.edges if x > 0) / 2
    for at in np.flatnonzero(np.diff(edges) == 0):
        edges[at : at + 2] = -half, half
    return counts, edges
