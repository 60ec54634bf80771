"""An output head taken a chunk of tokens at a time, with the whole vocabulary in one tile.

    logits = softcap(logit_scale · h Wᵀ + bias) / temperature,    softcap(x) = c · tanh(x / c)

Products accumulate and come out in fp32 (fp64 for fp64 weights). A weight in bf16 or fp16 is widened a block of the
vocabulary at a time on a CPU, whose own products would round their results to 16 bits; CUDA's can give fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

_TILE_BYTES = 32 << 20
_TILE_BYTES_CUDA = 512 << 20
_LEAST_ROWS, _MOST_ROWS = 256, 4096
"""A product of fewer rows spends its time on reading the weight."""
_SHARES = 16
"""A tile takes no more than this part of what is free: there are up to three, and what is made on the way."""
_WIDEN_BYTES = 8 << 20
"""How much of a 16-bit weight is widened, or of two weights subtracted, at a time."""
_SAMPLE = 256
"""Columns from which it is judged how far two sides are apart."""
_NEAR = 2.0**-6
"""Of 24 bits, 6 are lost to subtraction where the difference is this part of what is subtracted."""


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

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scaling: Scaling,
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
    ) -> None:
        softcap, temperature = scaling.softcap, scaling.temperature
        self.weight = weight.detach()
        self.size = weight.shape[0]
        self.dtype = dtype
        self.capped = softcap is not None
        self.unit = 1.0 / (temperature if softcap is None else softcap)
        self.gain = scaling.logit_scale * self.unit
        self.outer = 1.0 if softcap is None else softcap / temperature
        self.unscaled_bias = None if bias is None else bias.detach().to(dtype)
        self.bias = None if self.unscaled_bias is None else self.unscaled_bias * self.unit
        # CUDA multiplies 16-bit numbers and gives the sums in fp32; a weight that autocast would round is rounded here.
        self.low = _low(weight, dtype, autocast)
        if self.low is not None:
            self.weight = self.weight.to(self.low)
        self._widen = None
        if self.low is None and weight.dtype != dtype:
            rows = max(1, min(weight.shape[0], _WIDEN_BYTES // (weight.shape[1] * dtype.itemsize)))
            self._widen = torch.empty(rows, weight.shape[1], dtype=dtype, device=weight.device)

    def product(self, hidden: Tensor, out: Tensor, *, bias: bool = True) -> None:
        """out[:, :V] <- gain · hidden Wᵀ (+ bias), before the soft cap. hidden [n, H], out [n, ≥ V]."""
        if self.low is not None:  # the gain comes after: states times it would be rounded once more
            torch.mm(hidden.to(self.low), self.weight.t(), out_dtype=self.dtype, out=out[:, : self.size]).mul_(
                self.gain
            )
        else:
            scaled = hidden.to(self.dtype) * self.gain
            for columns, weight in self._blocks():
                torch.mm(scaled, weight.t(), out=out[:, columns])
        if bias and self.bias is not None:
            out[:, : self.size] += self.bias

    def subtractable(self, other: Projection) -> bool:
        """Whether `add_difference` can be had: tokens alike, in fp32 (fp64 has digits to spare), on one device."""
        same = self.weight.shape == other.weight.shape and self.weight.device == other.weight.device
        if not same or self.dtype != torch.float32 or self.low is not None or other.low is not None:
            return False
        gap = self._bias_difference(other)
        return gap is None or bool(gap.isfinite().all())

    def near(self, other: Projection, hidden: Tensor, other_hidden: Tensor) -> bool:
        """Whether there is a row in which the logits of the two sides differ by so little, as a share of their size,
        that subtracting one from the other would lose digits that count; from some columns of the vocabulary."""
        z, other_z = (
            h @ p.weight[:: max(1, p.size // _SAMPLE)].to(p.dtype).t()
            for p, h in ((self, hidden), (other, other_hidden))
        )
        gap = z - other_z
        spread = (gap - gap.mean(-1, keepdim=True)).square_().mean(-1).sqrt_()  # what all have in common cancels
        return bool((spread < _NEAR * z.abs().amax(-1)).any())

    def add_difference(self, other: Projection, hidden: Tensor, out: Tensor) -> None:
        """out[:, :V] += gain · hidden (W - W')ᵀ + bias - bias', what this head gives more than the other one."""
        scaled = hidden.to(self.dtype) * self.gain
        rows = max(1, min(self.size, _WIDEN_BYTES // (self.weight.shape[1] * self.dtype.itemsize)))
        buffer = hidden.new_empty(rows, self.weight.shape[1], dtype=self.dtype)
        for start in range(0, self.size, rows):
            columns = slice(start, min(start + rows, self.size))
            block = buffer[: columns.stop - start].copy_(self.weight[columns]).sub_(other.weight[columns])
            out[:, columns].addmm_(scaled, block.t())
        gap = self._bias_difference(other)
        if gap is not None:
            out[:, : self.size] += gap

    def _bias_difference(self, other: Projection) -> Tensor | None:
        """[V]; 0 where both are -inf."""
        biases = self.unscaled_bias, other.unscaled_bias
        if biases[0] is None and biases[1] is None:
            return None
        zero = self.weight.new_zeros((), dtype=self.dtype)
        own, their = (zero if b is None else b for b in biases)
        return torch.where(own == their, zero, own - their) * self.unit

    def pull(self, slope: Tensor, out: Tensor) -> None:
        """out [n, H] <- gain · slope W, with slope [n, V] that of the product."""
        if self.low is not None:
            torch.mm(slope.to(self.low), self.weight, out_dtype=self.dtype, out=out)
        else:
            for index, (columns, weight) in enumerate(self._blocks()):
                out.addmm_(slope[:, columns], weight, beta=float(index > 0))
        if self.gain != 1.0:
            out *= self.gain

    def accumulate(self, slope: Tensor, hidden: Tensor, d_weight: Tensor, *, first: bool) -> None:
        """d_weight [V, H] <- (d_weight unless first) + gain · slopeᵀ hidden."""
        keep = float(not first)
        if self.low is not None:
            steps = (slope * self.gain).to(self.low).t()
            torch.addmm(d_weight, steps, hidden.to(self.low), beta=keep, out_dtype=self.dtype, out=d_weight)
        else:
            d_weight.addmm_(slope.t(), hidden.to(self.dtype) * self.gain, beta=keep)

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


def _low(weight: Tensor, dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype | None:
    """The 16-bit dtype of products on CUDA, if they are taken in one: the weight's, or that of `autocast`."""
    if weight.device.type != "cuda" or dtype != torch.float32:
        return None
    return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else autocast


def rows_per_tile(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens are projected at a time, from the shape and from the memory that is free."""
    return _rows_per_tile(columns, dtype, str(device))


@lru_cache(maxsize=256)  # the same for policy and reference, however the free memory changes: their tiles must agree
def _rows_per_tile(columns: int, dtype: torch.dtype, device: str) -> int:
    row = columns * dtype.itemsize
    wanted = min(_MOST_ROWS, max(_LEAST_ROWS, (_TILE_BYTES_CUDA if "cuda" in device else _TILE_BYTES) // row))
    return max(16, min(wanted, free_bytes(device) // (_SHARES * row)))


def free_bytes(device: str) -> int:
    """Memory that is free on a device, with what torch holds there and does not use."""
    if "cuda" in device:
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)
