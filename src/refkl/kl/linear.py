"""Fused output heads: log-probability, entropy and exact divergence from hidden states, without the logits in memory.

Tokens are processed a chunk at a time with the whole vocabulary in one tile, so that statistics, divergence and
gradient come from one projection. Costs in units of one product 2·N·V·H, forward and backward together:

    frozen head    2 for log-probabilities, 3 for an exact divergence (one more for the entropy's gradient)
    trained head   4 and 6; with the loss given as a closure (`token_loss`) 3 and 4

(A divergence from another head takes one more product in each pass over the tiles, as long as the two heads are near.)

A frozen head (as with LoRA) keeps ∂f/∂h [N, H] from the forward pass, and the backward pass multiplies it. A trained
head projects again in the backward pass, unless a closure lets it form the gradient in the forward pass.

Notation: N tokens, H hidden width, V vocabulary, n the tokens of a tile.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from refkl.kl.divergence_rows import Divergence
from refkl.kl.fused import score
from refkl.kl.job import Inputs, Job, Observer, TokenLoss
from refkl.kl.logprobs import check_temperature
from refkl.kl.projection import Scaling
from refkl.types import require_shape


class LinearScores(NamedTuple):
    """Scores per token, in nats."""

    logp: Tensor
    """[N], 0.0 where masked out."""
    entropy: Tensor | None
    """[N], 0.0 where masked out."""


class LinearPair(NamedTuple):
    """Scores of policy and reference on the same tokens; 0.0 where masked out."""

    logp: Tensor
    """[N] nats, with grad."""
    entropy: Tensor | None
    """[N] nats, the policy's."""
    ref_logp: Tensor
    """[N] nats, without grad."""
    divergence: Tensor
    """[N], with grad."""


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool | Literal["detached"] = False,
    mask: Tensor | None = None,
    token_loss: TokenLoss | None = None,
    observe: Observer | None = None,
    chunk: int | None = None,
) -> Any:
    """Compute log-probabilities of `targets` under softmax(softcap(logit_scale · hidden Wᵀ + bias) / temperature).

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H]. The head is trained if this or the bias requires grad, else frozen.
        targets: [N] integers in [0, V).
        bias: [V]. -inf excludes a token.
        logit_scale: multiplies the product, not the bias.
        softcap: c in c · tanh(x / c), applied before the temperature; None for none.
        temperature: positive; divides the logits.
        entropy: also compute each row's entropy: True with grad, "detached" without (which saves a product).
        mask: [N], True = scored. Other rows are dropped before any product, whatever they hold.
        token_loss: a loss per token, called as token_loss(TileScores) -> [n] on n tokens at a time. Its gradient is
            formed in the forward pass. It may depend on each token's own scores and on tensors that need no grad here.
        observe: called as observe(logits [n, V], rows [n]) on some rows at a time, without grad, to take statistics of
            the logits. It must not change them.
        chunk: rows of a tile; by default derived from the vocabulary and the free memory.

    Returns:
        LinearScores(logp [N], entropy [N] or None), in fp32, or in fp64 if an input is; with grad to hidden, weight and
        bias. With `token_loss`, its result: [N], with grad. 0.0 where masked out. A trained head with `token_loss` is
        cheapest if the backward pass weights all rows alike (a sum, a mean, a normalizer); otherwise it projects a
        second time.

    Raises:
        ValueError: shapes that do not fit, targets outside the vocabulary, a temperature or softcap not positive.
        RuntimeError: from a second backward pass (retain_graph) of a trained head with `token_loss`, if the first one
            had to scale the gradient that it keeps.
    """
    inputs = Inputs(hidden, weight, bias, targets)
    _check_entropy(entropy)
    names = ("logp", "entropy") if entropy else ("logp",)
    graded = ("logp",) if entropy == "detached" else names
    scaling = Scaling(logit_scale, softcap, temperature)
    columns = _check(inputs, scaling, mask, chunk, None)
    result = score(inputs, Job(names, graded, scaling, columns, _rows(mask), None, chunk, token_loss, observe))
    return result["loss"] if token_loss is not None else LinearScores(result["logp"], result.get("entropy"))


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kind: str = "reverse_kl",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    jsd_weight: float = 0.5,
    order: float | None = None,
    top_k: int | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    token_loss: TokenLoss | None = None,
    observe: Observer | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute the exact divergence per token between two heads' distributions.

    If both sides have the same head (`ref_weight is weight`, as with LoRA), the difference of the logits is projected
    from the difference of the states, which keeps its digits however close the two are. Between two heads it is
    projected from the differences of states and weights where some row's logits differ by less than 1/64 of their size.

    Args:
        hidden: the policy's, [N, H].
        weight: the policy's, [V, H].
        ref_hidden: the reference's, [N, H']. All tensors of the reference are always detached.
        ref_weight: the reference's, [V, H'].
        kind: one of DIVERGENCES.
        bias: the policy's, [V].
        ref_bias: the reference's, [V].
        logit_scale: of both heads, as in `linear_logp`.
        softcap: of both heads.
        temperature: of both heads.
        jsd_weight: for "jsd", `weight` in `divergence`.
        order: as in `divergence`.
        top_k: as in `divergence`.
        vocab_size: number of columns to compare. A smaller head is padded to it; its missing tokens count as -inf.
        mask: [N], True = scored.
        token_loss: as in `linear_logp`; it receives `TileScores.divergence`.
        observe: as in `linear_logp`.
        chunk: as in `linear_logp`.

    Returns:
        [N], as in `divergence`; with grad to hidden, weight and bias. With `token_loss`, its result.

    Raises:
        ValueError: vocabularies of different size without vocab_size, and as in `linear_logp` and `divergence`.
    """
    inputs = Inputs(hidden, weight, bias, None, ref_hidden, ref_weight, ref_bias)
    how = Divergence(kind, jsd_weight, order, top_k)
    names = ("divergence",)
    scaling = Scaling(logit_scale, softcap, temperature)
    columns = _check(inputs, scaling, mask, chunk, vocab_size)
    result = score(inputs, Job(names, names, scaling, columns, _rows(mask), how, chunk, token_loss, observe))
    return result["divergence" if token_loss is None else "loss"]


def linear_pair(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kind: str = "reverse_kl",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool | Literal["detached"] = False,
    jsd_weight: float = 0.5,
    order: float | None = None,
    top_k: int | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    token_loss: TokenLoss | None = None,
    observe: Observer | None = None,
    chunk: int | None = None,
) -> Any:
    """Compute log-probability, entropy, reference log-probability and exact divergence, from one projection of each
    side.

    Arguments, errors and `token_loss` are as in `linear_logp` and `linear_divergence`.

    Returns:
        LinearPair, each [N]. With `token_loss`, its result.
    """
    inputs = Inputs(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias)
    how = Divergence(kind, jsd_weight, order, top_k)
    _check_entropy(entropy)
    extra = ("entropy",) if entropy else ()
    names = ("logp", *extra, "ref_logp", "divergence")
    graded = ("logp", *(extra if entropy != "detached" else ()), "divergence")
    scaling = Scaling(logit_scale, softcap, temperature)
    columns = _check(inputs, scaling, mask, chunk, vocab_size)
    result = score(inputs, Job(names, graded, scaling, columns, _rows(mask), how, chunk, token_loss, observe))
    if token_loss is not None:
        return result["loss"]
    return LinearPair(result["logp"], result.get("entropy"), result["ref_logp"], result["divergence"])


def _check_entropy(entropy: bool | str) -> None:
    if entropy not in (True, False, "detached"):
        raise ValueError(f'entropy must be True, False or "detached", got {entropy!r}.')


def _rows(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool().nonzero()[:, 0]


def _check(inputs: Inputs, scaling: Scaling, mask: Tensor | None, chunk: int | None, vocab_size: int | None) -> int:
    """Return the number of columns to compute. Raise ValueError if the arguments do not fit together."""
    hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
    _check_head(hidden, weight, inputs.bias, "")
    check_temperature(scaling.temperature)
    if scaling.softcap is not None and not 0.0 < scaling.softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {scaling.softcap}. Pass None for no soft cap.")
    if not math.isfinite(scaling.logit_scale):
        raise ValueError(f"logit_scale must be finite, got {scaling.logit_scale}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk counts the rows of a tile and must be at least 1, got {chunk}.")
    for name, tensor in (("targets", targets), ("mask", mask)):
        if tensor is not None:
            require_shape(name, tensor, hidden.shape[:1], "the rows of hidden")
    sizes = [weight.shape[0]]
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        _check_head(inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias, "ref_")
        require_shape(
            "ref_hidden",
            inputs.ref_hidden,
            torch.Size((hidden.shape[0], inputs.ref_hidden.shape[1])),
            "hidden, row by row,",
        )
        sizes.append(inputs.ref_weight.shape[0])
    if vocab_size is None and len(set(sizes)) > 1:
        raise ValueError(
            f"The policy's head has {sizes[0]} tokens and the reference's {sizes[1]}. If the longer one is the same "
            f"vocabulary padded, pass vocab_size={max(sizes)}: missing tokens then count as -inf."
        )
    columns = max(sizes) if vocab_size is None else vocab_size
    if columns < max(sizes):
        raise ValueError(f"vocab_size={vocab_size} is less than the {max(sizes)} tokens of a head: it can only pad.")
    if targets is not None and (targets.is_floating_point() or targets.dtype == torch.bool):
        raise ValueError(f"targets must be integers, got {targets.dtype}.")
    if targets is not None and targets.numel():
        scored = targets if mask is None else targets[mask.bool()]
        if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < columns:
            raise ValueError(
                f"targets must be in [0, {columns}), found {int(scored.min())} to {int(scored.max())}. "
                "Leave out values that are no tokens (such as -100) by the mask."
            )
    return columns


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, side: str) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{side}hidden must be [N, H] and {side}weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}."
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"{side}hidden and {side}weight must be floats, got {hidden.dtype} and {weight.dtype}.")
    if bias is not None:
        require_shape(f"{side}bias", bias, weight.shape[:1], f"the rows of {side}weight")
