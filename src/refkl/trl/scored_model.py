"""A model as TRL's trainers call it, scored by refkl.

TRL patches its models to answer `model(..., labels=, fused_lm_head=True)` with log-probabilities. A ScoredModel answers
the same call, for policy and reference, so that one function scores both, with positions counted from the attention
mask. TRL's split into micro-batches, its images and its arithmetic stay TRL's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refkl.config import Prefix
from refkl.hf.observed_loss import labelled
from refkl.kl.divergence_rows import Divergence
from refkl.reference import Reference
from refkl.reference.pair import compare, scored_together
from refkl.scoring import Call, Entropies, Scored, score_model
from refkl.trl.compat import answer
from refkl.types import TokenBatch, TokenScores


class ScoredModel:
    """A model, called as TRL calls it."""

    def __init__(
        self,
        score: Callable[..., Scored | TokenScores],
        *,
        model: Any = None,
        plain: Callable[..., Any] | None = None,
        statistics: tuple[str, ...] = (),
        prefix: Prefix = "auto",
    ) -> None:
        """Stand in for a model.

        Args:
            score: called with the batch, and with `observe` and `output_router_logits` as keywords if TRL asks for
                their results. It then returns a Scored; otherwise it may return TokenScores.
            model: the model that this one stands in for; other attributes are read from it. None for a reference.
            plain: called for anything but log-probabilities. Default: `model`; a reference raises ValueError.
            statistics: TRL's per-token statistics of the logits to return: "mean_logits", "is_top1",
                "log_sum_sq_probs".
            prefix: prefix sharing of the batches, as in TokenBatch.
        """
        self.score, self.model, self.plain = score, model, plain or model
        self.statistics, self.prefix = statistics, prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)  # other attributes come from the model itself

    def __call__(self, *args: Any, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            if self.plain is None:
                raise ValueError(
                    "The reference was called without fused_lm_head=True and labels=, but a refkl reference returns "
                    "only the log-probabilities of tokens. Pass both."
                )
            return self.plain(*args, **({} if labels is None else {"labels": labels}), **inputs)
        assert labels is not None, "TRL passes labels with fused_lm_head"
        router = {name: inputs.pop(name) for name in ("output_router_logits",) if name in inputs}
        seen = Statistics(self.statistics)
        options = router | ({"observe": seen.observe} if self.statistics else {})
        found = self.score(token_batch(inputs, labels, self.prefix), **options)
        scores = found if isinstance(found, TokenScores) else found.scores
        given = {} if isinstance(found, TokenScores) else seen.result(found.call)
        if router and isinstance(found, Scored):
            given["aux_loss"] = found.outputs.aux_loss
        # `score` may score tokens without a label too.
        mask = labelled(labels)[:, 1:]
        entropy = None if scores.entropy is None else scores.entropy[:, 1:].masked_fill(~mask, 0.0)
        if "is_top1" in given:
            given["is_top1"] = given["is_top1"] & mask
        logp = scores.logp[:, 1:].masked_fill(~mask, 0.0)
        return answer(log_probs=logp, entropy=entropy, label_mask=mask, **given)


class PolicyScorer:
    """Scores the policy, and its reference with it. The results of the calls are kept for the KL."""

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        entropy: Entropies = "detached",
        reference: Reference | None = None,
        exact: bool = False,
        ready: Callable[[TokenBatch], TokenScores | None] | None = None,
        before: Callable[[Any, TokenBatch], None] | None = None,
    ) -> None:
        """Score `model` through its wrappers.

        Args:
            model: called once for each call of this object.
            temperature: divides the logits.
            entropy: as in `score_model`.
            reference: scored with the policy in each call, so that the two can share work.
            exact: if True, also compute the exact divergence from the reference.
            ready: returns the reference's scores of a batch if they are already computed; for an exact divergence with
                `hidden`.
            before: called with the model and the batch before each score with grad.
        """
        self.model = model
        self.options: dict[str, Any] = {"temperature": temperature, "entropy": entropy}
        self.reference = reference
        self.exact = exact
        self.ready = ready
        self.before = before
        self.batches: list[TokenBatch] = []
        """The scored batches, one per call."""
        self.scores: list[TokenScores] = []
        self.references: list[TokenScores] = []
        self.divergences: list[Tensor | None] = []
        """[B, T] nats for each call, with grad, if `exact`; None for TRL's calls without grad during training."""

    def __call__(self, batch: TokenBatch, **options: Any) -> Scored:
        if self.before is not None and torch.is_grad_enabled():
            self.before(self.model, batch)
        options = self.options | options
        scored = self._alone(batch, options) if self.reference is None else self._both(self.reference, batch, options)
        self.batches.append(batch)
        self.scores.append(scored.scores)
        return scored

    def call_of(self, input_ids: Tensor, attention_mask: Tensor) -> int | None:
        """Return the index of the last call on these tokens; None if there was none."""
        calls = (at for at, seen in enumerate(self.batches) if same_tokens(seen, input_ids, attention_mask))
        return max(calls, default=None)

    def _alone(self, batch: TokenBatch, options: dict[str, Any]) -> Scored:
        return score_model(self.model, batch, **options)

    def _both(self, reference: Reference, batch: TokenBatch, options: dict[str, Any]) -> Scored:
        ready = None if self.ready is None else self.ready(batch)
        if self.exact and (torch.is_grad_enabled() or not self.model.training):
            found = compare(self.model, reference, batch, Divergence(), ref_scores=ready, **options)
            self.references.append(found.reference)
            self.divergences.append(found.divergence)
            return found.scored
        self.divergences.append(None)
        with scored_together(self.model, reference, batch):
            self.references.append(ready or reference.score(batch, temperature=options["temperature"]))
            return self._alone(batch, options)


def same_tokens(batch: TokenBatch, input_ids: Tensor, attention_mask: Tensor) -> bool:
    """Return True if the batch has these tokens."""
    if batch.input_ids is input_ids:
        return True
    pairs = (batch.input_ids, input_ids), (batch.attention_mask, attention_mask.to(batch.attention_mask.dtype))
    return all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


def token_batch(inputs: dict[str, Any], labels: Tensor, prefix: Prefix) -> TokenBatch:
    """Return the batch of a call by TRL. Inputs that are not text go to the model unchanged."""
    own = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "use_cache")}
    return TokenBatch(inputs["input_ids"], inputs["attention_mask"], labels != -100, None, own, prefix)


class Statistics:
    """TRL's statistics of the policy's logits, each [B, T - 1]."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    def observe(self, logits: Tensor, rows: Tensor) -> None:
        """Compute the statistics of some rows of logits [n, V]."""
        values = {}
        if "mean_logits" in self.names:
            values["mean_logits"] = logits.mean(-1, dtype=torch.float32)
        if "is_top1" in self.names:
            values["is_top1"] = logits.argmax(-1)
        if "log_sum_sq_probs" in self.names:
            values["log_sum_sq_probs"] = torch.logsumexp(2 * torch.log_softmax(logits.float(), -1), -1)
        self.seen.append((rows, values))

    def result(self, call: Call) -> dict[str, Tensor]:
        """Return the statistics of all rows, by TRL's names."""
        rows = torch.cat([rows for rows, _ in self.seen]) if self.seen else None
        found = {}
        for name in self.names:
            flat = torch.zeros(call.targets.numel(), device=call.targets.device)
            if rows is not None:
                flat = flat.to(self.seen[0][1][name].dtype)
                flat[rows] = torch.cat([values[name] for _, values in self.seen])
            found[name] = flat.view(call.targets.shape)
        if (top1 := found.pop("is_top1", None)) is not None:
            found["is_top1"] = (top1 == call.targets).float()
        spread = {name: call.spread(value)[:, 1:] for name, value in found.items()}
        return {name: value.bool() if name == "is_top1" else value for name, value in spread.items()}
