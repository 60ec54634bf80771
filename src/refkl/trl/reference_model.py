"""What scripts and callbacks find as `trainer.ref_model`: a stand-in that calls refkl's reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refkl.config import Prefix
from refkl.reference import Reference
from refkl.reference.held import HeldReference
from refkl.trl.scored_model import ScoredModel
from refkl.types import TokenBatch


class ReferenceModel:
    """A reference, called like a model. Nothing has a gradient, and dropout is off.

    It has no layers of its own: the weights may be in the policy, and are put in place while it runs. `reference` is
    the refkl reference with all its methods.
    """

    def __init__(self, reference: Reference, *, prefix: Prefix = "auto") -> None:
        """Stand in for `reference`.

        Args:
            reference: the trainer's reference.
            prefix: prefix sharing of scored batches, as in TokenBatch.
        """
        self.reference = reference
        self._scored = ScoredModel(reference.score, prefix=prefix)

    def __repr__(self) -> str:
        what = f"strategy={self.reference.strategy!r}, source={self.reference.source!r}"
        return f"ReferenceModel({what}): trainer.reference, called like a model"

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        **inputs: Any,
    ) -> Any:
        """Return the model's output for input_ids [B, T], or TRL's fused outputs with `fused_lm_head=True`.

        The output is on the reference's device.

        Raises:
            ValueError: the weights are not in this process, or were freed.
        """
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if fused_lm_head:
            given = {"input_ids": input_ids, "attention_mask": attention, **inputs}
            return self._scored(**given, labels=labels, fused_lm_head=True)
        with self._running(input_ids, attention) as (model, tokens):
            if labels is not None:
                inputs["labels"] = labels.to(tokens.input_ids.device)
            return model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **inputs)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Return what the model's own `generate` returns for input_ids [B, T].

        Raises:
            ValueError: the weights are not in this process, or were freed.
        """
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self._running(input_ids, attention) as (model, tokens):
            generate: Any = model.generate
            return generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **options)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and weights of the reference, as far as this rank holds them, without grad.

        The names are those of the policy without wrappers. Change the weights by `reference.update` only: any other
        change is reported as an error.
        """
        for weight in self.reference.weights():
            yield weight.name, weight.local

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights of `named_parameters`."""
        return (tensor for _, tensor in self.named_parameters())

    def get_parameter(self, target: str) -> Tensor:
        """Return the weight of this name.

        Raises:
            AttributeError: there is none.
        """
        for name, tensor in self.named_parameters():
            if name == target:
                return tensor
        raise AttributeError(f"{self!r} has no weight {target!r}.")

    def eval(self) -> ReferenceModel:
        """Return self: a reference is always in eval mode."""
        return self

    @contextmanager
    def _running(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[nn.Module, TokenBatch]]:
        held = self.reference.uncached
        if not isinstance(held, HeldReference) or self.reference.freed:
            why = "were freed" if self.reference.freed else f"of strategy {held.strategy!r} are not in this process"
            raise ValueError(
                f"trainer.ref_model was called as a model, and the weights of the reference {why}. Ask for "
                "log-probabilities only: trainer.reference.score."
            )
        nothing = torch.zeros_like(input_ids)
        with held.scoring(TokenBatch(input_ids, attention_mask, nothing), "trainer.ref_model") as found:
            yield found
