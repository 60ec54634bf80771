"""An output head taken a chunk of tokens at a time, with the whole vocabulary in one tile.

    logits = softcap(logit_scale · h Wᵀ + bias) / temperature,    softcap(x) = c · tanh(x / c)

Products accumulate and come out in fp32 (fp64 for fp64 weights). A weight in bf16 or fp16 is widened a block of the
vocabulary at a time on a CPU, whose own products would round their results to 16 bits; CUDA's can give fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_TILE_BYTES = 64 << 20
_TILE_BYTES_CUDA = 512 << 20
_LEAST_ROWS, _MOST_ROWS = 256, 4096
"""A product of fewer rows spends its time on reading the weight."""
_WIDEN_BYTES = 8 << 20
"""How much of a 16-bit weight is widened at a time."""


@dataclass(frozen=True)
class Scaling:
    """What turns a product into logits."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Projection:
    """Hidden states to logits, and slopes of logits back to hidden states and weights.

    `gain` is what the product is multiplied by, up to the soft cap if there is one; `outer` what follows the tanh.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scaling: Scaling, dtype: torch.dtype) -> None:
        softcap, temperature = scaling.softcap, scaling.temperature
        self.weight = weight.detach()
        self.size = weight.shape[0]
        self.dtype = dtype
        self.capped = softcap is not None
        self.unit = 1.0 / (temperature if softcap is None else softcap)
        self.gain = scaling.logit_scale * self.unit
        self.outer = 1.0 if softcap is None else softcap / temperature
        self.bias = None if bias is None else bias.detach().to(dtype) * self.unit
        self._widen = None
        if weight.dtype != dtype and weight.device.type != "cuda":
            rows = max(1, min(weight.shape[0], _WIDEN_BYTES // (weight.shape[1] * dtype.itemsize)))
            self._widen = torch.empty(rows, weight.shape[1], dtype=dtype, device=weight.device)

    def product(self, hidden: Tensor, out: Tensor, *, bias: bool = True) -> None:
        """out[:, :V] <- gain · hidden Wᵀ (+ bias), before the soft cap. hidden [n, H], out [n, ≥ V]."""
        scaled = hidden.to(self.dtype) * self.gain
        for columns, weight in self._blocks():
            _mm(scaled, weight.t(), out[:, columns])
        if bias and self.bias is not None:
            out[:, : self.size] += self.bias

    def pull(self, slope: Tensor, out: Tensor) -> None:
        """out [n, H] <- gain · slope W, with slope [n, V] that of the product."""
        for index, (columns, weight) in enumerate(self._blocks()):
            _mm(slope[:, columns], weight, out, add=index > 0)
        if self.gain != 1.0:
            out *= self.gain

    def accumulate(self, slope: Tensor, hidden: Tensor, d_weight: Tensor, *, first: bool) -> None:
        """d_weight [V, H] <- (d_weight unless first) + gain · slopeᵀ hidden."""
        _mm(slope.t(), hidden.to(self.dtype) * self.gain, d_weight, add=not first)

    def cap_(self, z: Tensor, *, slope: bool) -> Tensor | None:
        """Soft-cap a product in place, if the head does; then ∂z/∂(product) [n, V], if wanted."""
        if not self.capped:
            return None
        z.tanh_()
        bend = (1.0 - z * z).mul_(self.outer) if slope else None
        z *= self.outer
        return bend

    def exclude_(self, z: Tensor, value: float = -torch.inf) -> Tensor:
        """Put `value` into the columns that this head does not have."""
        z[:, self.size :] = value
        return z

    def finite(self, columns: int) -> bool:
        """Whether no logit is -inf."""
        return self.size == columns and (self.bias is None or bool(self.bias.isfinite().all()))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype that products are taken in, in blocks of its rows."""
        if self._widen is None:
            yield slice(0, self.size), self.weight
            return
        for start in range(0, self.size, self._widen.shape[0]):
            columns = slice(start, min(start + self._widen.shape[0], self.size))
            block = self._widen[: columns.stop - start]
            block.copy_(self.weight[columns])
            yield columns, block


def _mm(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out <- a b, or out + a b; in the dtype of `out`."""
    if a.dtype == b.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    # CUDA with one side in 16 bits: the other is rounded to it, and the sum is kept in fp32.
    low = b.dtype if b.dtype != out.dtype else a.dtype
    if add:
        torch.addmm(out, a.to(low), b.to(low), out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(low), b.to(low), out_dtype=out.dtype, out=out)


def rows_per_tile(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens are projected at a time, from the shape and from the memory that is free."""
    return _rows_per_tile(columns, dtype, str(device))


@lru_cache(maxsize=256)  # the same for policy and reference, however the free memory changes: their tiles must agree
def _rows_per_tile(columns: int, dtype: torch.dtype, device: str) -> int:
    row = columns * dtype.itemsize
    wanted = min(_MOST_ROWS, max(_LEAST_ROWS, (_TILE_BYTES_CUDA if "cuda" in device else _TILE_BYTES) // row))
    return max(16, min(wanted, _free_bytes(device) // (8 * row)))


def _free_bytes(device: str) -> int:
    if "cuda" in device:
        return int(torch.cuda.mem_get_info(device)[0])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30  # macOS does not say
