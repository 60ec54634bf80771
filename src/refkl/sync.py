"""Updates of the reference during training: periodic, as a moving average, or when the KL to it has grown too large."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from refkl.backend import communicating_device
from refkl.checkpoint import REFERENCE, complete
from refkl.config import SyncConfig
from refkl.kl import estimate
from refkl.reference import Reference
from refkl.reference.pair import measure_pair
from refkl.types import TokenBatch


class ReferenceSync:
    """Update of a reference as a SyncConfig says. In your own loop, call `step` once after each optimizer step.

    Args:
        reference: the reference to update.
        config: the times and the size of the updates.
        optimizer: the optimizer of the policy; used only for `config.reset_optimizer`.
    """

    def __init__(self, reference: Reference, config: SyncConfig | None = None, optimizer: Any = None) -> None:
        self.reference = reference
        self.config = config or SyncConfig()
        self.settled = self.config.settled()
        """The numbers of the average, also if the config leaves them open."""
        self.optimizer = optimizer
        """The policy's optimizer; a trainer's callback sets it when training begins."""
        self.steps = 0
        """Number of optimizer steps so far."""
        self.updates: list[dict[str, Any]] = []
        """One entry per update: {"step", "alpha"}, with "bias" for "bema", and with "kl" for a reset."""
        self._begun = False
        self._last_reset: int | None = None
        self.first_kl: list[dict[str, Any]] = []
        """One entry per measurement of the KL to the first reference: {"step", "kl"}, nats per token."""

    def begin(self, policy: nn.Module) -> None:
        """Check before training that `step` can work, and keep what it needs. The first `step` calls it if it was not
        called.

        Raises:
            ValueError: the reference cannot be updated, or `first_kl_every` is set and the first reference was not
                kept.
        """
        self.check(policy)
        if self.config.reset_optimizer and self.optimizer is None:
            raise ValueError("sync.reset_optimizer needs the optimizer: give ReferenceSync optimizer=.")
        if self.config.first_kl_every is not None:
            self.reference.keep_first()
        self._begun = True

    def check(self, policy: nn.Module) -> None:
        """Raise ValueError if the reference cannot be updated as the config asks."""
        config, reference = self.config, self.reference
        alpha = 0.5 if config.average == "bema" else self.settled.alpha or 1.0
        try:
            reference.check_movable(policy, alpha, lora=config.lora, rank=config.lora_rank)
        except ValueError as error:
            raise ValueError(
                f"sync is set to update the reference, but this one (strategy {reference.strategy!r}, from "
                f"{reference.source}) cannot be updated: {error}"
            ) from None

    def step(
        self,
        policy: nn.Module,
        *,
        kl: float | None = None,
        batch: TokenBatch | None = None,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Count one optimizer step, and update the reference if it is due. Every rank must call this.

        Args:
            policy: the policy after the step, wrapped or not.
            kl: KL to the reference, nats per token, over all ranks; needed for `max_kl`. `KLPenalty.step` returns it,
                except for a step in which no token was scored: pass 0.0 then.
            batch: tokens on which to measure the KL to the first reference; needed for `first_kl_every`.
            temperature: temperature of that measurement.

        Returns:
            Metrics: "kl/first", nats per token, if it was measured; "sync/updates", the number of updates so far.

        Raises:
            ValueError: kl or batch is missing; the KL is NaN on some rank; or as in `Reference.update`.
        """
        if not self._begun:
            self.begin(policy)
        self.steps += 1
        metrics = {}
        every = self.config.first_kl_every
        if every is not None and self.steps % every == 0:
            metrics["kl/first"] = self._measure_first(policy, batch, temperature)
            self.first_kl.append({"step": self.steps, "kl": metrics["kl/first"]})
        self._move(policy, kl)
        return {**metrics, "sync/updates": float(len(self.updates))}

    def state_dict(self) -> dict[str, Any]:
        """Return the counters. `Reference.save` saves the reference itself."""
        return {"steps": self.steps, "updates": list(self.updates), "first_kl": list(self.first_kl)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: the reference has seen a different number of updates, so it is not the one of this state.
        """
        if len(state["updates"]) != self.reference.updates:
            raise ValueError(
                f"The state was saved after {len(state['updates'])} syncs and this reference has seen "
                f"{self.reference.updates}: the run would go on with another reference. First call reference.load with "
                "the reference that was saved beside this state."
            )
        self.steps = int(state["steps"])
        self.updates, self.first_kl = list(state["updates"]), list(state["first_kl"])
        self._last_reset = max((update["step"] for update in self.updates if "kl" in update), default=None)

    def _move(self, policy: nn.Module, kl: float | None) -> None:
        config, age = self.config, self.steps - self.config.warmup
        passed = config.max_kl is not None and self._passed(kl, config.max_kl)
        if age <= 0:
            return
        if passed:
            if config.reset_optimizer:
                reset_optimizer(self.optimizer)
            self.reference.update(policy, 1.0)
            self.updates.append({"step": self.steps, "alpha": 1.0, "kl": kl})
            self._last_reset = self.steps
            return
        if config.every is None or age % config.every:
            return
        record: dict[str, Any] = {"step": self.steps, "alpha": self.settled.alpha}
        if config.average == "bema":
            record["alpha"], record["bias"] = self._bema()
        self.reference.update(policy, record["alpha"], bias=record.get("bias"), lora=config.lora, rank=config.lora_rank)
        self.updates.append(record)

    def _bema(self) -> tuple[float, float]:
        """Return alpha and bias, from the number of steps since the warm-up or the last reset."""
        found = self.settled
        assert found.lag is not None and found.ema_power is not None and found.bias_power is not None
        base = found.lag + self.steps - (self.config.warmup if self._last_reset is None else self._last_reset)
        return min(1.0, base**-found.ema_power), min(1.0, base**-found.bias_power)

    def _passed(self, kl: float | None, limit: float) -> bool:
        """Return True if any rank's KL is over the limit: all ranks must do the same.

        An infinite KL is over it: a copy of the policy ends it.
        """
        if kl is None:
            raise ValueError("sync.max_kl needs the KL of each step: pass kl=, nats per token, to ReferenceSync.step.")
        spoilt = math.isnan(kl) or kl == -math.inf
        flag = torch.tensor(2.0 if spoilt else float(kl > limit))
        if dist.is_initialized():
            flag = flag.to(communicating_device())
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        if float(flag) == 2.0:
            found = f"The KL of the step is {kl}" if spoilt else "The KL of the step is nan on another rank"
            raise ValueError(
                f"{found}, and sync.max_kl {limit:g} cannot be compared with it. Look for log-probabilities that are "
                "not finite in the scores of the policy or the reference."
            )
        return bool(flag)

    def _measure_first(self, policy: nn.Module, batch: TokenBatch | None, temperature: float) -> float:
        """Measure KL(policy ‖ first reference) with k3, in nats per token of the batches of all ranks."""
        if batch is None:
            raise ValueError("sync.first_kl_every needs tokens to measure on: pass batch= to ReferenceSync.step.")
        with self.reference.first():
            pair = measure_pair(policy, self.reference, batch, temperature=temperature)
        ours, first = pair.policy.logp, pair.reference.logp
        mask = batch.completion_mask.to(ours.device)
        kl = estimate(ours, first.to(ours.device), "k3", gradient="none", mask=mask)
        sums = torch.stack([x.sum().to("cpu", torch.float64) for x in (kl, mask)])
        if dist.is_initialized():
            sums = sums.to(communicating_device())
            dist.all_reduce(sums)
        total, tokens = sums.tolist()
        return total / max(tokens, 1.0)


def reset_optimizer(optimizer: Any) -> None:
    """Reset an optimizer's state to that of a new one: no moments, and step counts of 0.

    Raises:
        ValueError: under DeepSpeed, a kind of state that is not known.
    """
    partitioned = False
    while (inner := getattr(optimizer, "optimizer", None)) is not None:  # wrappers of accelerate and DeepSpeed
        partitioned |= type(optimizer).__module__.startswith("deepspeed.")
        optimizer = inner
    if not partitioned:
        optimizer.state.clear()  # the next step creates it again
    for state in optimizer.state.values():
        _zero_moments(state)
    for group in optimizer.param_groups:
        if "step" in group:  # fused optimizers of apex and DeepSpeed count there
            group["step"] = 0


_MOMENTS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}


def _zero_moments(state: dict[str, Any]) -> None:
    """Set the state to zero in place: DeepSpeed keeps references to these tensors."""
    if unknown := sorted(state.keys() - _MOMENTS):
        raise ValueError(
            f"sync.reset_optimizer does not know the initial value of {unknown[0]!r} in the state of this optimizer, "
            "and under DeepSpeed the state cannot be created again. Leave it out, or use AdamW."
        )
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value.zero_()
        else:
            state[name] = 0


class SyncReferenceCallback(TrainerCallback, ExportableState):
    """`ReferenceSync` as a callback for any transformers or TRL trainer.

    The trainer's checkpoints hold its counters. They hold the reference's weights, in `checkpoint-N/reference`, once it
    has been updated.

    Args:
        reference: the reference to update.
        config: when to update, and by how much.
        kl: returns the KL of the last step, nats per token over all ranks; needed for `max_kl`.
        batch: returns the tokens on which the KL to the first reference is measured; needed for `first_kl_every`.
        temperature: temperature of that measurement.

    Raises:
        ValueError: `kl` or `batch` is needed and missing.
    """

    def __init__(
        self,
        reference: Reference,
        config: SyncConfig | None = None,
        *,
        kl: Callable[[], float | None] | None = None,
        batch: Callable[[], TokenBatch | None] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.sync = ReferenceSync(reference, config)
        for setting, given, name in (("max_kl", kl, "kl"), ("first_kl_every", batch, "batch")):
            if getattr(self.sync.config, setting) is not None and given is None:
                raise ValueError(
                    f"sync.{setting} needs data that only a refkl trainer provides by itself. Give "
                    f"SyncReferenceCallback {name}=, a function without arguments."
                )
        self._kl, self._batch, self._temperature = kl, batch, temperature
        self.metrics: dict[str, float] = {}
        """The metrics of the last step, from `ReferenceSync.step`."""
        self.saves = True
        """True if this callback saves the updated reference with each checkpoint. A refkl trainer does that itself, and
        earlier."""

    @property
    def reference(self) -> Reference:
        """The reference that is updated."""
        return self.sync.reference

    @property
    def config(self) -> SyncConfig:
        """The settings of the updates."""
        return self.sync.config

    @property
    def updates(self) -> list[dict[str, Any]]:
        """One entry per update, as in `ReferenceSync.updates`."""
        return self.sync.updates

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the sync. On resume, check that the reference has had as many updates as that of the checkpoint.

        Raises:
            ValueError: it has not; or old checkpoints are deleted so early that a kill could leave no complete one.
        """
        if self.saves and args.save_total_limit == 1 and args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "With save_total_limit 1, transformers deletes the only whole checkpoint before the reference is in "
                "the next one. Set it to 2, or use a refkl trainer, which deletes afterwards."
            )
        self.sync.optimizer = kwargs.get("optimizer")
        if state.global_step:
            callbacks: Any = state.stateful_callbacks  # annotated as a list, but a list only until the state is made
            # If the run is resumed with a sync that it did not have before, transformers still expects this entry when
            # it saves.
            recorded = callbacks.setdefault(type(self).__name__, self.state())["attributes"]
            try:
                self.sync.load_state_dict({"first_kl": [], **recorded, "steps": state.global_step})
            except ValueError as error:
                folder = f"{args.output_dir}/checkpoint-{state.global_step}/reference"
                raise ValueError(
                    f"{error} Here: reference.load('{folder}') before train(resume_from_checkpoint=…)."
                ) from None
        self.sync.begin(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count one optimizer step."""
        kl = None if self._kl is None else self._kl()
        batch = None if self._batch is None else self._batch()
        self.sync.steps = state.global_step - 1
        self.metrics = self.sync.step(kwargs["model"], kl=kl, batch=batch, temperature=self._temperature)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the updated reference with the checkpoint, and mark the checkpoint as complete. Every rank must call
        this."""
        if not self.saves:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.updates:
            self.reference.save(checkpoint / REFERENCE)
        if dist.is_initialized():
            dist.barrier()  # the mark must cover the files of all ranks
        if args.should_save:
            complete(checkpoint)

    def state(self) -> dict[str, Any]:
        """Return the state that the trainer keeps in trainer_state.json."""
        state = self.sync.state_dict()
        attributes = {name: state[name] for name in ("updates", "first_kl")}
        return {"args": {"config": asdict(self.config) | asdict(self.sync.settled)}, "attributes": attributes}
