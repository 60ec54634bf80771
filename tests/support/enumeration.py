"""A policy small enough to enumerate all its sequences, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

SYMBOLS, LENGTH, END = 3, 3, 2


def all_sequences():
    """[N, T] tokens and [N, T] mask: every sequence of up to three tokens that ends at END or at full length."""
    rows = set()
    for row in itertools.product(range(SYMBOLS), repeat=LENGTH):
        end = row.index(END) + 1 if END in row else LENGTH
        rows.add((row[:end] + (END,) * (LENGTH - end), end))
    tokens = torch.tensor([row for row, _ in sorted(rows)])
    ends = torch.tensor([end for _, end in sorted(rows)])
    return tokens, torch.arange(LENGTH) < ends[:, None]


TOKENS, SCORED = all_sequences()


def sequence_logp(logits):
    """[N, T] log-probability of each token of each sequence under a policy with one row of logits per place and token
    before it: [T, SYMBOLS + 1, SYMBOLS]."""
    before = torch.cat([torch.full_like(TOKENS[:, :1], SYMBOLS), TOKENS[:, :-1]], 1)
    rows = logits.log_softmax(-1)[torch.arange(LENGTH), before]
    return rows.gather(-1, TOKENS[..., None])[..., 0] * SCORED


def policies():
    policy = torch.randn(LENGTH, SYMBOLS + 1, SYMBOLS, dtype=torch.float64).requires_grad_()
    return policy, sequence_logp(torch.randn(LENGTH, SYMBOLS + 1, SYMBOLS, dtype=torch.float64))


def expected_gradient(logits, credit):
    """Of E[Σ_t credit_t · log p(x_t)], credit held fixed: what a policy-gradient trainer ascends."""
    logp = sequence_logp(logits)
    probability = logp.sum(-1).exp().detach()
    assert probability.sum().item() == pytest.approx(1.0, rel=1e-12)
    surrogate = (probability[:, None] * credit * logp).sum()
    return torch.autograd.grad(surrogate, logits)[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
