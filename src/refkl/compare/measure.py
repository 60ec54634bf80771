"""Divergence of two models at each token, over the whole vocabulary, and its means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from refkl.backend import evaluating
from refkl.compare.intervals import Mean, ratio_mean
from refkl.compare.load import vocabulary
from refkl.compare.samples import Watch, unwatched
from refkl.compare.texts import Text
from refkl.kl import DIVERGENCES, estimate
from refkl.kl.divergence_rows import Divergence
from refkl.reference import Reference, score_pair
from refkl.types import PairScores, TokenBatch

ORDERED = ("amari", "alpha", "renyi")
"""Kinds that take an order."""
ESTIMATES = ("k1", "k3")
Values = list[NDArray[np.float64]]
"""One number per scored token, for each text."""


@dataclass(frozen=True)
class TokenMean:
    """The mean over all occurrences of a token."""

    token: int
    count: int
    mean: float
    """Mean divergence or estimate, in nats."""
    log_ratio: float
    """Mean of log p_policy - log p_reference of the token itself, nats."""


@dataclass(frozen=True)
class PositionMean:
    """The mean over a range of positions in a completion."""

    first: int
    """First position of the range, counted from 1."""
    last: int
    tokens: int
    sequences: int
    mean: Mean


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of a comparison: values of each token, and means with their intervals."""

    texts: list[Text]
    kinds: tuple[str, ...]
    """The exact divergences."""
    estimates: tuple[str, ...]
    """The estimates of KL(policy ‖ reference) from the sampled tokens only; none for given text."""
    values: dict[str, Values]
    """The values of each kind and estimate, in nats (as in kl.divergence)."""
    log_ratio: Values
    """log p_policy - log p_reference of each scored token, nats."""

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self._counts.sum())

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """Unit of each sequence, [S]: all sequences of one prompt are one unit.

        If all sequences have the same prompt, each is its own unit, and an interval is about that prompt.
        """
        seen: dict[str, int] = {}
        for number, text in enumerate(self.texts):
            seen.setdefault(self._prompt(number, text), number)
        if len(seen) == 1:
            return np.arange(len(self.texts))
        return np.array([seen[self._prompt(number, text)] for number, text in enumerate(self.texts)])

    @property
    def unit(self) -> str:
        """Kind of the independent unit: "prompt" if any prompt has several sequences, "sequence" otherwise."""
        return "sequence" if len(np.unique(self.units)) == len(self.texts) else "prompt"

    def per_token(self, name: str) -> Mean:
        """Return the mean over tokens."""
        return ratio_mean(self._sums(name), self._counts, self.units, floor=self._floor(name))

    def per_sequence(self, name: str) -> Mean:
        """Return the mean over sequences of the sum over a sequence's tokens."""
        ones = np.ones(len(self.texts))
        return ratio_mean(self._sums(name), ones, self.units, floor=self._floor(name))

    def by_token(self, name: str, *, top: int | None = None, least: int = 1) -> list[TokenMean]:
        """Return the tokens that occur at least `least` times, those with the largest means first."""
        ids, member, counts = np.unique(self._ids, return_inverse=True, return_counts=True)
        with np.errstate(invalid="ignore"):
            means = np.bincount(member, np.concatenate(self.values[name])) / counts
            ratios = np.bincount(member, np.concatenate(self.log_ratio)) / counts
        order = [at for at in np.lexsort((ids, -means)) if counts[at] >= least]
        return [TokenMean(int(ids[at]), int(counts[at]), float(means[at]), float(ratios[at])) for at in order[:top]]

    def by_position(self, name: str, *, bins: int = 16) -> list[PositionMean]:
        """Return means over position ranges of equal width in the completion, with their numbers of tokens and
        sequences."""
        longest = int(self._counts.max())
        width = math.ceil(longest / bins)
        found = []
        for start in range(0, longest, width):
            parts = [values[start : start + width] for values in self.values[name]]
            counts = np.array([float(len(part)) for part in parts])
            sums, there = np.array([part.sum() for part in parts]), counts > 0
            mean = ratio_mean(sums[there], counts[there], self.units[there], floor=self._floor(name))
            last = min(start + width, longest)
            found.append(PositionMean(start + 1, last, int(counts.sum()), int(there.sum()), mean))
        return found

    @staticmethod
    def _prompt(number: int, text: Text) -> str:
        # Sequences with an empty prompt are independent.
        return repr(text.prompt) if text.prompt else f"sequence {number}"

    @cached_property
    def _counts(self) -> NDArray[np.float64]:
        return np.array([float(len(text.completion_ids)) for text in self.texts])

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        return np.concatenate([np.array(text.completion_ids) for text in self.texts])

    def _sums(self, name: str) -> NDArray[np.float64]:
        return np.array([values.sum() for values in self.values[name]])

    @staticmethod
    def _floor(name: str) -> float | None:
        return None if name == "k1" else 0.0


def compare_models(
    policy: nn.Module,
    reference: Reference,
    texts: Sequence[Text],
    *,
    kinds: Sequence[str] = ("reverse_kl",),
    sampled: bool = False,
    temperature: float = 1.0,
    order: float | None = None,
    jsd_weight: float = 0.5,
    batch_size: int = 8,
    watch: Watch = unwatched,
) -> Comparison:
    """Score texts under both models.

    Args:
        policy: p; put in eval mode during the comparison.
        reference: q; `hold` makes one from a model.
        texts: from `read_texts` or `sample_texts`.
        kinds: exact divergences, from kl.DIVERGENCES, of the distributions that predict each scored token. Each takes a
            forward pass of both models.
        sampled: True if the texts are samples of the policy at this temperature. The estimates k1 and k3 are then
            computed too.
        temperature: divides the logits of both.
        order, jsd_weight: as in kl.divergence, for the kinds that take them.
        batch_size: number of sequences per forward pass; sequences of similar length share a batch.
        watch: shows the progress.

    Raises:
        ValueError: as `score_pair`; no texts; a token without a logit; a model that gives NaN.
    """
    ways = divergences(kinds, order=order, jsd_weight=jsd_weight)
    if not texts:
        raise ValueError("texts is empty: there is no text to compare the models on.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    _check_tokens(policy, texts)
    names = [how.kind for how in ways] + (list(ESTIMATES) if sampled else [])
    empty: NDArray[np.float64] = np.empty(0)
    values: dict[str, Values] = {name: [empty] * len(texts) for name in (*names, "log_ratio")}
    by_length = sorted(range(len(texts)), key=lambda at: -_length(texts[at]))
    chunks = [by_length[at : at + batch_size] for at in range(0, len(texts), batch_size)]
    with torch.no_grad(), evaluating(policy):
        for chunk in watch(chunks, "comparing"):
            batch = _batch([texts[at] for at in chunk], next(policy.parameters()).device)
            for name, found in _score(policy, reference, batch, ways, temperature, sampled).items():
                _check_numbers(name, found, [texts[at].row for at in chunk])
                for at, row, mask in zip(chunk, found, batch.completion_mask, strict=True):
                    values[name][at] = row[mask].double().cpu().numpy()
    log_ratio = values.pop("log_ratio")
    estimates = ESTIMATES if sampled else ()
    return Comparison(list(texts), tuple(how.kind for how in ways), estimates, values, log_ratio)


def divergences(kinds: Sequence[str], *, order: float | None = None, jsd_weight: float = 0.5) -> list[Divergence]:
    """Return the kinds with their options, without repetitions.

    Raises:
        ValueError: no kind, an unknown one, an order that is missing or unused, a weight outside (0, 1).
    """
    if not kinds:
        raise ValueError(f"No kind of divergence is given. Known: {', '.join(DIVERGENCES)}.")
    if order is not None and not set(kinds) & set(ORDERED):
        raise ValueError(f"order is for {', '.join(ORDERED)}, and none of them is among the kinds. Leave it out.")
    return [Divergence(kind, jsd_weight, order if kind in ORDERED else None) for kind in dict.fromkeys(kinds)]


def _score(
    policy: nn.Module,
    reference: Reference,
    batch: TokenBatch,
    ways: Sequence[Divergence],
    temperature: float,
    sampled: bool,
) -> dict[str, Tensor]:
    """Return [B, T] for each name."""
    found: dict[str, Tensor] = {}
    pair: PairScores | None = None
    for how in ways:
        options = {"jsd_weight": how.weight, "order": how.order}
        pair = score_pair(policy, reference, batch, temperature=temperature, divergence=how.kind, **options)  # type: ignore[arg-type]
        assert pair.divergence is not None
        found[how.kind] = pair.divergence
    assert pair is not None
    logp, ref_logp = pair.policy.logp, pair.reference.logp
    found["log_ratio"] = logp - ref_logp
    for name in ESTIMATES if sampled else ():
        found[name] = estimate(logp, ref_logp, name, gradient="none", mask=batch.completion_mask)
    return found


def _batch(texts: Sequence[Text], device: torch.device) -> TokenBatch:
    """Make a batch, padded on the right."""
    width = max(map(_length, texts))
    ids, real, scored = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(3))
    for row, text in enumerate(texts):
        start, end = len(text.prompt_ids), _length(text)
        ids[row, :end] = torch.tensor([*text.prompt_ids, *text.completion_ids])
        real[row, :end] = 1
        scored[row, start:end] = 1
    return TokenBatch(ids.to(device), real.to(device), scored.bool().to(device))


def _length(text: Text) -> int:
    return len(text.prompt_ids) + len(text.completion_ids)


def _check_tokens(policy: nn.Module, texts: Sequence[Text]) -> None:
    with evaluating(policy):
        known = vocabulary(policy)
    for text in texts:
        if (largest := max(*text.prompt_ids, *text.completion_ids)) >= known:
            raise ValueError(
                f"Row {text.row} of the data has the token {largest}, and the models have {known} logits: the "
                "tokenizer is of another model, or tokens were added to it and the models were not resized."
            )


def _check_numbers(name: str, found: Tensor, rows: Sequence[int]) -> None:
    wrong = found.isnan().any(1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"{name} is NaN in row {rows[wrong[0]]} of the data: the logits of one model are not finite there. It may "
            "overflow in 16 bits: compare in float32."
        )
