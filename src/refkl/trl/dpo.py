"""DPO with a refkl reference.

TRL computes DPO's loss from `model(..., labels=, fused_lm_head=True).log_probs`, for policy and reference alike. Both
are given here as views that answer this call with refkl's scorer, so that one function scores both; the rest of
TRL's loss is untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.dpo_trainer as trl_dpo
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from refkl.config import KLConfig, OnCheckpointError, ReferenceConfig, ResumedReference, SyncConfig
from refkl.penalty import global_normalizer
from refkl.reference import Reference
from refkl.scoring import Call, score_model
from refkl.trl.checkpoints import overridden
from refkl.trl.common import KLTrainerMixin, settled_sync, trainer_args
from refkl.types import TokenBatch, TokenScores

_TOKENS = ("input_ids", "attention_mask", "completion_mask")
"""What a micro-batch without images holds."""
_SCORED = "reference_logp"


class KLDPOTrainer(KLTrainerMixin, DPOTrainer):
    """trl.DPOTrainer with `reference=`, `kl=` and `sync=`; all else is TRL's, `beta` included.

    It logs `kl`, which DPO itself never shows: the KL estimate on the preference data's completions.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: a penalty added to DPO's loss; by default none, only measured.
        sync: when the reference moves (TR-DPO); by default never, or as `args.sync_ref_model` says.
        resume_reference: on resume, the reference that the checkpoint "recorded", or the "initial" one of this trainer.
        on_checkpoint_error: when a checkpoint cannot be written, as on a full disk, "stop" or "continue".

    Raises:
        ValueError: `ref_model` is given, or an option of TRL's that refkl cannot honour.
    """

    def __init__(
        self,
        *args: Any,
        reference: str | ReferenceConfig | Reference = "auto",
        kl: KLConfig | None = None,
        sync: SyncConfig | None = None,
        resume_reference: ResumedReference = "recorded",
        on_checkpoint_error: OnCheckpointError = "stop",
        **kwargs: Any,
    ) -> None:
        if trainer_args(DPOTrainer, args, kwargs, "ref_model") is not None:
            raise ValueError(
                "KLDPOTrainer holds the reference itself. Instead of ref_model=, pass reference=ReferenceConfig("
                "source='folder of that model'), or none for the policy as it stands."
            )
        config = trainer_args(DPOTrainer, args, kwargs, "args")
        if config is not None and config.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs is TRL's own cache of reference scores, which refkl does not use. Leave it "
                "False, and name a folder in reference.cache."
            )
        model = trainer_args(DPOTrainer, args, kwargs, "model")
        sync = settled_sync(config, sync)
        with overridden(config, sync_ref_model=False), _no_reference_of_trl(model):
            super().__init__(*args, **kwargs)
        self._attach(reference, kl or KLConfig(coef=0.0), sync, resume_reference, on_checkpoint_error)
        self._window: list[Tensor] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Keep the masks of the optimizer step's micro-batches: a token mean is over all of them."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._window = [_tokens(batch).completion_mask for batch in batches] if self.penalty.coef else []
        if self.reference.one_sweep and all(batch.keys() == set(_TOKENS) for batch in batches):
            self._score_together(batches)
        return batches, items

    def _score_together(self, batches: list[dict[str, Tensor]]) -> None:
        """The reference's scores of all micro-batches, from one sweep; each takes its own along."""
        width = max((batch["input_ids"].shape[1] for batch in batches), default=0)
        if not width:
            return
        ids, attention, scored = (
            torch.cat([F.pad(b[name], (0, width - b[name].shape[1])) for b in batches]) for name in _TOKENS
        )
        scores = self.reference.score(TokenBatch(ids, attention, scored).to(self.accelerator.device))
        for batch, logp in zip(batches, scores.logp.split([len(b["input_ids"]) for b in batches]), strict=True):
            batch[_SCORED] = logp[:, : batch["input_ids"].shape[1]]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        policy = _PolicyView(model, self.use_weighting)
        reference = _ReferenceView(self.reference, inputs.pop(_SCORED, None))
        self.ref_model = reference  # type: ignore[assignment]  # TRL's loss does nothing but call it
        try:
            with self.reference.paired(model, _tokens(inputs)):
                result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.ref_model = None
        assert policy.scores is not None and reference.scores is not None, "TRL scores both in its loss"
        if self.model.training:
            self._last_batch = policy.batch
        mask, normalizer = _tokens(inputs).completion_mask, self._normalizer()
        output = self._penalise(policy.scores.logp, reference.scores.logp, mask, 1.0, normalizer=normalizer)
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
        return count / self.current_gradient_accumulation_steps  # the Trainer divides the loss by these


class _PolicyView:
    """The policy, called as TRL calls it and scored by refkl."""

    def __init__(self, model: Any, weighting: bool) -> None:
        self.model = model
        self.weighting = weighting
        self.scores: TokenScores | None = None
        self.batch: TokenBatch | None = None

    def __call__(self, *, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return self.model(**inputs)
        router = {k: inputs.pop(k) for k in ("output_router_logits",) if k in inputs}
        statistics = _Statistics(self.weighting)
        self.batch = _batch(inputs, labels)
        scored = score_model(self.model, self.batch, entropy="detached", observe=statistics.observe, **router)
        self.scores = scored.scores
        assert self.scores.entropy is not None
        return FusedCausalLMOutput(
            log_probs=self.scores.logp[:, 1:],
            entropy=self.scores.entropy[:, 1:],
            aux_loss=scored.outputs.aux_loss if router else None,
            **statistics.result(scored.call),
        )


class _ReferenceView:
    """The reference, called as TRL calls its own."""

    def __init__(self, reference: Reference, logp: Tensor | None) -> None:
        self.reference = reference
        self.scores = None if logp is None else TokenScores(logp)

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> FusedCausalLMOutput:
        if self.scores is None:
            self.scores = self.reference.score(_batch(inputs, labels))
        return FusedCausalLMOutput(log_probs=self.scores.logp[:, 1:])


def _batch(inputs: dict[str, Any], labels: Tensor | None) -> TokenBatch:
    assert labels is not None, "TRL passes labels with fused_lm_head"
    own = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "use_cache")}
    return TokenBatch(inputs["input_ids"], inputs["attention_mask"], labels != -100, model_inputs=own)


def _tokens(inputs: dict[str, Any]) -> TokenBatch:
    return TokenBatch(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])


class _Statistics:
    """TRL's metrics of the policy's logits, each [B, T - 1]; and WPO's weights where asked for."""

    def __init__(self, weighting: bool) -> None:
        self.weighting = weighting
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def observe(self, logits: Tensor, rows: Tensor) -> None:
        """Take them from some rows of logits [n, V]."""
        values = {"mean_logits": logits.mean(-1, dtype=torch.float32), "top1": logits.argmax(-1)}
        if self.weighting:
            values["log_sum_sq_probs"] = torch.logsumexp(2 * torch.log_softmax(logits.float(), -1), -1)
        self.seen.append((rows, values))

    def result(self, call: Call) -> dict[str, Tensor]:
        """Put together, by TRL's names."""
        rows = torch.cat([rows for rows, _ in self.seen]) if self.seen else None
        found = {}
        for name in ("mean_logits", "top1", *(["log_sum_sq_probs"] if self.weighting else [])):
            flat = torch.zeros(call.targets.numel(), device=call.targets.device)
            if rows is not None:
                flat = flat.to(self.seen[0][1][name].dtype)
                flat[rows] = torch.cat([values[name] for _, values in self.seen])
            found[name] = flat.view(call.targets.shape)
        is_top1 = call.spread((found.pop("top1") == call.targets).float())[:, 1:].bool()
        return {name: call.spread(value)[:, 1:] for name, value in found.items()} | {"is_top1": is_top1}


@contextmanager
def _no_reference_of_trl(model: Any) -> Iterator[None]:
    """TRL's DPO __init__ without the reference that it makes there, for which it has no switch.

    For a full policy it loads the model's folder a second time: that call gives None. To a PeftModel it adds a copy of
    the adapter called "ref", and making one of PiSSA or OLoRA rewrites the base once more: no adapter is made, and the
    copying that follows finds the policy's own.
    """
    create = trl_dpo.create_model_from_path
    policy_to_load = isinstance(model, str)

    def policy_only(*args: Any, **kwargs: Any) -> Any:
        nonlocal policy_to_load
        if policy_to_load:
            policy_to_load = False
            return create(*args, **kwargs)
        return None

    shadowed = isinstance(model, PeftModel)
    trl_dpo.create_model_from_path = policy_only
    if shadowed:
        own = nn.Module.get_parameter
        vars(model)["add_adapter"] = lambda name, config: None
        vars(model)["get_parameter"] = lambda name: own(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        trl_dpo.create_model_from_path = create
        if shadowed:
            del vars(model)["add_adapter"], vars(model)["get_parameter"]
