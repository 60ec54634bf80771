"""The logits of policy and reference, one tile of tokens at a time.

Notation: as in `refkl.kl.walk`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refkl.kl.job import Inputs, Job
from refkl.kl.projection import Projection, rows_per_tile


class Tiles:
    """The buffers of a tile, and the heads that fill them."""

    def __init__(self, inputs: Inputs, job: Job) -> None:
        self.inputs, self.job = inputs, job
        self.dtype = _result_dtype(inputs)
        self.head = Projection(inputs.weight, inputs.bias, job.scaling, self.dtype, job.autocast)
        self.ref: Projection | None = None
        # 16-bit products would round the difference of two states; the states themselves are exact.
        self.shared = inputs.ref_weight is not None and _one_head(inputs) and self.head.low is None
        if self.shared:
            self.ref = self.head
        elif inputs.ref_weight is not None:
            self.ref = Projection(inputs.ref_weight, inputs.ref_bias, job.scaling, self.dtype, job.autocast)
        self.subtractable = self.ref is not None and not self.shared and self.head.subtractable(self.ref)
        self.apart = self.shared
        """True if the first buffer holds z - z_ref instead of z.

        A difference that is projected from differences keeps all its digits. Subtracting the logits keeps only the
        digits in which they differ.
        """
        self.count = inputs.hidden.shape[0] if job.rows is None else job.rows.numel()
        limit = job.chunk or rows_per_tile(job.columns, self.dtype, inputs.hidden.device)
        self.rows = -(-self.count // max(1, -(-self.count // limit)))
        """The rows of a tile; the last one may have fewer."""
        self.buffers: list[Tensor] = []

    def of(self, rows: int) -> list[Tensor]:
        """Return the part of each buffer that a tile of this many rows uses."""
        return [buffer[:rows] for buffer in self.buffers]

    def buffer(self, index: int) -> Tensor:
        """Return a buffer [rows, V], made at its first use."""
        while len(self.buffers) <= index:
            self.buffers.append(self.inputs.hidden.new_empty(self.rows, self.job.columns, dtype=self.dtype))
        return self.buffers[index]

    def project(self, hidden: Tensor, index: Any) -> None:
        """Compute the products into the buffers, before the soft cap: z (or, if `apart`, z - z_ref) and z_ref."""
        tile = self.buffer(0)[: len(hidden)]
        if self.ref is None:
            self.head.product(hidden, tile)
            return
        assert self.inputs.ref_hidden is not None
        ref_hidden = self.inputs.ref_hidden.detach()[index].to(self.dtype)
        self.ref.product(ref_hidden, self.buffer(1)[: len(hidden)])
        self.apart = self.shared or (self.subtractable and self.head.near(self.ref, hidden, ref_hidden))
        if not self.apart:
            self.head.product(hidden, tile)
            return
        self.head.product(hidden - ref_hidden, tile, bias=False)
        if not self.shared:
            self.head.add_difference(self.ref, ref_hidden, tile)

    def logits(
        self, block: slice, rows: int, *, slope: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return z, z_ref, z - z_ref if it is known to more digits than these give, and the bend of the soft cap."""
        raw = [buffer[:rows][block] for buffer in self.buffers]
        if self.ref is None:
            z = self._own(raw[0])
            bend = self.head.cap_(z, slope=slope)
            self.head.exclude_(z)
            return z, None, None, bend
        ref_z = self._own(raw[1])
        z = raw[0] + raw[1] if self.apart else self._own(raw[0])
        bend = self.head.cap_(z, slope=slope)
        self.ref.cap_(ref_z, slope=False)
        difference: Tensor | None = None
        if self.apart:
            difference = raw[0] if self.head.size == self.job.columns else self.head.exclude_(raw[0].clone(), 0.0)
        if difference is not None and self.head.capped:
            # tanh x - tanh y = tanh(x - y) (1 - tanh x tanh y)
            outer = self.head.outer
            difference = difference.tanh().mul_(outer - z * ref_z / outer)
        self.head.exclude_(z)
        self.ref.exclude_(ref_z)
        return z, ref_z, difference, bend

    def _own(self, raw: Tensor) -> Tensor:
        """Return a product that is safe to use: a copy if it will be changed in place, else the product itself."""
        padded = any(p is not None and p.size < self.job.columns for p in (self.head, self.ref))
        return raw.clone() if self.head.capped or padded else raw


def _result_dtype(inputs: Inputs) -> torch.dtype:
    """Return the dtype of the maths and the results: fp64 if any input is, else fp32."""
    dtype = torch.float32
    for t in inputs.tensors():
        if t is not None and t.is_floating_point():
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _one_head(inputs: Inputs) -> bool:
    return _same(inputs.weight, inputs.ref_weight) and (
        (inputs.bias is None and inputs.ref_bias is None) or _same(inputs.bias, inputs.ref_bias)
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return True if two tensors are the same view of the same memory."""
    if a is None or b is None or a.device != b.device or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
