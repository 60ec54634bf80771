"""Base class of all refkl trainers: merges its arguments with TRL's, builds the reference, steps the penalty and the
sync."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from refkl.backend import dropout_rates, watch_compile_locks
from refkl.checks import CHANGED, check_held, check_vocabulary, why_not_zero
from refkl.config import KLConfig, OnCheckpointError, ReferenceConfig, ResumedReference, ScoringConfig, SyncConfig
from refkl.freeze import trainable_parameters
from refkl.hf.checkpoints import Checkpointing
from refkl.hf.metrics import HistogramCallback, record
from refkl.kl import Histogram
from refkl.penalty import KLPenalty
from refkl.reference import Reference, build_reference
from refkl.reference.pair import measure_pair
from refkl.sync import SyncReferenceCallback
from refkl.types import KLOutput, TokenBatch, TokenScores

logger = logging.get_logger(__name__)

watch_compile_locks()  # at import: DeepSpeed compiles its first op when a script makes its TrainingArguments


def settled_sync(args: Any, sync: SyncConfig | None) -> SyncConfig | None:
    """Return the sync config: refkl's, or one made from TRL's own setting (`sync_ref_model`).

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


def check_given(kl: Any, sync: Any, scoring: Any) -> None:
    """Raise ValueError if an argument of a trainer is not a configuration of its kind."""
    for name, given, kind in (("kl", kl, KLConfig), ("sync", sync, SyncConfig), ("scoring", scoring, ScoringConfig)):
        if given is not None and not isinstance(given, kind):
            raise ValueError(f"{name}= takes a {kind.__name__}, and got a {type(given).__name__}.")


class KLTrainerMixin(Checkpointing):
    """Adds `.reference`, `.penalty`, `.sync` and KL metrics to a trainer."""

    _metrics: dict[str, defaultdict[str, list[float]]]
    _looked = False
    """True once the first KL of the training was checked."""
    _penalised = False
    """True once a KL was added or measured."""
    _step_kl: float | None = None
    """The KL of the last optimizer step, nats per token over all ranks."""
    _measured_at: float = 1.0
    """The temperature of the scores."""
    _last_batch: TokenBatch | None = None
    """Tokens that were scored in the last optimizer step."""
    placements: ClassVar[tuple[str, ...]] = ("loss",)
    """The placements of the penalty that this trainer supports."""
    kl_metric: ClassVar[str] = "kl"
    """The name under which the KL per token is logged."""
    scoring: ScoringConfig
    """Settings for prompts that several rows share."""
    kl_histogram: Histogram | None = None
    """The log-ratios of all tokens of the steps since the last log, over micro-batches and ranks."""

    @property
    def _exact(self) -> bool:
        """True if the KL is the exact divergence, not an estimate."""
        return self.penalty.settled.estimator == "exact"

    @contextmanager
    def _joining(
        self, trainer: type, settle: Callable[[dict[str, Any]], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Open `settle` around `trainer.__init__` while this trainer is made, with its arguments by name.

        It is done there and not in refkl's own __init__, because a user's class between the two may rename arguments or
        make some of them itself.
        """
        original = trainer.__init__  # type: ignore[misc]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def settled(instance: Any, *args: Any, **kwargs: Any) -> None:
            if instance is not self:
                original(instance, *args, **kwargs)
                return
            given = signature.bind(instance, *args, **kwargs)
            given.apply_defaults()
            with settle(given.arguments):
                original(instance, *args, **kwargs)

        trainer.__init__ = settled  # type: ignore[misc]
        try:
            yield
        finally:
            trainer.__init__ = original  # type: ignore[misc]

    def _attach(
        self,
        reference: str | ReferenceConfig | Reference,
        kl: KLConfig,
        sync: SyncConfig | None,
        scoring: ScoringConfig | None,
        resume_reference: ResumedReference,
        on_checkpoint_error: OnCheckpointError,
        temperature: float = 1.0,
    ) -> None:
        """Build the reference from the policy as TRL has made it (including the adapter), not yet wrapped or
        trained."""
        self.scoring = scoring or ScoringConfig()
        self._check_kl(kl)
        self._check_settings()
        self._settle_checkpoints(resume_reference, on_checkpoint_error)
        if not isinstance(reference, Reference):
            reference = build_reference(self.model, reference, accelerator=self.accelerator)
        if kl.settled().estimator == "exact" or kl.exact_every is not None:
            reference.check_exact()
        if not trainable_parameters(self.model):
            raise ValueError(
                "No parameter of the policy trains. Was its adapter loaded with is_trainable=False, or all frozen?"
            )
        self.reference = reference
        self.penalty = KLPenalty(kl, reference)
        self._measured_at = temperature
        self.add_callback(_PenaltySteps(self))
        self.add_callback(HistogramCallback(self))
        if sync is not None:
            if self.args.restore_callback_states_from_checkpoint:
                raise ValueError(
                    "restore_callback_states_from_checkpoint makes callbacks anew, the sync's without its reference. "
                    "Leave it False: a resumed run takes up the sync's counters without it."
                )
            self.sync = SyncReferenceCallback(
                reference, sync, kl=lambda: self._step_kl, batch=lambda: self._last_batch, temperature=temperature
            )
            self.sync.sync.check(self.model)
            self.sync.saves = False
            self.add_callback(self.sync)
            self.add_callback(_SyncMetrics(self))

    def _check_kl(self, kl: KLConfig) -> None:
        """Raise ValueError if this trainer cannot apply the penalty as configured."""
        name = type(self).__name__
        if kl.placement not in self.placements:
            raise ValueError(
                f"{name} has no rewards of tokens for kl.placement {kl.placement!r} to add to. Use placement 'loss'."
            )
        if kl.reference_weights is not None and len(kl.reference_weights) != 1:
            raise ValueError(
                f"{name} holds one reference, and kl.reference_weights {kl.reference_weights} are for "
                f"{len(kl.reference_weights)}. Leave them out; in a loop of your own, KLPenalty takes several."
            )

    def _check_settings(self) -> None:
        """Raise ValueError for a setting under which policy and reference would be scored differently, or not at
        all."""
        name = type(self).__name__
        parallel = self.accelerator.parallelism_config
        for size, meaning in _PARALLEL.items():
            if parallel is not None and getattr(parallel, size) > 1:
                raise ValueError(
                    f"{name} does not support {meaning} parallelism (parallelism_config.{size} is "
                    f"{getattr(parallel, size)}): a rank holds a part of each layer or sequence there, and the "
                    f"log-probabilities of a token need all of it. Set {size} 1; FSDP2 and ZeRO-3 shard weights alone."
                )
        if self.args.use_liger_kernel:
            raise ValueError(
                f"use_liger_kernel replaces the policy's layers when training begins, after {name} has built the "
                "reference, which would then compute with others: the KL would not start at 0. Leave it False, or load "
                "the policy with such kernels, so that the reference has them too."
            )

    def _penalise(
        self,
        logp: Tensor,
        ref_logp: Tensor,
        mask: Tensor,
        temperature: float,
        *,
        old_logp: Tensor | None = None,
        divergence: Tensor | None = None,
        normalizer: Tensor | None = None,
        count: bool = True,
        fingerprint: str | None = None,
    ) -> KLOutput:
        """Compute the penalty of a micro-batch. With `count` it is part of the step's KL, or of the evaluation's.

        `fingerprint` is what the reference's scores carry.
        """
        output = self.penalty(
            TokenScores(logp, temperature=temperature),
            TokenScores(ref_logp, temperature=temperature, fingerprint=fingerprint),
            mask,
            old_logp=old_logp,
            divergence=divergence,
            normalizer=normalizer,
            count=count and self.model.training,
        )
        if not count:
            return output
        self._penalised = True
        if self.model.training and not self._looked and bool(mask.any()):
            self._looked = True
            self._look_at_first(output.per_token.detach()[mask.bool()])
        if not self.model.training:
            counted = mask.bool().sum().float()
            sums = torch.stack([output.per_token.detach().sum().float(), counted])
            total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._metrics["eval"][self.kl_metric].append(total / max(tokens, 1.0))
        return output

    def _measure_exact(self, model: Any, batch: TokenBatch) -> None:
        """Measure the exact KL of the first micro-batch of a step, before its loss, if kl.exact_every asks for it.

        Callbacks would be too late under ZeRO-3: the optimizer's step is over by then.
        """
        if self.model.training and self.penalty.exact_due:
            pair = measure_pair(model, self.reference, batch, temperature=self._measured_at, exact=True)
            assert pair.divergence is not None
            self.penalty.add_exact(pair.divergence, batch.completion_mask)

    def _look_at_first(self, kl: Tensor) -> None:
        """Warn if the KL is not 0 although the policy has not trained yet, and nothing explains it."""
        inner = self.accelerator.unwrap_model(self.model)
        noise = self.args.neftune_noise_alpha or any(dropout_rates(module) for module in inner.modules())
        trained = self.state.global_step or self.reference.updates
        if trained or noise or why_not_zero(inner, self.reference) is not None:
            return
        exact = all(p.dtype in (torch.float32, torch.float64) for p in inner.parameters() if p.is_floating_point())
        mixed = self.accelerator.mixed_precision != "no"
        if float(kl.abs().mean()) > (_ROUNDING if exact and not mixed else _ROUNDING_16):
            logger.warning(
                f"The KL of the first step is {float(kl.mean()):.3g} nats per token, and the policy has not trained "
                f"yet: {CHANGED}. `refkl check` and refkl.check_reference look closer."
            )


_PARALLEL = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}

_ROUNDING, _ROUNDING_16 = 1e-4, 0.05
"""Limits of the first KL in nats per token, in 32 and in 16 bits, if policy and reference are scored in batches of
different size. In 16 bits it is an estimate of rounding errors."""


_LOOK_EVERY, _LOOK_AT = 50, 4
"""Every _LOOK_EVERY optimizer steps, _LOOK_AT of the reference's weights are compared with its fingerprint."""


class _SyncMetrics(TrainerCallback):
    """Logs the sync's metrics of each step. It must be added after the sync."""

    def __init__(self, trainer: KLTrainerMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.trainer.sync is not None
        for name, value in self.trainer.sync.metrics.items():
            logged = self.trainer._metrics["train"][name]
            if name == "sync/updates":
                logged.clear()  # a count: TRL logs means over the steps
            logged.append(value)


class _PenaltySteps(TrainerCallback):
    """Steps the penalty after each optimizer step.

    It also lets the reference follow the prepared policy, and verifies that only the sync changes the reference.
    """

    def __init__(self, trainer: KLTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check before the first step, when the optimizer exists, which tensors policy, reference and optimizer share.

        Raises:
            ValueError: the policy trains, or the optimizer holds, weights of the reference.
        """
        reference = self.trainer.reference
        if reference.freed:
            return
        reference.follow_policy()
        tokenizer = kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds a tokenizer
        vocabulary = None if tokenizer is None else len(tokenizer)
        model, optimizer = self.trainer.model, kwargs.get("optimizer")
        for finding in check_held(model, reference, optimizer=optimizer):
            if finding.verdict == "fault":
                raise ValueError(f"{finding.check}: {finding.found}; {finding.advice}.")
        if vocabulary is not None and (finding := check_vocabulary(model, reference, vocabulary)).verdict == "fault":
            # Some tokenizers have a token that occurs in no text.
            logger.warning(f"{finding.found}: if such a token comes up, {finding.advice}.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.trainer._penalised:
            raise ValueError(
                f"A step of {type(self.trainer).__name__} is over and no KL was measured: its compute_loss does not "
                "call _compute_loss, where TRL has its loss and refkl adds to it. Override _compute_loss instead, or "
                "call it."
            )
        metrics = self.trainer.penalty.step(self.trainer.accelerator)
        self.trainer._step_kl = metrics.get("kl", 0.0)  # missing if every completion was cut off
        record(self.trainer, metrics)
        if state.global_step % _LOOK_EVERY == 0:
            self.trainer.reference.verify(_LOOK_AT)
