"""Base class of the DPO and KTO trainers: policy and reference are scored together, on given data.

TRL computes their losses from `model(..., labels=, fused_lm_head=True).log_probs`, for policy and reference alike. Both
are replaced by views that answer this call with refkl's scorer; the rest of TRL's loss is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from trl import BEMACallback

from refkl.config import KLConfig, OnCheckpointError, ReferenceConfig, ResumedReference, ScoringConfig, SyncConfig
from refkl.hf.checkpoints import overridden
from refkl.hf.trainer_mixin import KLTrainerMixin, check_given, settled_sync
from refkl.penalty import global_normalizer
from refkl.reference import Reference
from refkl.trl.scored_model import PolicyView, ReferenceView, same_tokens
from refkl.types import TokenBatch, TokenScores

_TOKENS = ("input_ids", "attention_mask", "completion_mask")
_PARTS = ("KL_", "")
"""Prefixes of the names in _TOKENS: KTO scores a batch of mismatched pairs ("KL_") before its own."""
_SCORED = "reference_scores"


class PreferenceKL(KLTrainerMixin):
    """The KL of KLDPOTrainer and KLKTOTrainer."""

    trl_trainer: ClassVar[Any]
    """The TRL trainer that is extended."""
    trl_module: ClassVar[ModuleType]
    """The module of that trainer."""
    ref_model: Any  # of both trainers

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
        check_given(kl, sync, scoring)
        self._sync = sync
        with self._joining(self.trl_trainer, self._settled):
            super().__init__(*args, **kwargs)
        sync = self._sync
        self._attach(reference, kl or KLConfig(coef=0.0), sync, scoring, resume_reference, on_checkpoint_error)
        self._window: list[Tensor] = []

    @contextmanager
    def _settled(self, given: dict[str, Any]) -> Iterator[None]:
        """Switch TRL's own reference and sync off while TRL reads its arguments.

        Raises:
            ValueError: an argument that refkl does not support.
        """
        if given["ref_model"] is not None:
            raise ValueError(
                f"{type(self).__name__} holds the reference itself. Instead of ref_model=, pass "
                "reference=ReferenceConfig(source='folder of that model'), or none for the policy as it stands."
            )
        config = given["args"]
        if config is not None and config.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs is TRL's own cache of reference scores, which refkl does not use. Leave it "
                "False, and name a folder in reference.cache."
            )
        self._sync = settled_sync(config, self._sync)
        with overridden(config, sync_ref_model=False), _no_reference_of_trl(self.trl_module, given["model"]):
            yield

    def _check_settings(self) -> None:
        super()._check_settings()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, BEMACallback) and vars(callback).get("update_ref_model"):
                raise ValueError(
                    "BEMACallback(update_ref_model=True) moves a reference of TRL's, and without one the policy. Use "
                    "sync=SyncConfig(average='bema', every=...)."
                )

    def _statistics(self) -> tuple[str, ...]:
        """Return TRL's statistics of the logits that its loss reads."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Keep the masks of the optimizer step's micro-batches: a token mean is over all of them."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._window = [_tokens(batch).completion_mask for batch in batches] if self.penalty.coef else []
        if self.reference.one_sweep and batches and all(_is_text(batch) for batch in batches):
            self._score_together(batches)
        return batches, items

    def _score_together(self, batches: list[dict[str, Any]]) -> None:
        """Score all micro-batches with the reference in one sweep, and store each one's scores in it."""
        parts = [(batch, prefix) for batch in batches for prefix in _PARTS if f"{prefix}input_ids" in batch]
        widths = [batch[f"{prefix}input_ids"].shape[1] for batch, prefix in parts]
        ids, attention, scored = (
            torch.cat(
                [F.pad(b[f"{p}{name}"], (0, max(widths) - width)) for (b, p), width in zip(parts, widths, strict=True)]
            )
            for name in _TOKENS
        )
        batch = TokenBatch(ids, attention, scored, prefix=self.scoring.prefix).to(self.accelerator.device)
        scores = self.reference.score(batch, hidden=self._exact)
        rows = [len(batch[f"{prefix}input_ids"]) for batch, prefix in parts]
        hidden = scores.hidden.split(rows) if scores.hidden is not None else [None] * len(rows)
        for (micro, p), logp, states, width in zip(parts, scores.logp.split(rows), hidden, widths, strict=True):
            hidden_states = None if states is None else states[:, :width]
            own = TokenScores(logp[:, :width], hidden=hidden_states, fingerprint=scores.fingerprint)
            micro.setdefault(_SCORED, []).append((micro[f"{p}input_ids"], micro[f"{p}attention_mask"], own))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        at_hand = inputs.pop(_SCORED, ())

        def ready(batch: TokenBatch) -> TokenScores | None:
            return next((scores for ids, mask, scores in at_hand if same_tokens(batch, ids, mask)), None)

        policy = PolicyView(
            model,
            statistics=self._statistics(),
            reference=self.reference,
            exact=self._exact,
            ready=ready,
            before=self._measure_exact,
            prefix=self.scoring.prefix,
        )

        def answer(batch: TokenBatch) -> TokenScores:
            at = policy.call_of(batch.input_ids, batch.attention_mask)
            return self.reference.score(batch) if at is None else policy.references[at]

        # TRL calls it on the batches on which it calls the policy.
        self.ref_model = ReferenceView(answer, self.scoring.prefix)
        try:
            result = super()._compute_loss(policy, inputs, return_outputs)  # type: ignore[misc]
        finally:
            self.ref_model = None
        tokens = _tokens(inputs)
        if (at := policy.call_of(tokens.input_ids, tokens.attention_mask)) is None:
            raise ValueError(
                f"The loss of {type(self).__name__} did not score the policy on its batch as TRL does (labels= and "
                "fused_lm_head=True), so there is no KL to add or to log."
            )
        if self.model.training:
            self._last_batch = policy.batches[at]
        output = self._penalise(
            policy.scores[at].logp,
            policy.references[at].logp,
            tokens.completion_mask,
            1.0,
            divergence=policy.divergences[at],
            normalizer=self._normalizer(),
            fingerprint=policy.references[at].fingerprint,
        )
        if not self.penalty.coef:
            return result
        if return_outputs:
            return result[0] + output.loss, result[1]
        return result + output.loss

    def _normalizer(self) -> Tensor | None:
        if not self.model.training or not self.penalty.coef:
            return None
        masks = [mask.to(self.accelerator.device) for mask in self._window]
        count = global_normalizer(masks, self.penalty.config.aggregation, self.accelerator)
        return count / self.current_gradient_accumulation_steps  # the Trainer divides the loss by this number


def _tokens(inputs: dict[str, Any]) -> TokenBatch:
    return TokenBatch(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])


def _is_text(batch: dict[str, Any]) -> bool:
    """Return True if a micro-batch has only tokens as inputs."""
    return batch.keys() <= {f"{prefix}{name}" for prefix in _PARTS for name in _TOKENS} | {"label"}


@contextmanager
def _no_reference_of_trl(module: ModuleType, model: Any) -> Iterator[None]:
    """Run TRL's __init__ without the reference that it makes there; TRL has no option for that.

    For a full policy TRL loads the model's folder a second time: that call returns None here. To a PeftModel it adds a
    copy of the adapter called "ref", which for PiSSA or OLoRA rewrites the base once more. Here no adapter is made, and
    TRL's copying finds the policy's own.
    """
    create = module.create_model_from_path
    policy_to_load = isinstance(model, str)

    def policy_only(*args: Any, **kwargs: Any) -> Any:
        nonlocal policy_to_load
        if policy_to_load:
            policy_to_load = False
            return create(*args, **kwargs)
        return None

    shadowed = isinstance(model, PeftModel)
    vars(module)["create_model_from_path"] = policy_only
    if shadowed:
        own = nn.Module.get_parameter
        vars(model)["add_adapter"] = lambda name, config: None
        vars(model)["get_parameter"] = lambda name: own(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        vars(module)["create_model_from_path"] = create
        if shadowed:
            del vars(model)["add_adapter"], vars(model)["get_parameter"]
