"""The log-ratios' histogram, and what the metrics read from it: against the raw values."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from refkl import KLConfig, KLPenalty, TokenScores, kl
from refkl.kl import Histogram
from refkl.kl.histogram import BINS, MAGNITUDES, count_log_ratios

QUANTILES = (0.0, 0.01, 0.1, 0.37, 0.5, 0.9, 0.99, 1.0)


def histogram(d: Tensor, mask: Tensor | None = None) -> Histogram:
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else mask
    return Histogram(tuple(count_log_ratios(d, mask).tolist()), float(d[mask].abs().max()))


def plain_bin(value: float) -> int:
    """By a walk over the edges: the edge that is further from 0 belongs to a bin, and beyond the last is the last."""
    side = next((i for i, edge in enumerate(MAGNITUDES) if abs(value) <= edge), len(MAGNITUDES) - 1)
    return (BINS - 1) // 2 + (side if value > 0 else -side)


def width_at(value: float, *, magnitude: bool = False) -> float:
    """Of the bin that holds a value; of the zero bin's, nothing."""
    at = plain_bin(abs(value) if magnitude else value)
    return Histogram.edges[at + 1] - Histogram.edges[at]


def test_bins_are_symmetric_and_logarithmic() -> None:
    edges = Histogram.edges
    assert len(edges) == BINS + 1 and list(edges) == sorted(edges) and [-x for x in reversed(edges)] == list(edges)
    assert edges.count(0.0) == 2 and edges[-1] == 1000.0 and min(x for x in edges if x > 0) == 1e-5
    ratios = [b / a for a, b in pairwise(MAGNITUDES[1:])]
    assert len(ratios) == 80 and min(ratios) > 1.24 and max(ratios) <= 1.281


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_value_is_in_its_bin(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-30, -1e-30, 9.9e-6, 0.0123, -0.0123, 1.3, -1.3, 999.0, 1001.0, 1e30, math.inf, -math.inf]
    on_an_edge = [sign * edge for edge in MAGNITUDES for sign in (1, -1)]
    d = torch.tensor([*values, *on_an_edge, math.nan, 5.0], dtype=dtype)
    mask = torch.ones_like(d, dtype=torch.bool)
    mask[-1] = False
    expected = [0] * BINS
    for value in [*values, *on_an_edge]:
        expected[plain_bin(value)] += 1
    assert count_log_ratios(d, mask).tolist() == expected


@pytest.mark.parametrize("scale", [1e-4, 0.05, 3.0])
@pytest.mark.parametrize("kind", ["normal", "heavy", "many zeros", "few"])
def test_quantiles_are_torchs_within_the_width_of_a_bin(kind: str, scale: float) -> None:
    d = torch.randn(7 if kind == "few" else 5000, dtype=torch.float64)
    if kind == "heavy":
        d = d.sign() * d.abs().exp().pow(1.5).sub(1)
    if kind == "many zeros":
        d[torch.rand_like(d) < 0.8] = 0.0
    d *= scale
    found = histogram(d)
    assert found.tokens == d.numel()
    for q in QUANTILES:
        for magnitude, values in ((False, d), (True, d.abs())):
            right = torch.quantile(values, q).item()
            # Between two tokens torch interpolates, and each may be off by the width of its bin.
            near = [torch.quantile(values, q, interpolation=side).item() for side in ("lower", "higher")]
            width = max(width_at(value, magnitude=magnitude) for value in near)
            assert abs(found.quantile(q, magnitude=magnitude) - right) <= width + 1e-15, (q, magnitude)
    assert found.quantile(1.0, magnitude=True) <= found.largest


def test_quantiles_at_the_ends() -> None:
    assert histogram(torch.zeros(3)).quantile(0.99) == 0.0
    one = histogram(torch.tensor([-2.0]))
    assert one.quantile(0.01) == one.quantile(0.99) == pytest.approx(-1.8) and one.largest == 2.0
    far = histogram(torch.tensor([math.inf, -math.inf, 0.0]))
    assert far.quantile(1.0) < 1000.0 and far.quantile(0.5) == 0.0 and far.largest == math.inf
    assert math.isnan(Histogram(one.counts, math.nan).quantile(0.5))
    assert math.isnan((one + Histogram(one.counts, math.nan)).largest)
    with pytest.raises(ValueError, match="counts no tokens"):
        Histogram((0,) * BINS, 0.0).quantile(0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 99"):
        one.quantile(99)


def test_counts_add_up_and_go_through_json() -> None:
    d = torch.randn(4, 500) * torch.tensor([[1e-3], [0.1], [1.0], [30.0]])
    whole = histogram(d)
    parts = [histogram(row) for row in d]
    assert parts[0] + parts[1] + parts[2] + parts[3] == whole
    kept = json.loads(json.dumps(whole.trimmed()))
    assert len(kept["edges"]) == len(kept["counts"]) + 1 and kept["counts"][0] and kept["counts"][-1]
    first = Histogram.edges.index(kept["edges"][0])
    assert tuple(kept["counts"]) == whole.counts[first : first + len(kept["counts"])]
    assert sum(kept["counts"]) == 2000 and kept["edges"] == list(Histogram.edges[first:][: len(kept["edges"])])
    assert histogram(torch.zeros(5)).trimmed() == {"edges": [0.0, 0.0], "counts": [5]}
    assert Histogram((0,) * BINS, 0.0).trimmed() == {"edges": [], "counts": []}


# in the penalty


def scores(logp: Tensor, *, grad: bool = True) -> TokenScores:
    return TokenScores(logp.clone().requires_grad_(grad))


def plain(d: Tensor, weight: Tensor | float = 1.0) -> dict[str, float]:
    """In fp64, on the log-ratios of the tokens that count."""
    d = d.double()
    values = {"kl/k1": d, "kl/k2": d * d / 2, "kl/k3": torch.expm1(-d) + d}
    return {name: (weight * value).mean().item() for name, value in values.items()}


def batches() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, ref, old = (-3 * torch.rand(8, 40) for _ in range(3))
    mask = torch.rand(8, 40) < 0.6
    mask[3] = False
    logp[0, :9], mask[0, :9] = ref[0, :9], True
    return logp, ref, old, mask


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "exact"])
@pytest.mark.parametrize("calls", [1, 4])
def test_a_step_against_the_raw_log_ratios(estimator: str, calls: int) -> None:
    logp, ref, _, mask = batches()
    penalty = KLPenalty(KLConfig(estimator=estimator))  # type: ignore[arg-type]
    exact = torch.rand(8, 40)
    for rows in torch.arange(8).chunk(calls):
        given = {"divergence": exact[rows].requires_grad_()} if estimator == "exact" else {}
        output = penalty(scores(logp[rows]), TokenScores(ref[rows]), mask[rows], **given)  # type: ignore[arg-type]
        assert output.metrics.keys() == KEYS | ({"kl/exact"} if given else set())
    found, d = penalty.step(), (logp - ref)[mask]
    for name, right in plain(d).items():
        assert found[name] == pytest.approx(right, rel=1e-5)
    if estimator == "exact":
        assert found["kl/exact"] == found["kl"] == pytest.approx(exact[mask].mean().item(), rel=1e-5)
    elif estimator != "abs":
        assert found["kl"] == pytest.approx(found[f"kl/{estimator}"], rel=1e-6)
    assert found["kl/max"] == d.abs().max()
    assert penalty.histogram == histogram(d)
    for name, values, q in (
        ("kl/p99", d.abs(), 0.99),
        ("kl/log_ratio/p01", d, 0.01),
        ("kl/log_ratio/p50", d, 0.5),
        ("kl/log_ratio/p99", d, 0.99),
    ):
        right = torch.quantile(values, q).item()
        assert abs(found[name] - right) <= 1.3 * width_at(right), name
    assert penalty.step() == {} and penalty.histogram is None


KEYS = {
    "kl", "kl/sequence", "kl/k1", "kl/k2", "kl/k3", "kl/max", "kl/p99", "kl/log_ratio/p01", "kl/log_ratio/p50",
    "kl/log_ratio/p99", "kl/saturated", "kl/clipped", "kl/coef",
}  # fmt: skip


@pytest.mark.parametrize("ratio", ["token", "prefix"])
def test_estimates_are_weighed_as_the_penalty_is(ratio: str) -> None:
    logp, ref, old, mask = batches()
    old = logp - 0.1 * old
    penalty = KLPenalty(KLConfig(estimator="k3", ratio=ratio))  # type: ignore[arg-type]
    found = penalty(scores(logp), TokenScores(ref), mask, old_logp=old).metrics
    drift = ((logp - old) * mask).double()
    weight = (drift.cumsum(-1) if ratio == "prefix" else drift).exp()[mask]
    for name, right in plain((logp - ref)[mask], weight).items():
        assert found[name] == pytest.approx(right, rel=1e-5)
    assert found["kl"] == found["kl/k3"]


def test_estimates_are_not_clamped() -> None:
    logp, ref, _, mask = batches()
    found = KLPenalty(KLConfig(max_log_ratio=0.5))(scores(logp), TokenScores(ref), mask).metrics
    d = (logp - ref)[mask]
    for name, right in plain(d).items():
        assert found[name] == pytest.approx(right, rel=1e-5)
    clamped = d.clamp(-0.5, 0.5)
    assert found["kl"] == pytest.approx((torch.expm1(-clamped) + clamped).mean().item(), rel=1e-5)


def test_several_references_are_measured_as_their_mixture() -> None:
    logp, ref, other, mask = batches()
    penalty = KLPenalty(KLConfig(reference_weights=[0.3, 0.7], exact_every=1))
    penalty(scores(logp), [TokenScores(ref), TokenScores(other)], mask)
    penalty.add_exact([ref.abs(), other.abs()], mask)
    d = (logp - 0.3 * ref - 0.7 * other)[mask]
    found = penalty.step()
    for name, right in plain(d).items():
        assert found[name] == pytest.approx(right, rel=1e-5)
    assert penalty.histogram is not None and penalty.histogram.tokens == mask.sum()
    assert found["kl/max"] == pytest.approx(d.abs().max().item())
    assert found["kl/exact"] == pytest.approx((0.3 * ref.abs() + 0.7 * other.abs())[mask].mean().item(), rel=1e-5)


def test_infinite_and_huge_log_ratios_are_counted_and_leave_the_metrics_finite() -> None:
    d = torch.tensor([[math.inf, -math.inf, 1e30, -1e30, 0.0, 0.5]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    penalty = KLPenalty()
    penalty(scores(d), TokenScores(torch.zeros_like(d)), mask)
    found = penalty.step()
    assert found.pop("kl/max") == math.inf
    assert all(math.isfinite(value) for value in found.values())
    # exp is capped at 60, and a log-ratio that is squared at exp(30)
    largest = math.exp(30)
    assert found["kl/k2"] == pytest.approx(4 * largest**2 / 2 / 5, rel=1e-4)
    assert found["kl/k3"] == pytest.approx((2 * math.exp(60)) / 5, rel=1e-4)
    assert 900 < found["kl/p99"] <= 1000 and found["kl/log_ratio/p50"] == 0.0
    assert penalty.histogram is not None
    assert penalty.histogram.counts[0] == penalty.histogram.counts[-1] == 2 and penalty.histogram.tokens == 5


def test_nothing_scored() -> None:
    penalty = KLPenalty()
    output = penalty(scores(torch.randn(2, 3)), TokenScores(torch.randn(2, 3)), torch.zeros(2, 3))
    assert output.metrics.keys() == KEYS and not any(v for k, v in output.metrics.items() if k != "kl/coef")
    assert penalty.step() == {} and penalty.histogram is None
    with pytest.raises(ValueError, match=r"shape \[0, 3\], which hold no token"):
        penalty(scores(torch.zeros(0, 3)), TokenScores(torch.zeros(0, 3)), torch.zeros(0, 3))


def test_a_log_ratio_that_is_no_number_shows() -> None:
    found = KLPenalty()(scores(torch.tensor([[math.nan, 1.0]])), TokenScores(torch.zeros(1, 2)), torch.ones(1, 2))
    assert all(math.isnan(found.metrics[name]) for name in ("kl", "kl/max", "kl/p99", "kl/log_ratio/p50"))


def test_a_log_ratio_of_one_rank_that_is_no_number_shows_on_all() -> None:
    """The maximum over ranks may come without it: how it treats NaN is up to the backend."""

    class Dropping(Ranks):
        def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
            return super().reduce(tensor, reduction).nan_to_num(nan=1.0) if reduction == "max" else tensor

    penalty = KLPenalty()
    penalty(scores(torch.tensor([[math.nan, 1.0]])), TokenScores(torch.zeros(1, 2)), torch.ones(1, 2))
    found = penalty.step(Dropping())  # type: ignore[arg-type]
    assert all(math.isnan(found[name]) for name in ("kl", "kl/sequence", "kl/k1", "kl/max", "kl/p99"))


class Ranks:
    """Stands for an accelerator: reduces with what another rank brings along."""

    def __init__(self, other: KLPenalty | None = None) -> None:
        self.num_processes, self.device = 2, torch.device("cpu")
        self.sent: list[Tensor] = []
        self.theirs = other

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        self.sent.append(tensor)
        if self.theirs is None:
            return tensor
        other = self.theirs[len(self.sent) - 1]  # type: ignore[index]
        return tensor + other if reduction == "sum" else torch.maximum(tensor, other)


def test_counts_beyond_24_bits_survive_the_reduce() -> None:
    """In fp32, 2^24 + 1 is 2^24."""
    other, mine = Ranks(), KLPenalty()
    theirs = KLPenalty()
    for penalty, value in ((theirs, 2.0), (mine, 1.0)):
        penalty(scores(torch.full((1, 1), value)), TokenScores(torch.zeros(1, 1)), torch.ones(1, 1))
    theirs._window[0] *= 2**24
    theirs.step(other)  # type: ignore[arg-type]
    found = mine.step(Ranks(other.sent))  # type: ignore[arg-type]
    assert mine.histogram is not None and mine.histogram.tokens == 2**24 + 1
    assert found["kl/k1"] == (2 * 2**24 + 1) / (2**24 + 1) and len(other.sent) == 2


# the exact KL beside an estimate


def test_which_steps_are_measured_and_that_none_is_forgotten() -> None:
    logp, ref, _, mask = batches()
    penalty, due, found = KLPenalty(KLConfig(exact_every=3)), [], []
    exact = torch.rand(8, 40)
    for _ in range(7):
        due.append(penalty.exact_due)
        for rows in (slice(0, 5), slice(5, 8)):
            if penalty.exact_due:
                penalty.add_exact(exact[rows].masked_fill(~mask[rows], math.nan), mask[rows])
                assert not penalty.exact_due  # one micro-batch of the step
            penalty(scores(logp[rows]), TokenScores(ref[rows]), mask[rows])
        found.append(penalty.step())
    assert due == [False, False, True, False, False, True, False]
    assert ["kl/exact" in metrics for metrics in found] == due
    assert found[2]["kl/exact"] == pytest.approx(exact[:5][mask[:5]].mean().item(), rel=1e-5)
    assert found[2]["kl"] == found[1]["kl"]

    again = KLPenalty(KLConfig(exact_every=3))
    again.load_state_dict(json.loads(json.dumps(penalty.state_dict())))
    for number in (8, 9):
        assert again.exact_due == (number == 9)
        penalty = again
        penalty(scores(logp), TokenScores(ref), mask)
        if number == 8:
            penalty.step()
    with pytest.raises(ValueError, match=r"kl.exact_every 3 asks for the exact KL.*call penalty.add_exact"):
        penalty.step()
    with pytest.raises(ValueError, match=r"divergence has shape \[8, 1\]"):
        penalty.add_exact(exact[:, :1], mask)


def test_a_step_in_which_nothing_was_scored_asks_for_nothing() -> None:
    penalty = KLPenalty(KLConfig(exact_every=1))
    assert penalty.exact_due and penalty.step() == {}
    # Between two rollouts a penalty in the reward scores nothing, and the policy is trained all the same.
    penalty.add_exact(torch.tensor([[0.5, 9.0, 1.0]]), torch.tensor([[True, False, True]]))
    assert penalty.step() == {"kl/exact": 0.75} and penalty.histogram is None


def test_exact_every_has_to_make_sense() -> None:
    with pytest.raises(ValueError, match="exact_every counts optimizer steps and must be at least 1, got 0"):
        KLConfig(exact_every=0)
    with pytest.raises(ValueError, match=r"exact_every has no use with estimator 'exact'"):
        KLConfig(exact_every=2, estimator="exact")


def test_the_target_is_a_metric_where_there_is_one() -> None:
    policy, ref, mask = scores(torch.randn(2, 3)), TokenScores(torch.randn(2, 3)), torch.ones(2, 3)
    for options in ({"controller": "dual"}, {"controller": "adaptive", "horizon": 100}):
        penalty = KLPenalty(KLConfig(target=0.7, **options))  # type: ignore[arg-type]
        assert penalty(policy, ref, mask).metrics["kl/target"] == penalty.step()["kl/target"] == 0.7
    assert "kl/target" not in KLPenalty()(policy, ref, mask).metrics
    assert kl.FixedKL(0.1).target is None
