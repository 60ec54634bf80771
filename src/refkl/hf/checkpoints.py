"""Checkpoints of the trainers: saving the reference and the penalty, completeness, and resuming."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from refkl.checkpoint import BEGUN, MARK, RECORD, REFERENCE, newest_whole, why_not_whole
from refkl.config import OnCheckpointError, ResumedReference
from refkl.files import read_json, write_json
from refkl.hf.checkpoint_writing import CheckpointWriting
from refkl.messages import unknown
from refkl.output_folder import writing_into
from refkl.penalty import KLPenalty
from refkl.reference.weights.record import read_description
from refkl.sync import SyncReferenceCallback

logger = logging.get_logger(__name__)

PENALTY_STATE = "kl_penalty.json"
"""File in a checkpoint: the state of the coefficient's controller."""
_INITIAL = (
    "To go on with the reference that this run starts with, ask for it: resume_reference='initial' (in refkl train, "
    "--resume.reference initial)."
)


class Checkpointing(CheckpointWriting):
    """A trainer whose checkpoints include its reference and its penalty. Incomplete checkpoints do not count."""

    penalty: KLPenalty
    sync: SyncReferenceCallback | None = None
    model: nn.Module  # Trainer's type allows None; here it is always a model
    _resumed: str | None = None
    """The checkpoint that was checked and found complete."""
    resume_reference: ResumedReference = "recorded"
    """On resume: "recorded" uses the reference that the checkpoint was trained against, "initial" the one this trainer
    built."""

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
            ValueError: there is no complete checkpoint, or the given one is not complete; another run saves
                checkpoints into `args.output_dir` now.
        """
        with self._output_locked():
            checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
            try:
                return super().train(checkpoint, trial, ignore_keys_for_eval)
            finally:
                self._end_completion()

    def _output_locked(self) -> AbstractContextManager[None]:
        if self.args.save_strategy == SaveStrategy.NO:
            return nullcontext()  # nothing is written there
        return writing_into(Path(str(self.args.output_dir)), self.accelerator)

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
        record = read_description(checkpoint / RECORD)
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
        if record["kl_floor"] is not None:
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
            self.penalty.load_state_dict(read_json(path))
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
    whole = newest_whole(checkpoint.parent).path
    return "" if whole is None else f"{whole} is the newest that is whole."
