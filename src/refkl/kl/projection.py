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
        self.bias = None if bias is None else bias.detach().to(dtype) * self.unit
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
    return max(16, min(wanted, _free_bytes(device) // (_SHARES * row)))


def _free_bytes(device: str) -> int:
    if "cuda" in device:
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)
