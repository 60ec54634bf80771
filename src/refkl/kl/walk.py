"""The engine of the fused heads: computes the requested values tile by tile, with their gradients.

Notation: N tokens, of which R are scored, H hidden width, V columns (vocabulary), n rows of a tile, z a row's logits, p
its softmax. A *slope* is ∂value/∂z [n, V]; one more product with the head's weight makes it ∂value/∂h. A *lean* walk
works in place, for the most frequent requests. A *bend* is the factor by which the soft cap multiplies slopes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from refkl.kl.divergence_rows import Divergence, blocks, compare, reverse_kl_in_place
from refkl.kl.job import Inputs, Job, TileScores, Values
from refkl.kl.tiles import Tiles
from refkl.kl.token_rows import entropy, entropy_slope, logp_in_place, logp_slope, token_rows


class Walk:
    """One pass over the tiles."""

    def __init__(self, inputs: Inputs, job: Job) -> None:
        self.inputs, self.job = inputs, job
        self.tiles = tiles = Tiles(inputs, job)
        self.dtype, self.head = tiles.dtype, tiles.head
        self.finite = all(p is None or p.finite(job.columns) for p in (tiles.head, tiles.ref))
        # If one of these two is the only value requested, it is computed in place, in the fewest passes.
        plain = job.how == Divergence() and self.finite and not self.head.capped
        self.lean = job.names == ("logp",) or (job.names == ("divergence",) and plain)
        self.count = tiles.count

    def values(self) -> Values:
        """Compute the values only, each [R]."""
        found = []
        for _, index, hidden in self._parts():
            self.tiles.project(hidden, index)
            stats, _ = self._read(index, len(hidden))
            if self.job.token_loss is not None:
                stats = {"loss": self._close(stats, index, grad=False)[0]}
            found.append(stats)
        return self._joined(found)

    def directions(self) -> tuple[Values, Values]:
        """Compute the values [R], and ∂value/∂h [R, H] for each value that carries grad."""
        hidden = self.inputs.hidden
        shape, dtype = (self.count, hidden.shape[1]), _kept_dtype(hidden)
        kept = {name: hidden.new_empty(shape, dtype=dtype) for name in self.job.graded}
        found = []
        for part, index, hidden in self._parts():
            self.tiles.project(hidden, index)
            stats, factor = self._read(index, len(hidden), each=True)
            for name, tile in zip(self.job.graded, self.tiles.of(len(hidden)), strict=False):
                self._pull(tile, factor, kept[name][part])
            found.append(stats)
        return self._joined(found), kept

    def gradients(
        self, needs: tuple[bool, ...], coefs: Values | None
    ) -> tuple[Values, tuple[Tensor | None, ...], Values]:
        """Compute values, gradients and coefficients.

        Args:
            needs: which of the three gradients are wanted.
            coefs: [R] by name; None takes them from the `token_loss`.

        Returns:
            Values [R]; gradients of Σ coef · value for hidden [R, H], weight and bias; and the coefficients [R].
        """
        hidden, weight, bias = self.inputs.hidden, self.inputs.weight, self.inputs.bias
        types = [t if t is None else t.dtype if coefs else _kept_dtype(t) for t in (hidden, weight, bias)]
        d_hidden = hidden.new_empty(self.count, hidden.shape[1], dtype=types[0]) if needs[0] else None
        d_weight = weight.new_empty(weight.shape, dtype=self.dtype) if needs[1] else None
        d_bias = weight.new_zeros(weight.shape[0], dtype=self.dtype) if needs[2] else None
        found, given = [], []
        for part, index, rows in self._parts():
            self.tiles.project(rows, index)
            if coefs is None:
                stats, factor = self._read(index, len(rows), lean_slope=True)
                loss, weights = self._close(stats, index, grad=True)
                stats = {"loss": loss}
                if not self.lean:
                    self._read(index, len(rows), coefs=weights)
            else:
                weights = {name: c[part].to(self.dtype) for name, c in coefs.items()}
                stats, factor = self._read(index, len(rows), coefs=weights, lean_slope=True)
            found.append(stats)
            given.append(weights)
            tile = self.tiles.of(len(rows))[0][:, : self.head.size]
            if factor is not None:
                factor = factor * weights[self.job.names[0]][:, None]
            if d_hidden is not None:
                self._pull(tile, factor, d_hidden[part])
            if d_weight is not None:
                scaled = rows if factor is None else rows * factor
                self.head.accumulate(tile, scaled, d_weight, first=part.start == 0)
            if d_bias is not None:
                d_bias += (tile.sum(0) if factor is None else (factor.t() @ tile)[0]) * self.head.unit
        if d_weight is not None and not found:
            d_weight.zero_()
        grads = (
            d_hidden,
            None if d_weight is None else d_weight.to(types[1]),
            None if d_bias is None else d_bias.to(types[2]),
        )
        return self._joined(found), grads, self._joined(given, self.job.graded)

    def spread(self, values: Values) -> Values:
        """Scatter [R] to [N], 0.0 in rows left out."""
        rows, count = self.job.rows, self.inputs.hidden.shape[0]
        if rows is None:
            return values
        return {name: v.new_zeros(count).index_copy_(0, rows, v) for name, v in values.items()}

    def _parts(self) -> Iterator[tuple[slice, Any, Tensor]]:
        """Yield the indices of a tile among the R rows and among the N, and its hidden states [n, H]."""
        for start in range(0, self.count, max(1, self.tiles.rows)):
            part = slice(start, min(start + self.tiles.rows, self.count))
            index = part if self.job.rows is None else self.job.rows[part]
            yield part, index, self.inputs.hidden.detach()[index].to(self.dtype)

    def _pull(self, tile: Tensor, factor: Tensor | None, out: Tensor) -> None:
        """Compute out [n, H] <- the tile's slopes back through the head."""
        direct = out if out.dtype == self.dtype else out.new_empty(out.shape, dtype=self.dtype)
        self.head.pull(tile[:, : self.head.size], direct)
        if factor is not None:
            direct *= factor
        if direct is not out:
            out.copy_(direct)

    def _read(
        self,
        index: Any,
        rows: int,
        *,
        each: bool = False,
        coefs: Values | None = None,
        lean_slope: bool = False,
    ) -> tuple[Values, Tensor | None]:
        """Compute the values of the tile, and leave slopes in its buffers.

        They hold one slope for each graded value, or the first holds their sum weighted by `coefs`. A lean tile is
        overwritten with a slope without its factor [n, 1], which is returned.
        """
        targets = None if self.inputs.targets is None else self.inputs.targets[index][:, None]
        found, factors = [], []
        watched = None
        if self.job.observe is not None and (coefs is None or self.job.token_loss is None):  # once per tile
            watched = _numbers(index, self.inputs.hidden.device)
        for block in blocks(rows, self.job.columns, self.inputs.hidden.device):
            seen = None if watched is None else watched[block]
            target = None if targets is None else targets[block]
            if self.lean:
                stats, factor = self._lean(block, rows, target, seen, slope=each or lean_slope)
                found.append(stats)
                factors.append(factor)
                continue
            stats, slopes = self._full(block, rows, target, seen, self.job.graded if each else tuple(coefs or ()))
            found.append(stats)
            if each:
                for i, name in enumerate(self.job.graded):
                    self.tiles.buffer(i)[:rows][block] = slopes[name]
            elif coefs is not None:
                total = sum(slope.mul_(coefs[name][block, None]) for name, slope in slopes.items())
                self.tiles.buffers[0][:rows][block] = total
        return self._joined(found), torch.cat(factors) if factors else None

    def _lean(
        self, block: slice, rows: int, target: Tensor | None, seen: Tensor | None, *, slope: bool
    ) -> tuple[Values, Tensor]:
        z = self.tiles.buffers[0][:rows][block]
        if self.tiles.ref is not None:
            ref_z = self.tiles.buffers[1][:rows][block]
            self._observe(z + ref_z if self.tiles.apart else z, seen)
            divergence, factor = reverse_kl_in_place(z, ref_z, difference=self.tiles.apart)
            return {"divergence": divergence}, factor
        assert target is not None
        bend = self.head.cap_(z, slope=slope)
        self.head.exclude_(z)
        self._observe(z, seen)
        logp, factor = logp_in_place(z, target)
        if bend is not None:
            z *= bend
        return {"logp": logp}, factor

    def _observe(self, z: Tensor, seen: Tensor | None) -> None:
        if seen is not None and self.job.observe is not None:
            self.job.observe(z, seen)

    def _full(
        self, block: slice, rows: int, target: Tensor | None, seen: Tensor | None, graded: tuple[str, ...]
    ) -> tuple[Values, Values]:
        """Compute values and slopes of a block of rows; its products stay unchanged."""
        job, finite = self.job, self.finite
        z, ref_z, difference, bend = self.tiles.logits(block, rows, slope=bool(graded))
        self._observe(z, seen)
        policy = token_rows(z, target if "logp" in job.names else None)
        stats: Values = {}
        slopes: Values = {}
        if policy.logp is not None:
            stats["logp"] = policy.logp[:, 0]
        if "entropy" in job.names:
            value = entropy(policy, finite=finite)
            stats["entropy"] = value[:, 0]
            if "entropy" in graded:
                slopes["entropy"] = entropy_slope(policy, value, finite=finite)
        if "logp" in graded:
            assert target is not None
            slopes["logp"] = logp_slope(policy, target)
        if ref_z is not None:
            reference = token_rows(ref_z, target if "ref_logp" in job.names else None)
            if reference.logp is not None:
                stats["ref_logp"] = reference.logp[:, 0]
            if "divergence" in job.names:
                assert job.how is not None
                stats["divergence"], slope = compare(
                    job.how,
                    z,
                    ref_z,
                    policy=policy.softmax,
                    reference=reference.softmax,
                    difference=difference,
                    finite=finite,
                    slope="divergence" in graded,
                )
                if slope is not None:
                    slopes["divergence"] = slope
        if bend is not None:
            for slope in slopes.values():
                slope *= bend
        return {name: stats[name] for name in job.names}, slopes

    def _close(self, stats: Values, index: Any, *, grad: bool) -> tuple[Tensor, Values]:
        """Return the `token_loss` [n] of a tile, and its derivative by each graded value [n]."""
        assert self.job.token_loss is not None
        rows = _numbers(index, self.inputs.hidden.device)
        with torch.set_grad_enabled(grad):
            leaves = {n: v.detach().requires_grad_(grad and n in self.job.graded) for n, v in stats.items()}
            scores = TileScores(
                leaves.get("logp"), leaves.get("entropy"), leaves.get("ref_logp"), leaves.get("divergence"), rows
            )
            loss = self.job.token_loss(scores)
            if not isinstance(loss, Tensor) or loss.shape != rows.shape:
                found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"token_loss must return one loss per token, [{rows.numel()}], and returned {found}. "
                    "Sum or average the result of the fused call instead."
                )
            if not grad:
                return loss.detach(), {}
            if not loss.requires_grad:
                raise ValueError(
                    "token_loss returned a loss without grad: it must depend on the scores that it receives."
                )
            wanted = [leaves[name] for name in self.job.graded]
            slopes = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
        coefs = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, slopes, strict=True)]
        return loss.detach().to(self.dtype), dict(zip(self.job.graded, coefs, strict=True))

    def _joined(self, found: list[Values], names: tuple[str, ...] | None = None) -> Values:
        """Concatenate the pieces of a batch; empty if nothing is scored."""
        if not found:
            empty = self.inputs.hidden.new_empty(0, dtype=self.dtype)
            return dict.fromkeys(names or outputs(self.job), empty)
        return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}


def _numbers(index: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(index.start, index.stop, device=device) if isinstance(index, slice) else index


def _kept_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a stored gradient. fp16 would lose the small values, which loss scaling is meant to save."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def outputs(job: Job) -> tuple[str, ...]:
    return job.names if job.token_loss is None else ("loss",)
