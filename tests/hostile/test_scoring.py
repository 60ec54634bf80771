"""Scores and gradients of random models on random batches, compared with a loop over rows in fp64.

Padding, shared prompts, packing, scoring in parts, the cache and the strategy must change neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from support import plain
from support.hostile import examples
from support.random_models import Subject, batches, double_copy, row_logits, spread, subjects
from torch import Tensor, nn

from refkl import KLConfig, KLPenalty, ReferenceConfig, TokenBatch, build_reference, score_pair, score_tokens
from refkl.scoring import prepare
from refkl.scoring.packing import worthwhile

KINDS = st.sampled_from(["reverse_kl", "forward_kl", "jsd", "hellinger", "tv"])
TEMPERATURES = st.sampled_from([1.0, 0.6, 1.7])
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@contextmanager
def packing(always: bool) -> Iterator[None]:
    """Pack wherever it is exact, whatever it costs, while this is open."""
    usual = worthwhile.GAIN
    worthwhile.GAIN = 100.0 if always else usual
    try:
        yield
    finally:
        worthwhile.GAIN = usual


def plain_scores(subject: Subject, model: nn.Module, batch: TokenBatch, temperature: float) -> dict[str, Any]:
    """Return logp and entropy, [B, T] in fp64 with grad, and the rows of logits after the temperature."""
    rows = [(r, c, t, z / temperature) for r, c, t, z in row_logits(model, subject.family, batch)]
    return {
        "logp": spread(batch, [(r, c, plain.logp(z, t)) for r, c, t, z in rows]),
        "entropy": spread(batch, [(r, c, plain.entropy(z)) for r, c, _, z in rows]),
        "rows": rows,
    }


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_gradients(policy: nn.Module, loss: Tensor, twin: nn.Module, right: Tensor) -> None:
    """Check that both losses have the same gradient with respect to all that trains."""
    names = list(trained(policy))
    found = torch.autograd.grad(loss, list(trained(policy).values()), allow_unused=True)
    if not right.requires_grad:
        assert all(g is None or not g.any() for g in found)
        return
    wanted = torch.autograd.grad(right, list(trained(twin).values()), allow_unused=True)
    largest = max([1.0, *(float(g.abs().max()) for g in wanted if g is not None)])
    for name, one, other in zip(names, found, wanted, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        difference = float((one.double() - other).abs().max())
        assert difference <= 1e-3 * largest, f"{name}: {difference} of {largest}"


def weights_like(values: Tensor) -> Tensor:
    """No two tokens count alike."""
    return torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).view_as(values)


@examples(70)
@given(st.data())
def test_scores_of_a_policy(data: st.DataObject) -> None:
    draw = data.draw
    subject = draw(subjects())
    batch, temperature, entropy = draw(batches(subject)), draw(TEMPERATURES), draw(st.booleans())
    policy, twin = subject.model, double_copy(subject.model)
    policy.train(draw(st.booleans()))
    with packing(draw(st.booleans())):
        scores = score_tokens(policy, batch, temperature=temperature, entropy=entropy)
    right = plain_scores(subject, twin, batch, temperature)
    torch.testing.assert_close(scores.logp.double(), right["logp"], **CLOSE)
    assert (scores.logp[~batch.completion_mask] == 0).all()
    loss, wanted = ((x * weights_like(x)).sum() for x in (scores.logp, right["logp"]))
    if entropy:
        assert scores.entropy is not None and (scores.entropy[~batch.completion_mask] == 0).all()
        torch.testing.assert_close(scores.entropy.double(), right["entropy"], **CLOSE)
        loss, wanted = loss + scores.entropy.sum(), wanted + right["entropy"].sum()
    check_gradients(policy, loss, twin, wanted)


@st.composite
def references(draw: st.DrawFn, subject: Subject, folder: str) -> ReferenceConfig:
    strategy = draw(st.sampled_from(["auto", "clone", "swap", "shared_trunk"]))
    cache = draw(st.booleans()) and subject.family != "dynamic"
    parts = draw(st.sampled_from([None, None, 1, 5, 12]))
    if strategy == "shared_trunk":
        parts = None
    return ReferenceConfig(strategy=strategy, cache=folder if cache else None, max_tokens=parts)


def freeze_first_layers(subject: Subject) -> None:
    """Freeze all but the last layer, the last norm and the head, so that a trunk can be shared."""
    for name, parameter in subject.model.named_parameters():
        last = any(part in name for part in ("layers.1.", "h.1.", "norm.weight", "ln_f", "lm_head", "embed_out"))
        if not last or "embed_tokens" in name or "wte" in name:
            parameter.requires_grad_(False)


def moved(policy: nn.Module, by: float, seed: int) -> None:
    """Move every trained weight, as an optimizer would."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(policy).values():
            parameter += by * torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)


@examples(60)
@given(st.data())
def test_a_pair_and_its_penalty(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Both models' scores, the exact divergence, the penalty, and the gradient of all of it together."""
    draw = data.draw
    subject = draw(subjects())
    config = draw(references(subject, str(tmp_path_factory.mktemp("cache"))))
    if config.strategy in ("shared_trunk", "swap"):
        freeze_first_layers(subject)
    policy, temperature = subject.model, draw(TEMPERATURES)
    start = double_copy(policy)
    try:
        reference = build_reference(policy, config)
    except ValueError as error:  # such as a tied head that trains
        assert "cannot work here" in str(error)
        event(f"no {config.strategy}")
        return
    by = draw(st.sampled_from([0.0, 0.01, 0.1]))
    moved(policy, by, draw(st.integers(0, 100)))
    twin = double_copy(policy)
    exact = config.cache is None and draw(st.booleans())
    kind = draw(KINDS) if exact else None
    estimator = draw(st.sampled_from(["k1", "k2", "k3", "abs"]))
    penalty = KLPenalty(KLConfig(coef=0.5, estimator=estimator), reference)
    for _ in range(draw(st.integers(1, 2))):
        batch = draw(batches(subject))
        with packing(draw(st.booleans())):
            event(f"{reference.strategy}, packed: {prepare(policy, batch).packed is not None}")
            pair = score_pair(policy, reference, batch, temperature=temperature, entropy=True, divergence=kind)
        wanted = plain_scores(subject, twin, batch, temperature)
        with torch.no_grad():
            ref = plain_scores(subject, start, batch, temperature)
        for found, right in ((pair.policy, wanted), (pair.reference, ref)):
            torch.testing.assert_close(found.logp.double(), right["logp"], **CLOSE)
            torch.testing.assert_close(found.entropy.double(), right["entropy"], **CLOSE)
        assert not pair.reference.logp.requires_grad
        output = penalty(pair.policy, pair.reference, batch.completion_mask)
        d = wanted["logp"] - ref["logp"]
        value = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]
        torch.testing.assert_close(output.per_token.double(), value, **CLOSE)
        count = max(1, int(batch.completion_mask.sum()))
        torch.testing.assert_close(output.loss.double(), 0.5 * value.sum() / count, **CLOSE)
        loss = (pair.policy.logp * weights_like(pair.policy.logp)).sum() + output.loss
        right_loss = (wanted["logp"] * weights_like(d)).sum() + 0.5 * (d.detach() * wanted["logp"]).sum() / count
        if kind is not None:
            truth = plain_divergence(batch, wanted, ref, kind)
            torch.testing.assert_close(pair.divergence.double(), truth, **CLOSE)
            assert (pair.divergence[~batch.completion_mask] == 0).all()
            if by and kind != "tv":  # whose slope jumps where the two are equal
                loss, right_loss = loss + pair.divergence.sum(), right_loss + truth.sum()
        if by == 0.0 and config.max_tokens is None and config.cache is None:
            assert not output.per_token.any()
        check_gradients(policy, loss, twin, right_loss)


def plain_divergence(batch: TokenBatch, policy: dict[str, Any], reference: dict[str, Any], kind: str) -> Tensor:
    """Return the exact divergence, [B, T] in fp64 with grad to the policy."""
    both = zip(policy["rows"], reference["rows"], strict=True)
    return spread(batch, [(r, c, plain.divergence(z, ref_z, kind)) for (r, c, _, z), (_, _, _, ref_z) in both])
