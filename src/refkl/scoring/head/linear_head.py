"""The output head of a causal language model, and the map that the model applies to its logits.

Cohere and Granite scale them, Gemma-2 caps them, Falcon-H1 has a multiplier. refkl knows two forms, which probe.py
recognises:

    logits = s·z   or   logits = c·tanh(s·z / c),   z = hidden·weightᵀ + the module's bias

Notation, here and in probe.py and redirect.py: B sequences, K positions that reach the head, V vocabulary, H the head's
input width.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from refkl.backend import full_shape

_TOLERANCE = 2e-6
"""Relative tolerance in fp32: a cap takes three roundings and a tanh."""


class HeadError(ValueError):
    """Error for a head that a fused op cannot replace. The model can still be scored through its logits."""


@dataclass(frozen=True, eq=False)
class Head:
    """A linear output head, and the map that the model applies to its result.

    logits = softcap(logit_scale·hidden·weightᵀ + bias), where softcap(x) = c·tanh(x / c), or x if there is no cap.
    """

    module: nn.Linear
    logit_scale: float
    softcap: float | None
    vocabulary: int
    """V, the number of logits that the model returns. Some models cut off the rows that pad the head's weight."""

    @property
    def weight(self) -> Tensor:
        """[V, H] the module's own parameter, or a view of it if the model cuts rows off.

        Raises:
            HeadError: the weight is partitioned (ZeRO-3) and not gathered: read it inside a redirected forward.
        """
        weight: Tensor = self.module.weight
        if weight.shape != full_shape(weight):
            raise HeadError(
                f"The head's weight {list(full_shape(weight))} is partitioned under ZeRO-3 and not gathered here. Read "
                "it in the function given to `redirected`, which runs where DeepSpeed has gathered it."
            )
        return weight if weight.shape[0] == self.vocabulary else weight[: self.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """[V] the term added after the scale, logit_scale · the module's bias; None if the module has no bias.

        Raises:
            HeadError: see `weight`.
        """
        bias: Tensor | None = self.module.bias
        if bias is None:
            return None
        if bias.shape != full_shape(bias):
            raise HeadError(
                "The head's bias is partitioned under ZeRO-3: read it in the function given to `redirected`."
            )
        bias = bias if bias.shape[0] == self.vocabulary else bias[: self.vocabulary]
        return bias if self.logit_scale == 1.0 else self.logit_scale * bias

    def holding(self, weight: Tensor, bias: Tensor | None) -> Head:
        """Return the same head with other weights, which are not trainable."""
        with torch.device("meta"):
            module = nn.Linear(1, 1, bias=bias is not None)
        module.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return replace(self, module=module)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the full logits, [..., H] -> [..., V], as the model computes them. A fused op must agree with them."""
        linear = nn.functional.linear(hidden, self.weight)
        scaled = linear * self.logit_scale + (0.0 if self.bias is None else self.bias)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[int, float, float | None, int]] = weakref.WeakKeyDictionary()
"""For each head: rows of its weight, logit_scale, softcap, vocabulary."""


def mapped(values: Tensor, scale: float, cap: float | None) -> Tensor:
    return values * scale if cap is None else cap * torch.tanh(values * scale / cap)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return True if all numbers, in fp64, equal the expected ones to the precision of a model that computes in
    `dtype`."""
    tolerance = _TOLERANCE if torch.finfo(dtype).bits >= 32 else 2 * torch.finfo(dtype).eps
    return bool(((found - expected).abs() <= tolerance * expected.abs()).all())


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def not_called(what: str) -> str:
    return (
        f"{what[0].upper()}{what[1:]} never called the model's output head: it was patched to compute the head in "
        "another way (Liger, TRL's fused heads), or was compiled with the head inside. Undo that, or score through the "
        "logits."
    )
