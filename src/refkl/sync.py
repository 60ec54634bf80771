"""When the reference moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from refkl.checkpoint import REFERENCE, complete
from refkl.config import SyncConfig
from refkl.reference import Reference


class SyncReferenceCallback(TrainerCallback, ExportableState):
    """Every `every` optimizer steps: theta_ref <- (1 - alpha) theta_ref + alpha theta_policy.

    For any transformers or TRL trainer. Its counters are in the trainer's checkpoints; the reference's weights are in
    `checkpoint-N/reference` once it has moved.
    """

    def __init__(self, reference: Reference, config: SyncConfig | None = None) -> None:
        self.reference = reference
        self.config = config or SyncConfig()
        self.updates: list[dict[str, Any]] = []
        """One entry for each update: {"step", "alpha"}."""
        self.saves = True
        """Whether it saves the moved reference with each checkpoint; a refkl trainer does so itself, and earlier."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to go on from a checkpoint whose reference had moved, with one that has not.

        Raises:
            ValueError: that; or checkpoints are rotated so that a kill could leave none that is whole.
        """
        self.reference.check_movable(kwargs["model"])
        if self.saves and args.save_total_limit == 1 and args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                "save_total_limit 1 has transformers delete the only whole checkpoint before the reference is in the "
                "next one. Set it to 2, or use a refkl trainer, which deletes afterwards."
            )
        if state.global_step == 0:
            return
        callbacks: Any = state.stateful_callbacks  # annotated as a list, which it is only until the state is made
        # A run that is resumed with a sync it did not have before: transformers looks for this entry when it saves.
        recorded = callbacks.setdefault(type(self).__name__, self.state())
        self.updates = list(recorded["attributes"]["updates"])
        if len(self.updates) != self.reference.updates:
            raise ValueError(
                f"The checkpoint was made after {len(self.updates)} syncs and this reference has seen "
                f"{self.reference.updates}: the run would go on with another reference. Call "
                f"reference.load('{args.output_dir}/checkpoint-{state.global_step}/reference') before "
                "train(resume_from_checkpoint=…)."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count optimizer steps, and sync on each multiple of `every`."""
        if state.global_step % self.config.every == 0:
            self.reference.update(kwargs["model"], self.config.alpha)
            self.updates.append({"step": state.global_step, "alpha": self.config.alpha})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the moved reference with the checkpoint, and mark this as complete; every rank calls."""
        if not self.saves:
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.updates:
            self.reference.save(checkpoint / REFERENCE)
        if dist.is_initialized():
            dist.barrier()  # what is marked is of all ranks
        if args.should_save:
            complete(checkpoint)

    def state(self) -> dict[str, Any]:
        """What the trainer keeps in trainer_state.json."""
        config = {"every": self.config.every, "alpha": self.config.alpha}
        return {"args": {"config": config}, "attributes": {"updates": self.updates}}
