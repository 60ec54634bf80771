"""score_pair and the penalty: step 0 is exactly zero, and the exact divergence is that of the full distributions."""

from __future__ import annotations

import pytest
import torch
from support.models import MODELS, batch

from refkl import KLConfig, KLPenalty, build_reference, score_pair


def _drifted(name: str) -> tuple[torch.nn.Module, object]:
    policy = MODELS[name]()
    reference = build_reference(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return policy, reference


@pytest.mark.parametrize("gradient", ["reverse_kl", "autograd"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_step_zero_is_exactly_zero(name: str, padding: str, gradient: str) -> None:
    policy, tokens = MODELS[name](), batch(padding=padding)
    reference = build_reference(policy)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        pair = score_pair(policy, reference, tokens, temperature=0.7, divergence=kind)
        assert pair.divergence is not None and (pair.divergence == 0.0).all()
    penalty = KLPenalty(KLConfig(coef=1.0, gradient=gradient))
    output = penalty(pair.policy, pair.reference, tokens.completion_mask)
    assert output.loss is not None and output.loss.item() == 0.0 and (output.per_token == 0.0).all()
    output.loss.backward()
    assert all(p.grad is None or (p.grad == 0.0).all() for p in policy.parameters())


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_exact_divergence_and_its_gradient(kind: str) -> None:
    policy, reference = _drifted("llama")
    tokens, temperature = batch(padding="left"), 1.3

    def slow() -> torch.Tensor:
        positions = (tokens.attention_mask.cumsum(-1) - 1).clamp(min=0)
        run = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "position_ids": positions}
        with torch.no_grad():
            log_q = torch.log_softmax(reference.model(**run).logits.double() / temperature, -1)
        log_p = torch.log_softmax(policy(**run).logits.double() / temperature, -1)
        p, q = log_p.exp(), log_q.exp()
        log_m = (0.5 * p + 0.5 * q).log()
        forms = {
            "reverse_kl": (p * (log_p - log_q)).sum(-1),
            "forward_kl": (q * (log_q - log_p)).sum(-1),
            "jsd": 0.5 * (p * (log_p - log_m)).sum(-1) + 0.5 * (q * (log_q - log_m)).sum(-1),
        }
        shifted = torch.zeros_like(forms[kind])
        shifted[:, 1:] = forms[kind][:, :-1]
        return shifted * tokens.completion_mask

    expected = slow()
    pair = score_pair(policy, reference, tokens, temperature=temperature, divergence=kind)
    torch.testing.assert_close(pair.divergence.double(), expected, rtol=1e-4, atol=1e-7)
    parameters = list(policy.parameters())
    own = torch.autograd.grad(pair.divergence.sum(), parameters)
    true = torch.autograd.grad(expected.sum(), parameters)
    for mine, right in zip(own, true, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-3, atol=1e-6)
    assert not pair.reference.logp.requires_grad


def test_a_gradient_step_on_the_penalty_lowers_the_exact_kl() -> None:
    policy, reference = _drifted("llama")
    tokens = batch()
    pair = score_pair(policy, reference, tokens, divergence="reverse_kl")
    before = pair.divergence.sum()
    before.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    after = score_pair(policy, reference, tokens, divergence="reverse_kl").divergence.sum()
    assert 0 < after < before


def test_vocabularies_must_match() -> None:
    policy, reference = _drifted("llama")
    policy.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"policy's head has 300 tokens and the reference's 258"):
        score_pair(policy, reference, batch(), divergence="reverse_kl")
