"""Base class of all refkl trainers: their common arguments, their reference and their penalty."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.utils import logging

from refkl.backend import dropout_rates, watch_compile_locks
from refkl.checks import CHANGED, why_not_zero
from refkl.config import KLConfig, OnCheckpointError, ReferenceConfig, ResumedReference, ScoringConfig, SyncConfig
from refkl.freezing import trainable_parameters
from refkl.hf.callbacks import BatchCallback, HistogramCallback, PenaltyCallback, SyncMetrics
from refkl.hf.checkpoints import Checkpointing
from refkl.hf.kl_state import KLState
from refkl.penalty import KLPenalty
from refkl.reference import Reference, build_reference
from refkl.reference.pair import measure_pair
from refkl.sync import SyncReferenceCallback
from refkl.types import KLOutput, TokenBatch, TokenScores

logger = logging.get_logger(__name__)

watch_compile_locks()  # at import: DeepSpeed compiles its first op when a script makes its TrainingArguments


def check_given(kl: Any, sync: Any, scoring: Any) -> None:
    """Raise ValueError if an argument of a trainer is not a configuration of its kind."""
    for name, given, kind in (("kl", kl, KLConfig), ("sync", sync, SyncConfig), ("scoring", scoring, ScoringConfig)):
        if given is not None and not isinstance(given, kind):
            raise ValueError(f"{name}= takes a {kind.__name__}, and got a {type(given).__name__}.")


@dataclass
class Given:
    """Arguments of a trainer that its `__init__` settles together with those of the extended trainer."""

    kl: KLConfig | None
    sync: SyncConfig | None
    reference: str | ReferenceConfig | Reference

    @property
    def asks(self) -> bool:
        """True if an argument of refkl's was given that needs a reference."""
        return self.kl is not None or self.sync is not None or self.reference != "auto"


class KLTrainerMixin(Checkpointing):
    """Adds `.reference`, `.penalty`, `.sync` and KL metrics to a trainer. Base class of all refkl trainers."""

    _metrics: dict[str, defaultdict[str, list[float]]]
    kl_state: KLState
    """The KL of this run, which callbacks share."""
    placements: ClassVar[tuple[str, ...]] = ("loss",)
    """The placements of the penalty that this trainer supports."""
    kl_metric: ClassVar[str] = "kl"
    """The name under which the KL per token is logged."""
    scoring: ScoringConfig
    """Settings for prompts that several rows share."""
    _measures = True
    """False if no KL was asked for, so that the reference is never scored."""

    def __init__(
        self,
        *args: Any,
        reference: str | ReferenceConfig | Reference = "auto",
        kl: KLConfig | None = None,
        sync: SyncConfig | None = None,
        scoring: ScoringConfig | None = None,
        resume_reference: ResumedReference = "recorded",
        on_checkpoint_error: OnCheckpointError = "stop",
        **kwargs: Any,
    ) -> None:
        """Make the trainer, then its reference, from the policy as the trainer has made it.

        Args:
            *args: arguments of the trainer that this one extends.
            **kwargs: arguments of the trainer that this one extends.
            reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
            kl: the penalty. The default differs between trainers: see each.
            sync: when to update the reference. Default: never; in TRL's trainers, as `args.sync_ref_model` says.
            scoring: settings of prompt sharing. Default: compute a prompt that several rows share once, if that is
                exact and costs less.
            resume_reference: on resume, "recorded" uses the checkpoint's reference, "initial" the one of this trainer.
            on_checkpoint_error: "stop" or "continue" when a checkpoint cannot be written, for example on a full disk.

        Raises:
            ValueError: an argument or a setting that this trainer does not support, or two that contradict each other.
        """
        check_given(kl, sync, scoring)
        self._given = Given(kl, sync, reference)
        self._check_arguments()
        _check_rows(kwargs.get("train_dataset"))
        with self._as_it_is_made():
            super().__init__(*args, **kwargs)
        _check_rows(self.train_dataset, vars(self.args).get("max_length"))
        self._check_made()
        self._attach(self._penalty(), self._given.sync, scoring, resume_reference, on_checkpoint_error)

    def _check_arguments(self) -> None:
        """Raise ValueError for an argument that this trainer does not support, before the trainer is made."""

    def _as_it_is_made(self) -> AbstractContextManager[None]:
        """Return a context that is open while the `__init__` of the extended trainer runs."""
        return nullcontext()

    def _check_made(self) -> None:
        """Raise ValueError if the trainer, as it was made, is not supported."""

    def _penalty(self) -> KLConfig:
        """Return the penalty: the given one, or this trainer's default."""
        raise NotImplementedError

    @property
    def _temperature(self) -> float:
        """The divisor of the logits."""
        return 1.0

    @property
    def _exact(self) -> bool:
        """True if the KL is the exact divergence, not an estimate."""
        return self.penalty.settled.estimator == "exact"

    def _attach(
        self,
        kl: KLConfig,
        sync: SyncConfig | None,
        scoring: ScoringConfig | None,
        resume_reference: ResumedReference,
        on_checkpoint_error: OnCheckpointError,
    ) -> None:
        """Build the reference from the policy as the trainer has made it (including the adapter), not yet wrapped or
        trained."""
        self.scoring = scoring or ScoringConfig()
        self._check_kl(kl)
        self._check_settings()
        self._settle_checkpoints(resume_reference, on_checkpoint_error)
        reference = self._build(self._given.reference)
        if kl.settled().estimator == "exact" or kl.exact_every is not None:
            reference.check_exact()
        if not trainable_parameters(self.model):
            raise ValueError(
                "No parameter of the policy trains. Was its adapter loaded with is_trainable=False, or all frozen?"
            )
        self.add_callback(BatchCallback())
        self.reference = reference
        self.penalty = KLPenalty(kl, reference)
        state = self.kl_state = KLState(
            trainer=type(self).__name__,
            policy=lambda: self.model,
            reference=reference,
            penalty=self.penalty,
            accelerator=self.accelerator,
            metric=self.kl_metric,
            metrics=self._metrics,
            temperature=self._temperature,
        )
        if self._measures:
            self.add_callback(PenaltyCallback(state))
            self.add_callback(HistogramCallback(state, self.callback_handler))
        if sync is not None:
            if self.args.restore_callback_states_from_checkpoint:
                raise ValueError(
                    "restore_callback_states_from_checkpoint creates new callbacks, the sync's without its reference. "
                    "Leave it False: a resumed run restores the sync's counters without it."
                )
            self.sync = SyncReferenceCallback(
                reference,
                sync,
                kl=lambda: state.step_kl,
                batch=lambda: state.last_batch,
                temperature=state.temperature,
            )
            state.sync = self.sync
            self.sync.sync.check(self.model)
            self.sync.saves = False
            self.add_callback(self.sync)
            self.add_callback(SyncMetrics(state))

    def _build(self, reference: str | ReferenceConfig | Reference) -> Reference:
        """Return the reference that was asked for."""
        if isinstance(reference, Reference):
            return reference
        return build_reference(self.model, reference, accelerator=self.accelerator)

    def _check_kl(self, kl: KLConfig) -> None:
        """Raise ValueError if this trainer cannot apply the penalty as configured."""
        name = type(self).__name__
        if kl.placement not in self.placements:
            raise ValueError(
                f"{name} has no rewards to which kl.placement {kl.placement!r} could add the KL. Use placement 'loss'."
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
                    f"log-probabilities of a token need all of it. Set {size} 1; FSDP2 and ZeRO-3 shard only weights."
                )
        if self.args.use_liger_kernel:
            raise ValueError(
                f"use_liger_kernel replaces the policy's layers when training begins, after {name} has built the "
                "reference. The reference would then have other layers, and the KL would not start at 0. Leave it "
                "False, or load the policy with such kernels, so that the reference has them too."
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
        """Compute the penalty of a micro-batch. With `count`, it is part of the KL of the step or of the evaluation.

        `fingerprint` is the fingerprint of the reference's scores.
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
        self.kl_state.measured = True
        if self.model.training and not self.kl_state.checked and bool(mask.any()):
            self.kl_state.checked = True
            self._check_first(output.per_token.detach()[mask.bool()])
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
            pair = measure_pair(model, self.reference, batch, temperature=self.kl_state.temperature, exact=True)
            assert pair.divergence is not None
            self.penalty.add_exact(pair.divergence, batch.completion_mask)

    def _check_first(self, kl: Tensor) -> None:
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
                f"The KL of the first step is {float(kl.mean()):.3g} nats per token, but the policy has not trained "
                f"yet: {CHANGED}. To find the cause, run `refkl check` or refkl.check_reference."
            )


def _check_rows(data: Any, limit: int | None = None) -> None:
    """Raise ValueError if `data` has no row. Depending on its sampler, a trainer would fail in torch or train 0 steps.

    `limit` is the trainer's max_length, if `data` is what the trainer has kept.
    """
    if not isinstance(data, Sized) or len(data):
        return
    if limit is None:
        raise ValueError("train_dataset has no row to train on. Give it at least one.")
    raise ValueError(
        "train_dataset has no row left to train on: TRL drops a row that has no token to train on, such as one whose "
        f"prompt fills max_length, which is {limit}. Raise max_length above the prompts' lengths, or shorten them."
    )


def joined(ours: type[KLTrainerMixin], trainer: type) -> type:
    """Return a subclass of `ours` and a user's trainer, in this order. The overrides of both stay in force."""
    body: dict[str, Any] = {"__module__": trainer.__module__, "__doc__": trainer.__doc__}
    return type(f"KL{trainer.__name__}", (ours, trainer), body)


_PARALLEL = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}

_ROUNDING, _ROUNDING_16 = 1e-4, 0.05
"""Limits of the first KL in nats per token, in 32 and in 16 bits, if policy and reference are scored in batches of
different size. The limit for 16 bits is an estimate of rounding errors."""
