"""Comparison of policy and reference inside another trainer's loss, at the policy's first call there.

The policy is either called as it is and observed (`Watch`), or replaced by a stand-in that gives the same loss
(`CrossEntropy`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from refkl.kl.divergence_rows import Divergence
from refkl.reference import Reference
from refkl.reference.pair import Compared, compare, compare_logits, scored_together
from refkl.scoring import Call, ScoredLogits, prepare
from refkl.types import TokenBatch, TokenScores

EXACT = Divergence("reverse_kl")
IGNORED = -100
"""The label of a token without a label."""


class Watch:
    """Observes the policy in the loss of one micro-batch."""

    def __init__(self, reference: Reference, batch: TokenBatch) -> None:
        self.reference = reference
        self.batch = batch
        self.found: Compared | None = None
        """The comparison, once it has been made."""

    @contextmanager
    def open(self, model: nn.Module) -> Iterator[None]:
        """Observe the caller's first call of the model, and compare its logits with the reference on exit.

        The caller gets the model's own outputs, and the KL comes from the same forward. If there is padding on the left
        and the caller gives no positions, they are counted from the attention mask, as for the reference.

        Raises:
            ValueError: the model is not called, its first call is on other tokens than the batch's, or it returns no
                logits.
        """
        if self.found is not None:
            yield
            return
        call = prepare(model, replace(self.batch, prefix="off"))
        counted = self._positions(call)
        outputs: list[Any] = []
        # Enter this before adding the hooks: it may run the model to inspect it.
        with scored_together(model, self.reference, self.batch):
            hooks = self._hooks(model, counted, outputs)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
            logits = ScoredLogits(call, call.predicting(_logits(outputs)), None, outputs[0])
            self.found = compare_logits(logits, self.reference, EXACT)

    def _hooks(self, model: nn.Module, counted: dict[str, Tensor], outputs: list[Any]) -> list[Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if outputs:
                return args, kwargs
            self._check_tokens(args[0] if args else kwargs.get("input_ids"))
            return args, counted | kwargs

        def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if not outputs:
                outputs.append(result)

        return [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]

    def _positions(self, call: Call) -> dict[str, Tensor]:
        """Return the position ids to add, if the model itself would count those of a real token differently."""
        if (positions := call.inputs.get("position_ids")) is None:
            return {}
        itself = torch.arange(positions.shape[-1], device=positions.device)
        moved = (positions != itself) & self.batch.attention_mask.bool()
        return {"position_ids": positions} if bool(moved.any()) else {}

    def _check_tokens(self, ids: Any) -> None:
        own = self.batch.input_ids
        if ids is not own and not (isinstance(ids, Tensor) and ids.shape == own.shape and torch.equal(ids, own)):
            raise ValueError(
                "The first call of the policy in this loss is not on the micro-batch's input_ids, so its KL to the "
                "reference on them is not known. Call the policy on these first."
            )


def _logits(outputs: list[Any]) -> Tensor:
    logits = getattr(outputs[0], "logits", None) if outputs else None
    if not isinstance(logits, Tensor):
        found = "gave no logits" if outputs else "was not called"
        raise ValueError(
            f"The policy {found} in this loss, but the exact KL is computed from its logits. Call it once, without a "
            "kernel that does not return the logits (skip_logits)."
        )
    return logits


class CrossEntropy:
    """The policy as Trainer.compute_loss calls it. The loss comes from the forward that is compared with the
    reference."""

    found: Compared

    def __init__(self, model: Any, reference: Reference, batch: TokenBatch, ready: TokenScores | None) -> None:
        self.model, self.reference, self.batch, self.ready = model, reference, batch, ready

    def __call__(self, *, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> dict[str, Tensor]:
        self.found = compare(self.model, self.reference, self.batch, EXACT, ref_scores=self.ready)
        mask = labelled(labels)
        total = -self.found.scored.scores.logp.masked_fill(~mask, 0.0).sum()
        return {"loss": total / (mask.sum() if num_items_in_batch is None else num_items_in_batch)}


def labelled(labels: Tensor) -> Tensor:
    """Return the mask [B, T], True = in a causal language model's loss. A first token is never in it, because nothing
    precedes it."""
    mask = labels != IGNORED
    mask[:, 0] = False
    return mask


def predicts_its_labels(inputs: dict[str, Any], batch: TokenBatch) -> bool:
    """Return True if the labels are the batch's own scored tokens: none of them is padding or follows padding."""
    labels = inputs["labels"]
    beyond = ~batch.completion_mask | (labels != inputs["input_ids"])
    return not bool((labelled(labels) & beyond).any())
