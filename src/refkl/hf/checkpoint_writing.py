"""Writing of a trainer's checkpoints by all ranks: begun, written, completed while training goes on, or given up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer
from transformers.utils import logging

from refkl.checkpoint import CheckpointError, Completion, begin, discard, disk_failure, newest_whole, rotate
from refkl.config import OnCheckpointError
from refkl.messages import size
from refkl.reference import Reference

logger = logging.get_logger(__name__)


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


@dataclass(frozen=True)
class _Unfinished:
    """A checkpoint that all ranks have written, and that the first rank completes."""

    path: Path
    best_before: str | None
    """The best checkpoint of the run before this one."""
    completion: Completion | None
    """On the first rank."""


class CheckpointWriting(Trainer):
    """A trainer whose checkpoints are marked as complete. Old ones are deleted after that."""

    reference: Reference
    on_checkpoint_error: OnCheckpointError = "stop"
    """The reaction to a checkpoint that cannot be written, as on a full disk."""
    _unfinished: _Unfinished | None = None

    def _save_reference(self, checkpoint: Path) -> None:
        """Write what refkl adds to a checkpoint."""
        raise NotImplementedError

    def _saves_together(self) -> str | None:
        """Return why the other ranks would wait for a rank that fails while transformers saves; None if they would
        not."""
        if self.accelerator.num_processes == 1:
            return None
        if self.is_deepspeed_enabled:
            return "with DeepSpeed"
        if self.is_fsdp_enabled:
            return "with FSDP"
        return "with metric_for_best_model" if self.args.metric_for_best_model is not None else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint. A thread of the first rank completes it while training goes on, and then deletes old
        ones. The next save and the end of training wait for that.

        Raises:
            ValueError: the reference changed without a recorded update.
            CheckpointError: it or the last one could not be written, as on a full disk, and `on_checkpoint_error` is
                "stop".
        """
        self._wait_for_completion()
        folder = Path(self._get_output_dir(trial))
        checkpoint, first = folder / f"checkpoint-{self.state.global_step}", self.args.should_save
        best, save = self.state.best_model_checkpoint, super()._save_checkpoint
        self.reference.verify()

        def transformers_part() -> None:
            with overridden(self.args, save_total_limit=None):  # transformers deletes before all ranks have written
                save(model, trial)

        steps: list[tuple[Callable[[], None], str | None]] = [
            ((lambda: begin(checkpoint)) if first else _nothing, None),
            (lambda: self._save_reference(checkpoint), None),
            (transformers_part, self._saves_together()),
        ]
        for step, alone in steps:
            if (failure := self._failure(step, checkpoint, alone)) is not None:
                self.state.best_model_checkpoint = best
                self._give_up(checkpoint, failure)
                return
        limit, keep = self.args.save_total_limit, (checkpoint, self.state.best_model_checkpoint)
        completion = Completion(checkpoint, lambda: rotate(folder, limit, keep)) if first else None
        self._unfinished = _Unfinished(checkpoint, best, completion)

    def _wait_for_completion(self) -> None:
        """Wait until the last checkpoint is complete. Every rank must call.

        Raises:
            CheckpointError: its mark could not be written, and `on_checkpoint_error` is "stop".
        """
        if (last := self._unfinished) is None:
            return
        self._unfinished = None
        step = _nothing if last.completion is None else last.completion.wait
        if (failure := self._failure(step, last.path, None)) is not None:
            if self.state.best_model_checkpoint == str(last.path):
                self.state.best_model_checkpoint = last.best_before
            self._give_up(last.path, failure)

    def _end_completion(self) -> None:
        """After an error of training, wait for this rank's thread only: other ranks may be gone."""
        if (last := self._unfinished) is not None and last.completion is not None:
            self._unfinished = None
            try:
                last.completion.wait()
            except (OSError, RuntimeError) as error:
                logger.warning(f"{last.path} is not complete: {error}")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._wait_for_completion()
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        with overridden(self.args, save_total_limit=None):  # transformers would delete checkpoints of others too
            result = super()._finalize_training(*args, **kwargs)
        if limit == 1 and best is not None and self.args.should_save:
            rotate(Path(best).parent, limit, (best,))
        return result

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
