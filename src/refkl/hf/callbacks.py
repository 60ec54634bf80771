"""Callbacks of a trainer with a reference: they step the penalty, verify the reference, and log."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length
from transformers.utils import logging

from refkl.checks import check_held, check_vocabulary
from refkl.hf.kl_state import KLState
from refkl.hf.trackers import send

logger = logging.get_logger(__name__)

VERIFY_EVERY, VERIFIED_WEIGHTS = 50, 4
"""Every VERIFY_EVERY optimizer steps, VERIFIED_WEIGHTS of the reference's weights are compared with its fingerprint."""


class BatchCallback(TrainerCallback):
    """Refuses a training that would end after 0 steps, which transformers only logs."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ValueError if the training data does not fill one batch."""
        loader: Any = kwargs.get("train_dataloader")
        if not has_length(loader) or len(loader):
            return
        data: Any = getattr(loader, "dataset", None)
        rows = f"{len(data)} rows" if has_length(data) else "data"
        generations = vars(args).get("num_generations")
        if generations is not None:
            needed = vars(args)["generation_batch_size"] // generations
            raise ValueError(
                f"The {rows} of train_dataset do not fill one batch of {needed} prompts (generation_batch_size "
                f"{vars(args)['generation_batch_size']} / num_generations {generations}), so that no step would be "
                f"trained. Give at least {needed} rows, or lower per_device_train_batch_size, "
                "gradient_accumulation_steps or steps_per_generation."
            )
        raise ValueError(
            f"The {rows} of train_dataset do not fill one batch, so that no step would be trained: "
            f"per_device_train_batch_size is {args.per_device_train_batch_size} and dataloader_drop_last "
            f"{args.dataloader_drop_last}. Give more rows, or lower one of them."
        )


class PenaltyCallback(TrainerCallback):
    """Steps the penalty after each optimizer step.

    It also lets the reference follow the prepared policy, and verifies that only the sync changes the reference.
    """

    def __init__(self, kl: KLState) -> None:
        self.kl = kl

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check before the first step, when the optimizer exists, which tensors policy, reference and optimizer share.

        Raises:
            ValueError: the policy trains weights of the reference, or the optimizer holds them.
        """
        reference = self.kl.reference
        if reference.freed:
            return
        reference.follow_policy()
        model = self.kl.policy()
        tokenizer = kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds a tokenizer
        vocabulary = None if tokenizer is None else len(tokenizer)
        for finding in check_held(model, reference, optimizer=kwargs.get("optimizer")):
            if finding.verdict == "fault":
                raise ValueError(f"{finding.check}: {finding.found}; {finding.advice}.")
        if vocabulary is not None and (finding := check_vocabulary(model, reference, vocabulary)).verdict == "fault":
            # A warning only, because some tokenizers have tokens that occur in no text.
            logger.warning(f"{finding.found}: if such a token comes up, {finding.advice}.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.kl.measured:
            raise ValueError(
                f"{self.kl.trainer} finished a step and no KL was measured: its compute_loss does not call "
                "_compute_loss, where TRL computes its loss and refkl adds the penalty. Override _compute_loss "
                "instead, or call it."
            )
        self.kl.step()
        if state.global_step % VERIFY_EVERY == 0:
            self.kl.reference.verify(VERIFIED_WEIGHTS)


class SyncMetrics(TrainerCallback):
    """Logs the sync's metrics of each step. It must be added after the sync."""

    def __init__(self, kl: KLState) -> None:
        self.kl = kl

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.kl.sync is not None
        for name, value in self.kl.sync.metrics.items():
            logged = self.kl.metrics["train"][name]
            if name == "sync/updates":
                logged.clear()  # a count: the log shows means over the steps
            logged.append(value)


class HistogramCallback(TrainerCallback):
    """Sends the log-ratios' histogram to TensorBoard, Weights & Biases and Trackio, if `report_to` names them."""

    def __init__(self, kl: KLState, handler: CallbackHandler) -> None:
        self.kl, self.handler = kl, handler

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.kl.histogram is not None and state.is_world_process_zero and "loss" in (logs or {}):
            send(self.kl.histogram, self.handler.callbacks, state.global_step)
