"""The inputs, results and observers of a walk over the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refkl.kl.divergence_rows import Divergence
from refkl.kl.projection import Scaling


class TileScores(NamedTuple):
    """The scores of the present n tokens that a `token_loss` receives, with grad; None for those not requested."""

    logp: Tensor | None
    """[n] nats."""
    entropy: Tensor | None
    """[n] nats."""
    ref_logp: Tensor | None
    """[n] nats, without grad."""
    divergence: Tensor | None
    """[n]."""
    rows: Tensor
    """[n] indices of these tokens among the N, to look up other inputs of the loss (advantages, …)."""


TokenLoss = Callable[[TileScores], Tensor]
"""Returns [n], a loss per token, with grad to the scores."""


Observer = Callable[[Tensor, Tensor], None]


Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a call; shapes as in linear.py."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the order of the fields."""
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Job:
    """The requested values, and the rows to compute them for."""

    names: tuple[str, ...]
    """A selection of "logp", "entropy", "ref_logp", "divergence"."""
    graded: tuple[str, ...]
    """Those of `names` that carry grad."""
    scaling: Scaling
    columns: int
    """V of the tile: the vocabulary, or the size it is padded to."""
    rows: Tensor | None
    """[R] indices among the N tokens; None for all."""
    how: Divergence | None = None
    chunk: int | None = None
    token_loss: TokenLoss | None = None
    observe: Observer | None = None
    autocast: torch.dtype | None = None
    """The dtype to which autocast rounds the operands of products on CUDA; the sums are fp32 all the same."""
