"""The KL of a trainer during a run: what its losses write, and its callbacks read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from refkl.kl import Histogram
from refkl.kl.statistics import quantiles_of
from refkl.penalty import KLPenalty
from refkl.reference import Reference
from refkl.sync import SyncReferenceCallback
from refkl.types import TokenBatch


@dataclass(kw_only=True, eq=False)
class KLState:
    """A trainer's reference, penalty and sync, and its KL so far."""

    trainer: str
    """The name of the trainer's class, for messages."""
    policy: Callable[[], nn.Module]
    """Returns the policy as the trainer holds it now."""
    reference: Reference
    penalty: KLPenalty
    sync: SyncReferenceCallback | None = None
    accelerator: Accelerator
    metric: str
    """The name under which the KL per token is logged."""
    metrics: dict[str, defaultdict[str, list[float]]]
    """The trainer's own metrics, for "train" and "eval". Its log shows the mean of each list and clears them."""
    temperature: float = 1.0
    """The divisor of the logits."""
    measured: bool = False
    """True once a KL was added to a loss, or measured."""
    checked: bool = False
    """True once the first KL of the training was checked."""
    step_kl: float | None = None
    """The KL of the last optimizer step, nats per token over all ranks."""
    last_batch: TokenBatch | None = None
    """Tokens that were scored in the last optimizer step."""
    histogram: Histogram | None = None
    """The log-ratios of all tokens of the steps since the last log, over micro-batches and ranks."""

    def step(self) -> None:
        """End an optimizer step: reduce the KL over ranks, update the coefficient, and keep the metrics for the log."""
        metrics = self.penalty.step(self.accelerator)
        self.step_kl = metrics.get("kl", 0.0)  # missing if every completion was cut off
        self.record(metrics)

    def record(self, metrics: dict[str, float]) -> None:
        """Keep a step's metrics for the trainer's log, which shows means over the steps since the last log.

        Largest values and quantiles are not means: they are recomputed over all tokens of these steps.
        """
        logged = self.metrics["train"]
        if "kl/max" not in logged:
            self.histogram = None  # the trainer has logged, and cleared its metrics
        for name, value in metrics.items():
            logged[self.metric if name == "kl" else name].append(value)
        if (latest := self.penalty.histogram) is None:
            return
        self.histogram = latest if self.histogram is None else self.histogram + latest
        for name, value in quantiles_of(self.histogram).items():
            logged[name] = [value]
