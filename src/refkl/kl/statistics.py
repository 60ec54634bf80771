"""The sums and counts behind the metrics of a step: one vector that can be added over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refkl.kl.estimators import saturated
from refkl.kl.histogram import BINS, Histogram, count_log_ratios

MEASURED = ("k1", "k2", "k3")
"""The estimators that are always measured, whichever one the penalty uses."""
_SUMS = ("kl", *MEASURED, "exact", "exact_tokens", "tokens", "sequences", "saturated", "clipped")
SIZE = len(_SUMS) + BINS + 1
"""Length of the vector: sums over tokens, the bins of the log-ratios, and the largest |log-ratio|, which is not a
sum."""


def statistics(
    per_token: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    *,
    estimates: Sequence[Tensor],
    exact: bool,
    max_log_ratio: float | None,
) -> Tensor:
    """Compute the statistics of one micro-batch.

    Args:
        per_token: [B, T] nats, the KL of each token; 0.0 where the mask is False, as in all of these tensors.
        log_ratio: [B, T] nats.
        mask: [B, T], True = counts.
        estimates: [B, T] nats each, those of MEASURED.
        exact: True if `per_token` is the exact divergence.
        max_log_ratio: limit beyond which a log-ratio was clamped.

    Returns:
        [SIZE] fp64 on the CPU.
    """
    tokens, none = mask.sum(), mask.new_zeros(())
    clipped = log_ratio.abs() > (torch.inf if max_log_ratio is None else max_log_ratio)
    sums = [per_token.sum(), *(values.sum() for values in estimates)]
    sums += [sums[0], tokens] if exact else [none, none]
    sums += [tokens, mask.any(-1).sum(), (saturated(log_ratio) & mask).sum(), (clipped & mask).sum()]
    peak = log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(())
    parts = [torch.stack([x.to(per_token.dtype) for x in sums]), count_log_ratios(log_ratio, mask), peak[None]]
    return torch.cat([part.to(per_token.dtype) for part in parts]).to("cpu", torch.float64)


def exact_statistics(divergence: Tensor, mask: Tensor) -> Tensor:
    """Return the vector [SIZE] of a micro-batch whose exact divergence, [B, T] nats, was measured beside an
    estimate."""
    stats = torch.zeros(SIZE, dtype=torch.float64)
    measured = divergence.detach()[mask.bool()]
    stats[_SUMS.index("exact")], stats[_SUMS.index("exact_tokens")] = float(measured.sum()), measured.numel()
    return stats


def merged(window: list[Tensor]) -> Tensor:
    """Merge the vectors [SIZE] of all micro-batches. An empty window is a step in which nothing was scored."""
    stacked = torch.stack([*window, torch.zeros(SIZE, dtype=torch.float64)])
    return torch.cat([stacked[:, :-1].sum(0), stacked[:, -1:].max(0).values])


def with_nan(stats: Tensor) -> Tensor:
    """Restore NaN in a vector [SIZE] whose maximum over ranks may have dropped it: a log-ratio that is NaN is in no
    bin."""
    missing = stats[len(_SUMS) : -1].sum() < stats[_SUMS.index("tokens")]
    return torch.cat([stats[:-1], torch.where(missing, torch.nan, stats[-1:])])


def counted(stats: Tensor) -> tuple[int, int]:
    """Return the numbers of tokens and of sequences."""
    return int(stats[_SUMS.index("tokens")]), int(stats[_SUMS.index("sequences")])


def histogram_of(stats: Tensor) -> Histogram:
    """Return the histogram of the log-ratios."""
    return Histogram(tuple(int(count) for count in stats[len(_SUMS) : -1].tolist()), stats[-1].item())


def metrics_of(stats: Tensor, coef: float, target: float | None) -> dict[str, float]:
    """Return the metrics by the names they are logged under; docs/metrics.md describes each."""
    sums = dict(zip(_SUMS, stats.tolist(), strict=False))
    tokens, histogram = max(sums["tokens"], 1.0), histogram_of(stats)
    metrics = {"kl": sums["kl"] / tokens, "kl/sequence": sums["kl"] / max(sums["sequences"], 1.0)}
    metrics |= {f"kl/{name}": sums[name] / tokens for name in MEASURED}
    if sums["exact_tokens"]:
        metrics["kl/exact"] = sums["exact"] / sums["exact_tokens"]
    metrics |= quantiles_of(histogram)
    metrics |= {f"kl/{name}": sums[name] / tokens for name in ("saturated", "clipped")}
    return {**metrics, "kl/coef": coef, **({} if target is None else {"kl/target": target})}


def quantiles_of(histogram: Histogram) -> dict[str, float]:
    """Return the metrics that are not means, in nats: the largest log-ratio of all tokens and the quantiles."""
    some = histogram.tokens > 0 or histogram.largest != 0.0
    found = {"kl/max": histogram.largest, "kl/p99": histogram.quantile(0.99, magnitude=True) if some else 0.0}
    for percent in (1, 50, 99):
        found[f"kl/log_ratio/p{percent:02}"] = histogram.quantile(percent / 100) if some else 0.0
    return found
