"""Base class of the DPO and KTO trainers: policy and reference are scored together, on given data.

TRL computes their losses from `model(..., labels=, fused_lm_head=True).log_probs`, for policy and reference alike. A
ScoredModel stands in for each of the two; the rest of TRL's loss is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from trl import BEMACallback

from refkl.config import KLConfig, ReferenceConfig
from refkl.hf.checkpoint_writing import overridden
from refkl.penalty import global_normalizer
from refkl.reference import Reference, build_reference
from refkl.trl.base import TRLTrainer, settled_sync
from refkl.trl.compat import no_reference_of_trl
from refkl.trl.precompute import Part, Precompute, batches_of, with_cache
from refkl.trl.reference_model import ReferenceModel
from refkl.trl.scored_model import PolicyScorer, ScoredModel, same_tokens
from refkl.types import TokenBatch, TokenScores

_TOKENS = ("input_ids", "attention_mask", "completion_mask")
_PARTS = ("KL_", "")
"""Prefixes of the names in _TOKENS: KTO scores a batch of mismatched pairs ("KL_") before its own."""
_SCORED = "reference_scores"


class PreferenceKL(TRLTrainer):
    """The KL of KLDPOTrainer and KLKTOTrainer."""

    # Attributes of both trainers:
    ref_model: Any
    precompute_ref_logps: bool
    _window: Sequence[Tensor] = ()
    """The masks of the optimizer step's micro-batches."""
    _given_model: nn.Module | None = None
    """The model that was passed as ref_model."""
    _to_score: tuple[Part, ...] = ()
    """With precompute_ref_log_probs, the data sets to score before training."""

    def _penalty(self) -> KLConfig:
        return self._given.kl or KLConfig(coef=0.0)

    @contextmanager
    def _settled(self, given: dict[str, Any]) -> Iterator[None]:
        """Switch TRL's own reference and sync off while TRL reads its arguments.

        Raises:
            ValueError: an argument that refkl does not support.
        """
        config = given["args"]
        self._take_ref_model(given)
        self._given.sync = settled_sync(config, self._given.sync)
        if config is not None and config.precompute_ref_log_probs and self._given.sync is not None:
            raise ValueError(
                "You cannot use `sync_ref_model=True` or sync= together with `precompute_ref_log_probs=True`, which "
                "assumes a fixed reference model: once the reference moves, its precomputed log-probs are those of "
                "another model. Set `precompute_ref_log_probs=False`, or leave the sync out."
            )
        with overridden(config, sync_ref_model=False), no_reference_of_trl(self.trl_trainer, given["model"]):
            yield

    def _take_ref_model(self, given: dict[str, Any]) -> None:
        """Take `ref_model` away from TRL, and note what the reference is by it.

        Raises:
            ValueError: it is the policy; `reference=` asks for other weights; it is neither a model nor a folder.
        """
        ref_model, asked = given["ref_model"], self._given.reference
        if ref_model is None:
            return
        if ref_model is given["model"]:
            raise ValueError(
                "`model` and `ref_model` cannot be the same object. In most cases you should omit `ref_model`: the "
                "reference is then `model` as it stands."
            )
        if not isinstance(ref_model, nn.Module | str | Path):
            raise ValueError(
                f"ref_model= takes a model or the folder of one, and got a {type(ref_model).__name__}. Leave it out "
                "for the policy as it stands."
            )
        if isinstance(asked, Reference) or (isinstance(asked, ReferenceConfig) and asked.source != "policy"):
            raise ValueError(
                "The reference is asked for twice, by ref_model= and by reference=. Leave one of them out."
            )
        given["ref_model"] = None
        if isinstance(ref_model, nn.Module):
            self._given_model = ref_model
        else:
            config = ReferenceConfig(strategy=asked) if isinstance(asked, str) else asked
            self._given.reference = replace(config, source=str(ref_model))

    def _build(self, reference: str | ReferenceConfig | Reference) -> Reference:
        if self.precompute_ref_logps:
            reference = with_cache(reference, str(self.args.output_dir))
        if self._given_model is None or isinstance(reference, Reference):
            return super()._build(reference)
        return build_reference(self.model, reference, self.accelerator, model=self._given_model)

    def _attach(self, *args: Any, **kwargs: Any) -> None:
        super()._attach(*args, **kwargs)
        shown = ReferenceModel(self.reference, prefix=self.scoring.prefix)
        self.ref_model = shown
        if not self.precompute_ref_logps:
            return
        # As in TRL: a given model stays, and so does a reference that a PEFT policy holds.
        held_elsewhere = self._given_model is not None or isinstance(self._given.reference, Reference)
        frees = not held_elsewhere and not isinstance(self.model, PeftModel)
        if frees:
            self.ref_model = None  # TRL's evaluate() then refuses new data once training has begun
        self.add_callback(Precompute(self.reference, self._to_score, self._token_batches, free=frees))

    def _token_batches(self, part: Part) -> Iterator[TokenBatch]:
        """Yield what the losses on a data set score: its own tokens, and those of KTO's mismatched pairs."""
        for batch in batches_of(part, self.data_collator, self.args, self.accelerator):
            for prefix in _PARTS:
                if f"{prefix}input_ids" in batch:
                    ids, attention, scored = (batch[f"{prefix}{name}"] for name in _TOKENS)
                    tokens = TokenBatch(ids, attention, scored, prefix=self.scoring.prefix)
                    yield tokens.to(self.accelerator.device)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Note a data set that TRL would score here. The losses then find its scores in the reference's cache."""
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]  # refused there
        self._to_score += (Part(dataset, name, batch_size),)
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the reference's log-probabilities of a padded batch, as TRL does. `model` is not used."""
        shown = ReferenceModel(self.reference, prefix=self.scoring.prefix)
        with self._as_ref_model(shown):
            return super().compute_ref_log_probs(shown, inputs)  # type: ignore[misc]

    @contextmanager
    def _as_ref_model(self, model: Any) -> Iterator[None]:
        """Let TRL call `model` as its reference on each batch while this is open."""
        before = self.ref_model, self.precompute_ref_logps
        self.ref_model, self.precompute_ref_logps = model, False
        try:
            yield
        finally:
            self.ref_model, self.precompute_ref_logps = before

    def _check_kl(self, kl: KLConfig) -> None:
        super()._check_kl(kl)
        if self.precompute_ref_logps and (kl.settled().estimator == "exact" or kl.exact_every is not None):
            raise ValueError(
                "precompute_ref_log_probs keeps log-probabilities only, and an exact KL (kl.estimator 'exact' or "
                "kl.exact_every) needs the reference itself. Set precompute_ref_log_probs False, or use an estimator."
            )

    def _check_settings(self) -> None:
        super()._check_settings()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, BEMACallback) and vars(callback).get("update_ref_model"):
                raise ValueError(
                    "BEMACallback(update_ref_model=True) updates TRL's reference, or the policy if there is none. Use "
                    "sync=SyncConfig(average='bema', every=...)."
                )

    def _statistics(self) -> tuple[str, ...]:
        """Return TRL's statistics of the logits that its loss reads."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Keep the masks of the optimizer step's micro-batches, because a token mean is over all of them."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._window = [_tokens(batch).completion_mask for batch in batches] if self.penalty.coef else []
        if self.reference.one_sweep and batches and all(_is_text(batch) for batch in batches):
            self._score_together(batches)
        return batches, items

    def _score_together(self, batches: list[dict[str, Any]]) -> None:
        """Score all micro-batches with the reference in one sweep, and store the scores in them."""
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

        calls = PolicyScorer(
            model,
            reference=self.reference,
            exact=self._exact,
            ready=ready,
            before=self._measure_exact,
        )
        prefix = self.scoring.prefix
        policy = ScoredModel(calls, model=model, statistics=self._statistics(), prefix=prefix)

        def scored(batch: TokenBatch) -> TokenScores:
            at = calls.call_of(batch.input_ids, batch.attention_mask)
            return self.reference.score(batch) if at is None else calls.references[at]

        # TRL calls the reference on the same batches as the policy.
        with self._as_ref_model(ScoredModel(scored, prefix=prefix)):
            result = super()._compute_loss(policy, inputs, return_outputs)  # type: ignore[misc]
        tokens = _tokens(inputs)
        if (at := calls.call_of(tokens.input_ids, tokens.attention_mask)) is None:
            raise ValueError(
                f"The loss of {type(self).__name__} did not score the policy on its batch as TRL does (labels= and "
                "fused_lm_head=True), so there is no KL to add or to log."
            )
        if self.model.training:
            self.kl_state.last_batch = calls.batches[at]
        output = self._penalise(
            calls.scores[at].logp,
            calls.references[at].logp,
            tokens.completion_mask,
            1.0,
            divergence=calls.divergences[at],
            normalizer=self._normalizer(),
            fingerprint=calls.references[at].fingerprint,
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
