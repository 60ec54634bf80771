"""Checkpoints of the trainers: saving the reference and the penalty, completeness, and resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from refkl.checkpoint import (
    BEGUN,
    MARK,
    RECORD,
    REFERENCE,
    CheckpointError,
    begin,
    complete,
    discard,
    disk_failure,
    newest_whole,
    rotate,
    state_of,
    why_not_whole,
)
from refkl.config import OnCheckpointError, ResumedReference
from refkl.files import write_json
from refkl.messages import size, unknown
from refkl.penalty import KLPenalty
from refkl.reference import Reference
from refkl.sync import SyncReferenceCallback

logger = logging.get_logger(__name__)

PENALTY_STATE = "kl_penalty.json"
"""File in a checkpoint: the state of the coefficient's controller."""
_INITIAL = (
    "To go on with the reference that this run starts with, ask for it: resume_reference='initial' (in refkl train, "
    "--resume.reference initial)."
)


def _nothing() -> None:
    """Do nothing, on a rank that has no part in a step of the save."""


@contextmanager
def overridden(args: Any, **values: Any) -> Iterator[None]:
    """Override arguments of the trainer, for example while TRL's __init__ reads them."""
    if args is None:
        yield
        return
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


class Checkpointing(Trainer):
    """A trainer whose checkpoints include its reference and its penalty. Incomplete checkpoints do not count."""

    reference: Reference
    penalty: KLPenalty
    sync: SyncReferenceCallback | None = None
    model: nn.Module  # Trainer's type allows None; here it is always a model
    _resumed: str | None = None
    """The checkpoint that was checked and found complete."""
    resume_reference: ResumedReference = "recorded"
    """On resume: "recorded" uses the reference that the checkpoint was trained against, "initial" the one this trainer
    built."""
    on_checkpoint_error: OnCheckpointError = "stop"
    """The reaction to a checkpoint that cannot be written, as on a full disk."""

    def _settle_checkpoints(self, resume_reference: ResumedReference, on_checkpoint_error: OnCheckpointError) -> None:
        for name, value, known in (
            ("resume_reference", resume_reference, get_args(ResumedReference)),
            ("on_checkpoint_error", on_checkpoint_error, get_args(OnCheckpointError)),
        ):
            if value not in known:
                raise unknown(name, value, known)
        if self.args.save_on_each_node:
            raise ValueError(
                "save_on_each_node keeps a checkpoint on each node, but only the first node writes the reference. Save "
                "to a disk that all nodes share, and leave save_on_each_node out."
            )
        if on_checkpoint_error == "continue" and (why := self._saves_together()) is not None:
            raise ValueError(
                f"on_checkpoint_error 'continue' needs ranks that tell each other of a failed write, but {why} they "
                "wait inside the save for the rank that failed. Use 'stop': the last whole checkpoint stays."
            )
        self.resume_reference, self.on_checkpoint_error = resume_reference, on_checkpoint_error

    def _saves_together(self) -> str | None:
        """Return why ranks would wait for a rank that fails while transformers saves; None if they would not."""
        if self.accelerator.num_processes == 1:
            return None
        if self.is_deepspeed_enabled:
            return "with DeepSpeed"
        if self.is_fsdp_enabled:
            return "with FSDP"
        return "with metric_for_best_model" if self.args.metric_for_best_model is not None else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a complete checkpoint, and then delete old ones.

        Raises:
            ValueError: the reference changed without a recorded update.
            CheckpointError: the checkpoint could not be written, as on a full disk, and `on_checkpoint_error` is
                "stop".
        """
        folder = Path(self._get_output_dir(trial))
        checkpoint, first = folder / f"checkpoint-{self.state.global_step}", self.args.should_save
        best, save = self.state.best_model_checkpoint, super()._save_checkpoint
        self.reference.verify()

        def transformers_part() -> None:
            with overridden(self.args, save_total_limit=None):  # transformers deletes before all ranks have written
                save(model, trial)

        def closing() -> None:
            complete(checkpoint)
            rotate(folder, self.args.save_total_limit, (checkpoint, self.state.best_model_checkpoint))

        steps: list[tuple[Callable[[], None], str | None]] = [
            ((lambda: begin(checkpoint)) if first else _nothing, None),
            (lambda: self._save_reference(checkpoint), None),
            (transformers_part, self._saves_together()),
            (closing if first else _nothing, None),
        ]
        for step, alone in steps:
            if (failure := self._failure(step, checkpoint, alone)) is not None:
                self.state.best_model_checkpoint = best
                self._give_up(checkpoint, failure)
                return

    def _failure(self, step: Callable[[], None], checkpoint: Path, alone: str | None) -> str | None:
        """Run a part of a save. Return the disk's error message from any rank, the same on all ranks; None if it
        worked.

        `alone` is the reason why a failed rank cannot tell the others: it ends, and its launcher ends them.
        """
        own: str | None = None
        try:
            step()
        except (OSError, RuntimeError, SafetensorError) as error:
            if (own := disk_failure(error)) is None:
                raise
            own = f"{own}; {size(shutil.disk_usage(checkpoint.parent).free)} free there"
            if alone is not None:
                raise CheckpointError(self._unwritten(checkpoint, own)) from error
        found: list[str | None] = gather_object([own])
        return next((failure for failure in found if failure is not None), None)

    def _give_up(self, checkpoint: Path, failure: str) -> None:
        if self.args.should_save:
            try:
                discard(checkpoint)
            except OSError as error:
                logger.warning(f"The incomplete {checkpoint} could not be deleted: {error}")
        message = self._unwritten(checkpoint, failure)
        if self.on_checkpoint_error == "stop":
            raise CheckpointError(message)
        logger.warning(f"{message} Training goes on without it.")

    def _unwritten(self, checkpoint: Path, failure: str) -> str:
        whole = newest_whole(checkpoint.parent, contents=False).path
        last = "there is no whole checkpoint yet" if whole is None else f"the newest whole checkpoint is {whole}"
        return f"{checkpoint} could not be written ({failure}); {last}."

    def _save_reference(self, checkpoint: Path) -> None:
        """Save the controller, and the reference if it cannot be rebuilt from the run's initial model."""
        saved = bool(self.reference.updates) or self._has_adapter_of_its_own()
        if saved:
            self.reference.save(checkpoint / REFERENCE)
        record = {**self.reference.provenance(), "saved": saved}
        if self.sync is not None:
            record["synced"] = self.sync.updates
        if self.args.should_save:
            write_json(checkpoint / RECORD, record)
            write_json(checkpoint / PENALTY_STATE, self.penalty.state_dict())

    def _has_adapter_of_its_own(self) -> bool:
        """Return True if the reference holds an adapter that a resumed script may not recreate: small, and drawn at
        random."""
        reference = self.reference
        adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        own = reference.config.source == "policy" and any(map(reference.owns, reference.digests))
        return adapted and own and not reference.freed

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train as transformers does, and resume only from complete checkpoints.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `args.output_dir`, or a checkpoint's
                folder.
            trial: as in transformers.
            ignore_keys_for_eval: as in transformers.

        Raises:
            ValueError: there is no complete checkpoint, or the given one is not complete.
        """
        return super().train(self.checkpoint_to_resume(resume_from_checkpoint), trial, ignore_keys_for_eval)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers checks max_steps after a step: resumed from the last step, it would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, the same on every rank. The first rank chooses it; every rank must
        call.

        Raises:
            ValueError: there is no complete checkpoint, or the given one is not complete.
        """
        if wanted is None or wanted is False or (isinstance(wanted, str) and wanted == self._resumed):
            return None if wanted is False else wanted
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = _chosen(wanted, str(self.args.output_dir), self.resume_reference == "initial")
            except ValueError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(answer[1])
        self._resumed = answer[0]
        return self._resumed

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore, on resume, the controller and the reference that the checkpoint was trained against.

        Raises:
            ValueError: the checkpoint was trained against another reference, or its reference is missing.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.resume_reference == "initial":
            if self.sync is not None:  # its counters belong to updates that this reference has not had
                callbacks: Any = self.state.stateful_callbacks
                callbacks.pop(type(self.sync).__name__, None)
        else:
            self._load_reference(folder)
        self._load_controller(folder / PENALTY_STATE)

    def _load_reference(self, checkpoint: Path) -> None:
        if not (checkpoint / RECORD).is_file():
            raise ValueError(f"{checkpoint} has no {RECORD}, which says what its reference was. {_INITIAL}")
        record = state_of(checkpoint / RECORD)
        if record["saved"] and not (checkpoint / REFERENCE).is_dir():
            moved = f"had moved {record['updates']} times" if record["updates"] else "is not in the model"
            raise ValueError(
                f"The reference of {checkpoint} {moved}, and its weights ({REFERENCE}/) are gone. {_INITIAL}"
            )
        if record["saved"]:
            self.reference.load(checkpoint / REFERENCE)
        else:
            self._check_recorded(record)

    def _check_recorded(self, record: dict[str, Any]) -> None:
        self.reference.follow_policy()
        if record["fingerprint"] != (self.reference.recorded_fingerprint or self.reference.fingerprint()):
            raise ValueError(
                f"The checkpoint was trained against a reference with fingerprint {record['fingerprint'][:12]} "
                f"({record['strategy']}, from {record['source']}), and this run's has "
                f"{(self.reference.recorded_fingerprint or '')[:12]} ({self.reference.strategy}, from "
                f"{self.reference.source}). Give the trainer the model that the first run began with; its trained "
                "weights come from the checkpoint."
            )
        if record.get("kl_floor") is not None:
            self.reference.recall_floor(record["kl_floor"])  # a trained policy can no longer give it

    def _load_controller(self, path: Path) -> None:
        kind = self.penalty.config.controller
        if not path.is_file():
            if kind != "fixed":
                logger.warning(
                    f"{path} is missing: the {kind!r} KL controller begins at coefficient {self.penalty.coef}."
                )
            return
        coef = self.penalty.coef
        try:
            self.penalty.load_state_dict(state_of(path))
        except ValueError as error:
            raise ValueError(f"{error} The state is {path}.") from None
        if kind == "fixed":
            self.penalty.controller.coef = coef  # a setting, not a state: this run's value applies


def _chosen(wanted: str | bool, output_dir: str, initial: bool) -> str:
    """Return the checkpoint to resume from.

    Args:
        wanted: a checkpoint's folder, or True for the newest complete one of `output_dir`.
        output_dir: the run's folder.
        initial: True if the checkpoint's own reference is not needed.

    Raises:
        ValueError: there is no complete checkpoint, or the given one is not complete.
    """
    if isinstance(wanted, str):
        checkpoint, advice = Path(wanted), ""
        why_not = why_not_whole(checkpoint, without_reference=initial)
        foreign = checkpoint.is_dir() and not any((checkpoint / name).exists() for name in (MARK, BEGUN, RECORD))
        if why_not is None or (initial and foreign):
            return wanted
        if foreign:
            why_not, advice = f"was not written by refkl ({MARK}), so its reference is not known", _INITIAL
        elif not initial and why_not_whole(checkpoint, without_reference=True) is None:
            why_not, advice = f"{why_not}, which is of its reference", _INITIAL
        raise ValueError(f"{checkpoint} {why_not}. {advice or _others(checkpoint)}".rstrip())
    found = newest_whole(Path(output_dir), without_reference=initial)
    for skipped in found.skipped:
        logger.warning(f"{skipped}: it is not resumed from.")
    if found.path is None:
        seen = f": {'; '.join(found.skipped)}" if found.skipped else ", nor any other"
        raise ValueError(f"There is no whole checkpoint in {output_dir}{seen}. Train from the start.")
    return str(found.path)


def _others(checkpoint: Path) -> str:
    whole = newest_whole(checkpoint.parent, contents=False).path
    return "" if whole is None else f"{whole} is the newest that is whole."
