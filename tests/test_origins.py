"""KLPenalty refuses scores whose fingerprints, or memory, show that they are not of policy and reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import batch, gpt2, llama

import refkl
from refkl import KLConfig, KLPenalty, ReferenceConfig, TokenScores, build_reference, score_pair, score_tokens
from refkl.reference import Reference

FAMILIES = {"llama": llama, "gpt2": gpt2}
every_family = pytest.mark.parametrize("family", FAMILIES)
MASK = torch.ones(1, 3, dtype=torch.bool)
D = torch.tensor([[0.5, -1.0, 2.0]])


def policy_scores(d: torch.Tensor = D) -> TokenScores:
    return TokenScores((d - 2.0).requires_grad_())


def ref_scores(fingerprint: str | None = None) -> TokenScores:
    return TokenScores(torch.full((1, 3), -2.0), fingerprint=fingerprint)


def trained(family: str) -> tuple[Any, Reference]:
    """A policy, and its fingerprinted reference as it was before the policy moved."""
    policy = FAMILIES[family]()
    reference = build_reference(policy, ReferenceConfig(strategy="clone"))
    reference.fingerprint()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy, reference


def kl_of(policy: Any, reference: Reference) -> float:
    """KL of the sampled tokens by k3 in fp64, from scores that are taken now."""
    tokens = batch()
    with torch.no_grad():
        pair = score_pair(policy, reference, tokens)
    d = (pair.policy.logp - pair.reference.logp)[tokens.completion_mask].double()
    return float((torch.expm1(-d) + d).mean())


# stale


@every_family
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_scores_from_before_an_update_are_refused_after_it(family: str, known: bool) -> None:
    """With alpha 1 the KL to the updated reference is 0, and the stale scores give the KL to the one before."""
    policy, reference = trained(family)
    tokens, penalty = batch(), KLPenalty(reference=reference if known else None)
    mask = tokens.completion_mask
    stale = reference.score(tokens)
    first = penalty(score_tokens(policy, tokens), stale, mask)
    assert first.metrics["kl"] == pytest.approx(kl_of(policy, reference), rel=1e-4) and first.metrics["kl"] > 1e-3
    penalty.step()
    reference.update(policy, 1.0)
    if known:  # at once, though the fingerprint has not been taken anew
        with pytest.raises(ValueError, match=r"stale.*moved by update 1 with alpha 1 and has not been fingerprinted"):
            penalty(score_tokens(policy, tokens), stale, mask)
    fresh = reference.score(tokens)
    assert penalty(score_tokens(policy, tokens), fresh, mask).metrics["kl"] == 0.0
    reference.fingerprint()
    fresh = reference.score(tokens)
    assert penalty(score_tokens(policy, tokens), fresh, mask).metrics["kl"] == 0.0
    assert penalty.step()["kl"] == 0.0
    with pytest.raises(ValueError, match=r"ref_scores are stale: they have fingerprint [0-9a-f]{12}.*Score the batch"):
        penalty(score_tokens(policy, tokens), stale, mask)
    assert penalty(score_tokens(policy, tokens), fresh, mask).metrics["kl"] == 0.0
    assert penalty.step()["kl"] == 0.0  # what was refused is not counted


def test_the_first_reference_can_be_measured_beside_a_known_one() -> None:
    policy, reference = trained("llama")
    tokens, penalty = batch(), KLPenalty(reference=reference)
    first = reference.fingerprint()
    penalty(score_tokens(policy, tokens), reference.score(tokens), tokens.completion_mask)
    penalty.step()
    reference.keep_first()
    reference.update(policy, 1.0)
    second = reference.fingerprint()
    penalty(score_tokens(policy, tokens), reference.score(tokens), tokens.completion_mask)
    penalty.step()
    with reference.first():  # as kl/first is measured
        scores = reference.score(tokens)
        assert scores.fingerprint == first != second
        assert penalty(score_tokens(policy, tokens), scores, tokens.completion_mask, count=False).metrics["kl"] > 1e-3


def test_scores_of_another_reference_than_the_penaltys_are_refused() -> None:
    policy, reference = trained("llama")
    _, other = trained("llama")
    tokens, penalty = batch(), KLPenalty(reference=reference)
    with pytest.raises(ValueError, match=r"ref_scores are of another reference.*KLPenalty was made with"):
        penalty(score_tokens(policy, tokens), other.score(tokens), tokens.completion_mask, count=False)
    with pytest.raises(ValueError, match="made for 1 references and got the scores of 2"):
        penalty(score_tokens(policy, tokens), [reference.score(tokens)] * 2, tokens.completion_mask)


# swapped, or the same model


@every_family
@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_swapped_arguments_are_refused(family: str, placement: Any, grad: bool) -> None:
    policy, reference = trained(family)
    tokens = batch()
    penalty = KLPenalty(KLConfig(placement=placement))
    with torch.set_grad_enabled(grad):
        pair = score_pair(policy, reference, tokens)
        with pytest.raises(ValueError, match=r"seem to be swapped.*penalty\(policy_scores, ref_scores, mask\)"):
            penalty(pair.reference, pair.policy, tokens.completion_mask)
        penalty(pair.policy, pair.reference, tokens.completion_mask)
        if grad:  # also where no fingerprint tells
            bare = replace(pair.reference, fingerprint=None)
            with pytest.raises(ValueError, match="seem to be swapped: ref_scores carry grad"):
                penalty(bare, pair.policy, tokens.completion_mask)


@every_family
@pytest.mark.parametrize(
    "copy",
    [lambda s: s, lambda s: TokenScores(s.logp), lambda s: TokenScores(s.logp.detach()), lambda s: replace(s)],
    ids=["same object", "same tensor", "detached", "replaced"],
)
def test_the_policys_own_scores_are_no_references(family: str, copy: Callable[[TokenScores], TokenScores]) -> None:
    policy, reference = trained(family)
    tokens = batch()
    scores = score_tokens(policy, tokens)
    for given in (copy(scores), [reference.score(tokens), copy(scores)]):
        with pytest.raises(ValueError, match="ref_scores are the policy's own"):
            KLPenalty()(scores, given, tokens.completion_mask)
    equal = TokenScores(scores.logp.detach().clone())  # as at step 0
    assert KLPenalty()(scores, equal, tokens.completion_mask).metrics["kl"] == 0.0


def test_two_parts_of_one_buffer_are_two_models_scores() -> None:
    both = torch.cat([D, torch.zeros(1, 3)])
    found = KLPenalty(KLConfig(estimator="k1"))(TokenScores(both[:1]), TokenScores(both[1:]), MASK)
    assert found.metrics["kl"] == pytest.approx(0.5)


def test_a_reference_on_both_sides_is_refused_and_two_can_be_compared() -> None:
    policy, reference = trained("llama")
    other, tokens = build_reference(policy, "clone"), batch()
    other.fingerprint()
    penalty, mask = KLPenalty(), tokens.completion_mask
    with pytest.raises(ValueError, match="of one reference"):
        penalty(reference.score(tokens), reference.score(tokens), mask)
    with pytest.raises(ValueError, match="carry no grad, so this penalty would train nothing"):
        penalty(other.score(tokens), reference.score(tokens), mask)
    found = penalty(other.score(tokens), reference.score(tokens), mask, count=False)
    assert found.metrics["kl"] == pytest.approx(kl_of(policy, reference), rel=1e-4)


def test_a_reward_takes_scores_of_the_policy_that_sampled_without_grad() -> None:
    policy, reference = trained("llama")
    tokens = batch()
    with torch.no_grad():
        pair = score_pair(policy, reference, tokens)
    found = KLPenalty(KLConfig(coef=0.3, placement="reward", reward="token"))(
        pair.policy, pair.reference, tokens.completion_mask
    )
    expected = -0.3 * (pair.policy.logp - pair.reference.logp) * tokens.completion_mask
    torch.testing.assert_close(found.reward, expected)


# within a step, and from one to the next


def test_two_references_in_one_step_are_refused() -> None:
    """Two model families' references on the same tokens, in two micro-batches."""
    policy, reference = trained("llama")
    _, other = trained("gpt2")
    tokens, penalty = batch(), KLPenalty()
    mask = tokens.completion_mask
    penalty(score_tokens(policy, tokens), reference.score(tokens), mask)
    with pytest.raises(ValueError, match=r"mixes two references.*count=False"):
        penalty(score_tokens(policy, tokens), other.score(tokens), mask)
    penalty(score_tokens(policy, tokens), other.score(tokens), mask, count=False)  # only measured
    with torch.no_grad():
        penalty(score_tokens(policy, tokens), other.score(tokens), mask)
    penalty(score_tokens(policy, tokens), reference.score(tokens), mask)
    assert penalty.step()["kl"] == pytest.approx(kl_of(policy, reference), rel=1e-4)


def test_a_sync_between_steps_is_followed() -> None:
    """Each KL is of the reference as it is in that step."""
    policy, reference = trained("llama")
    tokens, penalty = batch(), KLPenalty(reference=reference)
    sync = refkl.ReferenceSync(reference, refkl.SyncConfig(every=1, alpha=0.5))
    found = []
    for _ in range(3):
        expected = kl_of(policy, reference)
        for _ in range(2):
            pair = score_pair(policy, reference, tokens)
            penalty(pair.policy, pair.reference, tokens.completion_mask)
        found.append(penalty.step()["kl"])
        assert found[-1] == pytest.approx(expected, rel=1e-3)
        sync.step(policy)
        reference.fingerprint()
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


def test_a_fingerprint_that_is_taken_during_a_step_changes_nothing() -> None:
    penalty = KLPenalty(KLConfig(estimator="k1"))
    for stamp in (None, "a", None, "a"):
        penalty(policy_scores(), ref_scores(stamp), MASK)
    assert penalty.step()["kl"] == pytest.approx(0.5)


def test_references_in_another_order_are_refused() -> None:
    penalty = KLPenalty(KLConfig(estimator="k1", reference_weights=[0.25, 0.75]))
    one, two = ref_scores("a"), replace(ref_scores("b"), logp=torch.zeros(1, 3))
    assert penalty(policy_scores(), [one, two], MASK).metrics["kl"] == pytest.approx(0.25 * 0.5 + 0.75 * -1.5)
    for between in (lambda: None, penalty.step):  # in the same step, and in the next one
        between()
        with pytest.raises(ValueError, match="ref_scores 0 and 1 have changed places"):
            penalty(policy_scores(), [two, one], MASK)
    penalty(policy_scores(), [one, two], MASK)
    with pytest.raises(ValueError, match="mixes two references: ref_scores 1 have"):
        penalty(policy_scores(), [one, ref_scores("c")], MASK)
    penalty.step()
    penalty(policy_scores(), [one, ref_scores("c")], MASK)  # the second one moved


def test_of_two_references_that_begin_alike_one_may_move() -> None:
    penalty = KLPenalty()
    penalty(policy_scores(), [ref_scores("a"), ref_scores("a")], MASK)
    penalty.step()
    penalty(policy_scores(), [ref_scores("b"), ref_scores("a")], MASK)
    penalty.step()
    with pytest.raises(ValueError, match="ref_scores 0 are stale"):
        penalty(policy_scores(), [ref_scores("a"), ref_scores("a")], MASK)


def test_a_resumed_run_starts_anew() -> None:
    penalty = KLPenalty()
    for stamp in ("a", "b"):
        penalty(policy_scores(), ref_scores(stamp), MASK)
        penalty.step()
    penalty.load_state_dict(penalty.state_dict())
    assert math.isfinite(penalty(policy_scores(), ref_scores("a"), MASK).metrics["kl"])
