"""What the trainers share: settling the arguments with TRL's own, the reference, the penalty's steps, the sync."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refkl.config import KLConfig, ReferenceConfig, SyncConfig
from refkl.freeze import trainable_parameters
from refkl.penalty import KLPenalty
from refkl.reference import Reference, build_reference
from refkl.sync import SyncReferenceCallback
from refkl.types import KLOutput, TokenScores


def trainer_args(trainer: type, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument `name` of a call to the TRL trainer, however it was passed; None if it was not."""
    signature = inspect.signature(trainer.__init__)  # type: ignore[misc]
    return signature.bind_partial(None, *args, **kwargs).arguments.get(name)


def settled_sync(args: Any, sync: SyncConfig | None) -> SyncConfig | None:
    """The sync to make: ours, or TRL's own setting (`sync_ref_model`) taken over.

    Raises:
        ValueError: both are given.
    """
    if args is None or not args.sync_ref_model:
        return sync
    if sync is not None:
        raise ValueError(
            "Both sync= and the trainer's sync_ref_model ask for a sync of the reference. Leave sync_ref_model False."
        )
    return SyncConfig(every=args.ref_model_sync_steps, alpha=args.ref_model_mixup_alpha)


@contextmanager
def overridden(args: Any, **values: Any) -> Iterator[None]:
    """The trainer's arguments with other values while TRL's __init__ reads them."""
    if args is None:
        yield
        return
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


class KLTrainerMixin(Trainer):
    """What a TRL trainer gains: `.reference`, `.penalty`, `.sync`, and KL metrics."""

    reference: Reference
    penalty: KLPenalty
    sync: SyncReferenceCallback | None = None
    model: nn.Module  # Trainer's type allows None; TRL's trainers always have one
    _metrics: dict[str, defaultdict[str, list[float]]]

    def _attach(self, reference: str | ReferenceConfig | Reference, kl: KLConfig, sync: SyncConfig | None) -> None:
        """Build the reference from the policy as TRL has made it (adapter and all), not yet wrapped or trained."""
        if not isinstance(reference, Reference):
            reference = build_reference(self.model, reference, accelerator=self.accelerator)
        if not trainable_parameters(self.model):
            raise ValueError(
                "No parameter of the policy trains. Was its adapter loaded with is_trainable=False, or all frozen?"
            )
        self.reference = reference
        self.penalty = KLPenalty(kl)
        self.add_callback(_PenaltySteps(self))
        if sync is not None:
            if self.args.restore_callback_states_from_checkpoint:
                raise ValueError(
                    "restore_callback_states_from_checkpoint makes callbacks anew, the sync's without its reference. "
                    "Leave it False: a resumed run takes up the sync's counters without it."
                )
            reference.check_movable(self.model)
            self.sync = SyncReferenceCallback(reference, sync)
            self.sync.saves = False
            self.add_callback(self.sync)

    def _penalise(
        self, logp: Tensor, ref_logp: Tensor, mask: Tensor, temperature: float, **options: Tensor | None
    ) -> KLOutput:
        output = self.penalty(
            TokenScores(logp, temperature=temperature), TokenScores(ref_logp, temperature=temperature), mask, **options
        )
        if not self.model.training:
            counted = mask.bool().sum().float()
            sums = torch.stack([output.per_token.detach().sum().float(), counted])
            total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._metrics["eval"]["kl"].append(total / max(tokens, 1.0))
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A reference that has moved goes into the checkpoint, before older checkpoints are rotated away."""
        if self.reference.updates:
            self.reference.save(
                Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / "reference"
            )
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """On resume, bring back a reference that had moved."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / "reference").is_dir():
            self.reference.load(Path(checkpoint) / "reference")


class _PenaltySteps(TrainerCallback):
    """Closes the penalty's window at each optimizer step, and lets the reference follow the prepared policy."""

    def __init__(self, trainer: KLTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.reference.settle()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, value in self.trainer.penalty.step(self.trainer.accelerator).items():
            self.trainer._metrics["train"][name].append(value)
