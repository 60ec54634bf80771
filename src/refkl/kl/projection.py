"""An output head, applied to a chunk of tokens at a time with the whole vocabulary in one tile.

    logits = softcap(logit_scale · h Wᵀ + bias) / temperature,    softcap(x) = c · tanh(x / c)

Products accumulate and come out in fp32 (fp64 for fp64 weights). On a CPU a weight in bf16 or fp16 is widened a block
of the vocabulary at a time, since 16-bit products there round their results to 16 bits; CUDA's can return fp32.
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
"""Bounds of the rows of a tile. With fewer rows, a product spends its time on reading the weight."""
_SHARES = 16
"""Inverse of the largest fraction of the free memory that a tile takes: there are up to three tiles, and intermediate
tensors."""
_WIDEN_BYTES = 8 << 20
"""Bytes of a 16-bit weight that are widened at a time, or of two weights that are subtracted."""
_SAMPLE = 256
"""Number of vocabulary columns that `near` compares."""
_NEAR = 2.0**-6
"""Ratio of a difference to its operands below which they count as near: subtracting them loses 6 of 24 bits."""


@dataclass(frozen=True)
class Scaling:
    """The factors that turn a product into logits."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Projection:
    """A head that maps hidden states to logits, and slopes of logits back to hidden states and weights.

    `gain` multiplies the product before the soft cap, if there is one; `outer` multiplies the result of the tanh.
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
        # CUDA multiplies 16-bit numbers and returns fp32 sums; a weight that autocast would round is rounded here.
        self.low = _low(weight, dtype, autocast)
        if self.low is not None:
            self.weight = self.weight.to(self.low)
        self._widen = None
        if self.low is None and weight.dtype != dtype:
            rows = max(1, min(weight.shape[0], _WIDEN_BYTES // (weight.shape[1] * dtype.itemsize)))
            self._widen = torch.empty(rows, weight.shape[1], dtype=dtype, device=weight.device)

    def product(self, hidden: Tensor, out: Tensor, *, bias: bool = True) -> None:
        """Compute out[:, :V] <- gain · hidden Wᵀ (+ bias), before the soft cap. hidden [n, H], out [n, ≥ V]."""
        if self.low is not None:  # the gain is applied after it: scaled states would be rounded once more
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
        """Return True if `add_difference` works: same vocabulary, fp32 (fp64 has digits to spare), same device."""
        same = self.weight.shape == other.weight.shape and self.weight.device == other.weight.device
        if not same or self.dtype != torch.float32 or self.low is not None or other.low is not None:
            return False
        gap = self._bias_difference(other)
        return gap is None or bool(gap.isfinite().all())

    def near(self, other: Projection, hidden: Tensor, other_hidden: Tensor) -> bool:
        """Return True if subtracting the two sides' logits would lose digits that matter, in at least one row.

        That is so if they differ by a small fraction of their size. It is judged from some columns of the vocabulary.
        """
        z, other_z = (
            h @ p.weight[:: max(1, p.size // _SAMPLE)].to(p.dtype).t()
            for p, h in ((self, hidden), (other, other_hidden))
        )
        gap = z - other_z
        spread = (gap - gap.mean(-1, keepdim=True)).square_().mean(-1).sqrt_()  # a shift that all columns share cancels
        return bool((spread < _NEAR * z.abs().amax(-1)).any())

    def add_difference(self, other: Projection, hidden: Tensor, out: Tensor) -> None:
        """Compute out[:, :V] += gain · hidden (W - W')ᵀ + bias - bias', the excess of this head over the other one."""
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
        """Return the difference [V]; 0 where both are -inf."""
        biases = self.unscaled_bias, other.unscaled_bias
        if biases[0] is None and biases[1] is None:
            return None
        zero = self.weight.new_zeros((), dtype=self.dtype)
        own, their = (zero if b is None else b for b in biases)
        return torch.where(own == their, zero, own - their) * self.unit

    def pull(self, slope: Tensor, out: Tensor) -> None:
        """Compute out [n, H] <- gain · slope W, with the product's slope [n, V]."""
        if self.low is not None:
            torch.mm(slope.to(self.low), self.weight, out_dtype=self.dtype, out=out)
        else:
            for index, (columns, weight) in enumerate(self._blocks()):
                out.addmm_(slope[:, columns], weight, beta=float(index > 0))
        if self.gain != 1.0:
            out *= self.gain

    def accumulate(self, slope: Tensor, hidden: Tensor, d_weight: Tensor, *, first: bool) -> None:
        """Compute d_weight [V, H] <- (d_weight unless first) + gain · slopeᵀ hidden."""
        keep = float(not first)
        if self.low is not None:
            steps = (slope * self.gain).to(self.low).t()
            torch.addmm(d_weight, steps, hidden.to(self.low), beta=keep, out_dtype=self.dtype, out=d_weight)
        else:
            d_weight.addmm_(slope.t(), hidden.to(self.dtype) * self.gain, beta=keep)

    def cap_(self, z: Tensor, *, slope: bool) -> Tensor | None:
        """Soft-cap a product in place, if the head does; then return ∂z/∂(product) [n, V] if `slope` is set."""
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
        """Return True if no logit is -inf."""
        return self.size == columns and (self.bias is None or bool(self.bias.isfinite().all()))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight in the dtype of the products, in blocks of its rows."""
        if self._widen is None:
            yield slice(0, self.size), self.weight
            return
        for start in range(0, self.size, self._widen.shape[0]):
            columns = slice(start, min(start + self._widen.shape[0], self.size))
            block = self._widen[: columns.stop - start]
            block.copy_(self.weight[columns])
            yield columns, block


def _low(weight: Tensor, dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype | None:
    """Return the 16-bit dtype of products on CUDA, the weight's or that of `autocast`; None if they are not in 16
    bits."""
    if weight.device.type != "cuda" or dtype != torch.float32:
        return None
    return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else autocast


def rows_per_tile(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the number of tokens to project at a time, from the shape and the free memory."""
    return _rows_per_tile(columns, dtype, str(device))


@lru_cache(maxsize=256)  # policy and reference need equal tiles, so later changes of free memory are ignored
def _rows_per_tile(columns: int, dtype: torch.dtype, device: str) -> int:
    row = columns * dtype.itemsize
    wanted = min(_MOST_ROWS, max(_LEAST_ROWS, (_TILE_BYTES_CUDA if "cuda" in device else _TILE_BYTES) // row))
    return max(16, min(wanted, free_bytes(device) // (_SHARES * row)))


def free_bytes(device: str) -> int:
    """Return the free memory of a device, including memory that torch has reserved there and does not use."""
    if "cuda" in device:
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)
