"""refkl.kl on random tensors, compared with its formulas in fp64: value and gradient, in every dtype and layout.

The inputs include logits of 1e4, -inf, +inf and NaN, masks of every kind, and tensors that are not contiguous.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import plain
from support.hostile import examples
from torch import Tensor

from refkl import kl

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-18, torch.float64: 2**-40}
SEEDS = st.integers(0, 2**31)
KINDS = st.one_of(
    st.sampled_from([(kind, None) for kind in ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "tv")]),
    st.tuples(st.sampled_from(["amari", "alpha"]), st.sampled_from([-0.5, 0.01, 0.3, 0.5, 0.99, 1.5, 3.0])),
    st.tuples(st.just("renyi"), st.sampled_from([0.01, 0.5, 0.97, 1.02, 2.0, 4.0])),
)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return these values in some memory layout: contiguous, transposed, with gaps, or from an offset."""
    values = values.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "gaps", "offset"]))
    if layout == "transposed" and len(shape) > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "offset":
        flat = torch.cat([torch.full((3,), torch.nan, dtype=dtype), values.flatten()])
        return flat[3:].view(shape)
    return values.clone()


@st.composite
def logits(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype, *, near: Tensor | None = None) -> Tensor:
    """[rows, columns] of some scale, with a few entries replaced by extremes."""
    source = torch.Generator().manual_seed(draw(SEEDS))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 8.0, 60.0, 1e4]))
    z = scale * torch.randn(rows, columns, generator=source, dtype=torch.float64)
    if near is not None and draw(st.booleans()):
        z = near.double() + draw(st.sampled_from([0.0, 1e-4, 1e-2])) * torch.randn_like(z)
    extremes = draw(st.lists(st.sampled_from([-math.inf] * 6 + [1e4, -1e4, math.nan, math.inf]), max_size=3))
    for value in extremes:
        z[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = value
    return draw(strided((rows, columns), z, dtype))


def exact_divergence(z: Tensor, ref_z: Tensor, kind: str, weight: float, order: float | None) -> Tensor:
    """Return the divergence of one row of finite or -inf logits, from its definition, in fp64."""
    present = (z > -math.inf) | (ref_z > -math.inf)
    log_p, log_q = z[present].log_softmax(-1), ref_z[present].log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()

    def relative(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        some = log_a > -math.inf
        return (a[some] * (log_a[some] - log_b[some])).sum()

    if kind == "reverse_kl":
        return relative(p, log_p, log_q)
    if kind == "forward_kl":
        return relative(q, log_q, log_p)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))
        return weight * relative(p, log_p, log_m) + (1 - weight) * relative(q, log_q, log_m)
    if kind == "tv":
        return 0.5 * (p - q).abs().sum()
    power = {"chi2": 2.0, "hellinger": 0.5}.get(kind, order)
    assert power is not None
    both = (log_p > -math.inf) & (log_q > -math.inf)
    lost = ((log_q == -math.inf).any() and power > 1) or ((log_p == -math.inf).any() and power < 0)
    total = (power * log_p[both] + (1 - power) * log_q[both]).exp().sum()
    if lost:
        total = total + math.inf
    if kind == "hellinger":
        return 1 - total
    if kind == "chi2":
        return total - 1
    if kind == "renyi":
        logs = power * log_p[both] + (1 - power) * log_q[both]
        return (math.inf if lost else logs.logsumexp(-1)) / (power - 1) * torch.ones((), dtype=torch.float64)
    return (total - 1) / (power * (power - 1))


def valid(*rows: Tensor) -> bool:
    """Whether each row is a distribution: no NaN, no +inf, and at least one category."""
    return all(bool((~row.isnan()).all() and (row < math.inf).all() and (row > -math.inf).any()) for row in rows)


@examples(45)
@given(st.data())
def test_dense_divergences(data: st.DataObject) -> None:
    draw = data.draw
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    z = draw(logits(rows, columns, draw(DTYPES)))
    ref_z = draw(logits(rows, columns, draw(DTYPES), near=z))
    (kind, order), weight = draw(KINDS), draw(st.sampled_from([0.5, 0.01, 0.9]))
    z.requires_grad_()
    ref_z.requires_grad_(draw(st.booleans()))
    value = kl.divergence(z, ref_z, kind, weight=weight, order=order)
    fp64 = torch.float64 in (z.dtype, ref_z.dtype)
    assert value.dtype == (torch.float64 if fp64 else torch.float32) and value.shape == (rows,)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert slope.dtype == z.dtype and ref_z.grad is None
    for row in range(rows):
        check_row(value[row], slope[row], z[row], ref_z[row], kind, weight, order)


def underflows_at_a_hole(z: Tensor, ref_z: Tensor, tiny: float) -> bool:
    """Whether a probability that is 0 in the dtype of the maths stands where the other side has none at all."""
    p, q = z.softmax(-1), ref_z.softmax(-1)
    return bool(
        (
            ((ref_z == -math.inf) & (z > -math.inf) & (p < tiny))
            | ((z == -math.inf) & (ref_z > -math.inf) & (q < tiny))
        ).any()
    )


def check_row(
    value: Tensor, slope: Tensor, z: Tensor, ref_z: Tensor, kind: str, weight: float, order: float | None
) -> None:
    """Check a divergence and its gradient against the definition."""
    if not valid(z, ref_z):
        assert value.isnan() and slope.isnan().all()
        return
    half = slope.dtype == torch.float16 or slope.dtype.itemsize < value.dtype.itemsize == 8  # a slope can be too large
    assert value >= 0 and not slope.isnan().any() and (half or slope.isfinite().all())
    if underflows_at_a_hole(
        z.detach().double(), ref_z.detach().double(), 1e-38 if value.dtype != torch.float64 else 1e-300
    ):
        return
    leaf = z.detach().double().requires_grad_()
    truth = exact_divergence(leaf, ref_z.detach().double(), kind, weight, order)
    fp64 = value.dtype == torch.float64
    cap = 600.0 if fp64 else 60.0
    if kind in ("chi2", "amari", "alpha") and truth > math.exp(cap - 5):  # saturated
        assert value > 1e20
        return
    if truth.isinf():
        assert value.isinf()
        return
    size = max(1.0, *(float(t.detach()[t > -math.inf].abs().max()) for t in (z, ref_z)))
    steep = max(1.0, abs(order or 1.0))
    rounding = (1e-14 if fp64 else 5e-7) * size * steep
    torch.testing.assert_close(value.double(), truth.detach(), rtol=20 * rounding, atol=20 * rounding)
    (right,) = torch.autograd.grad(truth, leaf)
    if not right.isfinite().all():
        return
    close = 20 * rounding + ULP[slope.dtype]
    largest = max(1.0, float(right.abs().max()))
    if half:
        limit = torch.finfo(slope.dtype).max
        slope, right = (x.clamp(-limit, limit) for x in (slope, right))
    torch.testing.assert_close(slope.double(), right.double(), rtol=close, atol=close * largest)


@examples(20)
@given(st.data())
def test_top_k(data: st.DataObject) -> None:
    """The policy's k likeliest categories and a bucket: never above the exact value, and equal to it at k = V."""
    draw = data.draw
    columns = draw(st.integers(2, 9))
    z, ref_z = (draw(logits(2, columns, torch.float32)) for _ in range(2))
    (kind, order), k = draw(KINDS), draw(st.integers(1, 10))
    z.requires_grad_()
    coarse, whole = (kl.divergence(z, ref_z, kind, order=order, top_k=top_k) for top_k in (k, None))
    (slope,) = torch.autograd.grad(coarse.sum(), z)
    for row in range(2):
        if not valid(z[row], ref_z[row]):
            assert coarse[row].isnan() and slope[row].isnan().all()
            continue
        assert 0 <= coarse[row] <= whole[row] * (1 + 1e-2) + 1e-4 and slope[row].isfinite().all()
        if k >= columns:
            assert torch.equal(coarse[row], whole[row])
            continue
        best = z[row].detach().double().sort(descending=True).values
        if best[k - 1] - best[k] < 1e-2 or max(best.abs().max(), ref_z[row].abs().max()) > 30:
            continue  # the choice among equals is open; the definition below needs p and q that do not underflow
        leaf = z[row].detach().double().requires_grad_()
        truth = plain.divergence(leaf[None], ref_z[row].double()[None], kind, order=order, top_k=k)[0]
        (right,) = torch.autograd.grad(truth, leaf)
        if truth < 1e8:
            torch.testing.assert_close(coarse[row].double(), truth.detach(), rtol=2e-3, atol=1e-4)
            close = 2e-3 * max(1.0, float(right.abs().max()))
            torch.testing.assert_close(slope[row].double(), right, rtol=2e-3, atol=close)


LOGPS = st.sampled_from(
    [0.0, -1e-7, -1e-3, -0.5, -1.0, -3.0, -17.0, -40.0, -61.0, -100.0, -700.0, -1e4, -math.inf, math.nan]
)


@st.composite
def logps(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    values = draw(st.lists(LOGPS, min_size=rows * columns, max_size=rows * columns))
    return draw(strided((rows, columns), torch.tensor(values, dtype=torch.float64).view(rows, columns), dtype))


def bounded(value: Tensor, limit: float) -> Tensor:
    return value.clamp(-limit, limit)


def plain_estimate(d: Tensor, estimator: str, cap: float, max_log_ratio: float | None) -> Tensor:
    """Return the value of an estimator, in fp64, with the saturation that the docstring states."""
    d = bounded(d, math.exp(cap / 2))
    if max_log_ratio is not None:
        d = bounded(d, max_log_ratio)
    if estimator == "k3":
        return torch.expm1((-d).clamp(max=cap)) + d
    return {"k1": d, "k2": d * d / 2, "abs": d.abs()}[estimator]


@examples(45)
@given(st.data())
def test_estimates_with_the_reverse_kl_gradient(data: st.DataObject) -> None:
    draw = data.draw
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    logp, ref_logp, old_logp = (draw(logps(rows, columns, draw(DTYPES))) for _ in range(3))
    estimator, limit = draw(st.sampled_from(["k1", "k2", "k3", "abs"])), draw(st.sampled_from([None, 0.5, 20.0]))
    ratio, old = draw(st.sampled_from(["token", "prefix"])), draw(st.booleans())
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    mask = mask.view(rows, columns)
    ratio = ratio if old else "token"
    logp.requires_grad_()
    options: dict[str, Any] = {"mask": mask, "max_log_ratio": limit, "ratio": ratio}
    value = kl.estimate(logp, ref_logp, estimator, old_logp=old_logp if old else None, **options)
    used = [logp, ref_logp, old_logp] if old else [logp, ref_logp]
    fp64 = any(t.dtype == torch.float64 for t in used)
    cap = 600.0 if fp64 else 60.0
    weights = 1.0 + torch.arange(rows * columns, dtype=value.dtype).view(rows, columns)
    (slope,) = torch.autograd.grad((value * weights).sum(), logp)

    d = (logp.detach().double() - ref_logp.double()).masked_fill(~mask, 0.0)
    drift = (logp.detach().double() - old_logp.double() if old else torch.zeros_like(d)).masked_fill(~mask, 0.0)
    drift = bounded(drift, math.exp(cap / 2))
    weight = (drift.cumsum(-1) if ratio == "prefix" else drift).clamp(max=cap).exp()
    right = bounded(weight * plain_estimate(d, estimator, cap, limit), math.exp(cap)).masked_fill(~mask, 0.0)
    slopes = weight * d.masked_fill(d.isinf(), 0.0)
    assert (value[~mask] == 0).all() and (slope[~mask] == 0).all()
    # An exponent of 60 in fp32 is rounded by 4e-6, one of -1e4 by 1e-3. Each log-ratio has the dtype of its own inputs.
    exact = logp.dtype == torch.float64 or all(t.dtype == torch.float64 for t in used[1:])
    rounding, small = (1e-10, 1e-12) if exact else (1e-3, 1e-5)
    small *= max(1.0, float(weight.nan_to_num(0.0).max()))  # k3 of a small log-ratio is a difference
    torch.testing.assert_close(value.double(), right, rtol=rounding, atol=small, equal_nan=True)
    slopes = torch.where(mask, slopes * weights.double(), 0.0)
    largest = torch.finfo(slope.dtype).max
    fits = ~(slopes.abs() > largest / 2)
    close = {"rtol": rounding + ULP[slope.dtype], "atol": 1e-5}
    torch.testing.assert_close(slope.double()[fits], slopes[fits], equal_nan=True, **close)


@examples(20)
@given(st.data())
def test_estimates_differentiated_by_autograd(data: st.DataObject) -> None:
    """Ordinary log-ratios: the derivative of the formula. Extremes: finite, NaN where an input is NaN, else 0."""
    draw = data.draw
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    estimator, ratio = draw(st.sampled_from(["k1", "k2", "k3", "abs"])), draw(st.sampled_from(["token", "prefix"]))
    source = torch.Generator().manual_seed(draw(SEEDS))
    scale = draw(st.sampled_from([1e-4, 0.1, 3.0]))
    made = (scale * torch.randn(rows, columns, generator=source, dtype=torch.float64) for _ in range(3))
    logp, ref_logp, old_logp = made
    leaf = logp.clone().requires_grad_()
    mask = torch.rand(rows, columns, generator=source) < 0.7
    logp = draw(strided((rows, columns), logp, torch.float64)).requires_grad_()
    options: dict[str, Any] = {"old_logp": old_logp, "mask": mask, "ratio": ratio, "gradient": "autograd"}
    value = kl.estimate(logp, ref_logp, estimator, **options)
    drift = (leaf - old_logp).masked_fill(~mask, 0.0)
    weight = (drift.cumsum(-1) if ratio == "prefix" else drift).exp()
    right = (weight * plain_estimate(leaf - ref_logp, estimator, 600.0, None)).masked_fill(~mask, 0.0)
    torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-13)
    slopes = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((value, logp), (right, leaf)))
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)

    logp, ref_logp = (draw(logps(rows, columns, torch.float32)) for _ in range(2))
    logp.requires_grad_()
    value = kl.estimate(logp, ref_logp, estimator, mask=mask, gradient="autograd")
    (slope,) = torch.autograd.grad(value.sum(), logp)
    spoilt = (logp - ref_logp).isnan() & mask
    assert torch.equal(value.isnan(), spoilt) and torch.equal(slope.isnan(), spoilt)
    assert value[~spoilt].isfinite().all() and slope[~spoilt].isfinite().all()


@examples(30)
@given(st.data())
def test_token_logp(data: st.DataObject) -> None:
    draw = data.draw
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    z = draw(logits(rows, columns, draw(DTYPES))).requires_grad_()
    targets = torch.tensor(draw(st.lists(st.integers(0, columns - 1), min_size=rows, max_size=rows)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    temperature = draw(st.sampled_from([1.0, 0.1, 3.0]))
    found = kl.token_logp(z, targets, temperature=temperature, entropy=True, mask=mask)
    assert found.entropy is not None
    slopes = (
        torch.autograd.grad(found.logp.sum(), z, retain_graph=True)[0],
        torch.autograd.grad(found.entropy.sum(), z)[0],
    )
    for row in range(rows):
        values = found.logp[row], found.entropy[row]
        if not mask[row]:
            assert all(x == 0 for x in values) and all((s[row] == 0).all() for s in slopes)
            continue
        if not valid(z[row]):
            assert all(x.isnan() for x in values)
            continue
        leaf = (z[row].detach().double() / temperature)[None].requires_grad_()
        rights = plain.logp(leaf, targets[row : row + 1]), plain_entropy(leaf)
        finite = z[row].detach()[z[row] > -math.inf].double() / temperature
        size = max(1.0, float(finite.abs().max()))
        close = (1e-13 if z.dtype == torch.float64 else 1e-6) * size
        for value, slope, right in zip(values, slopes, rights, strict=True):
            torch.testing.assert_close(value.double(), right[0].detach(), rtol=close, atol=close)
            if right.isfinite().all():
                expected = torch.autograd.grad(right.sum(), leaf)[0][0] / temperature
                rounding = 30 * close + ULP[slope.dtype]
                largest = max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(slope[row].double(), expected, rtol=rounding, atol=rounding * largest)


def plain_entropy(z: Tensor) -> Tensor:
    """[N]; without the categories that are excluded, whose 0 · log 0 has no derivative."""
    log_p = z[:, z[0] > -math.inf].log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@st.composite
def head(draw: st.DrawFn, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [rows, width], weight [columns, width], bias [columns] or None."""
    width = draw(st.integers(1, 8))
    source = torch.Generator().manual_seed(draw(SEEDS))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    hidden = draw(strided((rows, width), torch.randn(rows, width, generator=source) * scale, draw(DTYPES)))
    weight = draw(strided((columns, width), torch.randn(columns, width, generator=source), draw(DTYPES)))
    if not draw(st.booleans()):
        return hidden, weight, None
    bias = torch.randn(columns, generator=source)
    if columns > 1 and draw(st.booleans()):
        bias[draw(st.integers(0, columns - 1))] = -math.inf
    return hidden, weight, draw(strided((columns,), bias, draw(DTYPES)))


@examples(45)
@given(st.data())
def test_fused_heads(data: st.DataObject) -> None:
    """linear_pair against plain maths: two heads, vocabularies of two sizes, masks, soft caps, both gradients."""
    draw = data.draw
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(2, 20))
    hidden, weight, bias = draw(head(rows, columns))
    ref_columns = draw(st.sampled_from([columns, columns, columns + 3]))
    ref_hidden, ref_weight, ref_bias = draw(head(rows, ref_columns))
    if ref_columns == columns and draw(st.booleans()):  # as with LoRA
        ref_weight, ref_bias = weight, bias
        ref_hidden = hidden.detach() + 1e-2 * torch.randn(hidden.shape).to(hidden.dtype)
    (kind, order), top_k = draw(KINDS), None
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    targets = torch.tensor(draw(st.lists(st.integers(0, columns - 1), min_size=rows, max_size=rows)))
    scaling: dict[str, Any] = {
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.0])),
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
    }
    assume(scaling["softcap"] is None or (bias is None and ref_bias is None))  # tanh(-inf) is finite
    targets = torch.where(mask, targets, -100)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(draw(st.booleans()))]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    size = None if ref_columns == columns else ref_columns
    options: dict[str, Any] = {"order": order, "top_k": top_k, "vocab_size": size, "chunk": draw(st.integers(1, 7))}
    found = kl.linear_pair(
        *(hidden, weight, targets, ref_hidden, ref_weight, kind),
        **{"bias": bias, "ref_bias": ref_bias, "mask": mask, "entropy": True, **scaling, **options},
    )
    z = plain.logits(hidden, weight, bias, **scaling)
    z = torch.cat([z, z.new_full((rows, ref_columns - columns), -math.inf)], -1)
    ref_z = plain.logits(ref_hidden, ref_weight, ref_bias, **scaling).detach()
    some = mask.nonzero()[:, 0].tolist()
    truths = {
        "logp": [plain.logp(z[r : r + 1], targets[r : r + 1])[0] for r in some],
        "entropy": [plain_entropy(z[r : r + 1])[0] for r in some],
        "ref_logp": [plain.logp(ref_z[r : r + 1], targets[r : r + 1])[0] for r in some],
        "divergence": [exact_divergence(z[r], ref_z[r], kind, 0.5, order) for r in some],
    }
    fp64 = found.logp.dtype == torch.float64
    for name, truth in truths.items():
        value = getattr(found, name)
        assert (value[~mask] == 0).all()
        if not some:
            continue
        right = torch.stack(truth)
        if right.detach().nan_to_num(posinf=0.0, neginf=0.0).abs().max() > 1e8:
            continue
        close = {"rtol": 1e-9, "atol": 1e-9} if fp64 else {"rtol": 3e-4, "atol": 3e-4}
        torch.testing.assert_close(value[mask].double(), right.detach(), **close)
        if name == "ref_logp" or not right.isfinite().all() or not right.requires_grad:
            continue
        expected = torch.autograd.grad(right.sum(), leaves, retain_graph=True)
        slopes = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        for leaf, slope, want in zip(leaves, slopes, expected, strict=True):
            if not want.isfinite().all() or want.abs().max() > 1e4:
                continue
            rounding = ULP[leaf.dtype] + (1e-8 if fp64 else 3e-4)
            largest = max(1.0, float(want.abs().max()))
            torch.testing.assert_close(slope.double(), want.double(), rtol=rounding, atol=rounding * largest)


@examples(30)
@given(st.data())
def test_aggregation_and_rewards(data: st.DataObject) -> None:
    """Every mode and form against loops over rows; what the mask leaves out is ignored, NaN and inf too."""
    draw = data.draw
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    mask = mask.view(rows, columns)
    source = torch.Generator().manual_seed(draw(SEEDS))
    values = torch.randn(rows, columns, generator=source, dtype=torch.float64)
    values = values.masked_fill(~mask, draw(st.sampled_from([0.0, math.nan, math.inf])))
    values = draw(strided((rows, columns), values, torch.float64)).requires_grad_()
    mode, length = draw(st.sampled_from(kl.AGGREGATIONS)), draw(st.sampled_from([1.0, 7.5]))
    constant = length if mode == "seq-mean-token-sum-norm" else None
    found = kl.aggregate(values, mask, mode, length=constant)
    lists = [row[row_mask].tolist() for row, row_mask in zip(values.detach(), mask, strict=True)]
    lists = [row for row in lists if row]
    sequences, tokens = max(1, len(lists)), max(1, sum(map(len, lists)))
    right = {
        "token-mean": sum(map(sum, lists)) / tokens,
        "token-sum": sum(map(sum, lists)),
        "seq-mean-token-sum": sum(map(sum, lists)) / sequences,
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in lists) / sequences,
        "seq-mean-token-sum-norm": sum(sum(row) / length for row in lists) / sequences,
    }[mode]
    assert math.isclose(float(found.detach()), right, rel_tol=1e-12, abs_tol=1e-12)
    (slope,) = torch.autograd.grad(found, values)
    assert (slope[~mask] == 0).all() and (slope[mask] > 0).all()

    form, gamma = draw(
        st.sampled_from([("token", 1.0), ("sequence", 1.0), ("return_to_go", 1.0), ("return_to_go", 0.9)])
    )
    placed = kl.place_rewards(values, mask, form, gamma=gamma)
    for row in range(rows):
        scored = mask[row].nonzero()[:, 0].tolist()
        own = values[row].detach()[mask[row]].tolist()
        for number, at in enumerate(scored):
            last = number == len(scored) - 1
            expected = {
                "token": own[number],
                "sequence": sum(own) if last else 0.0,
                "return_to_go": sum(gamma**n * x for n, x in enumerate(own[number:])),
            }[form]
            assert math.isclose(float(placed[row, at]), expected, rel_tol=1e-12, abs_tol=1e-12)
        assert (placed[row][~mask[row]] == 0).all()
