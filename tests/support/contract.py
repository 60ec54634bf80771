"""What every strategy must do, as one list of checks.

A new entry of STRATEGIES adds a Case (one row in test_contract.py, or a launched script where it needs processes) and
passes all of CHECKS. Each check gets a fresh policy and a reference built from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import batch, shared_batch
from torch import Tensor, nn

import refkl
from refkl import Reference, TokenBatch, score_pair, score_tokens
from refkl.backend import learned_prompt, local_shard, named_weights, reshard, unwrap, weights_of
from refkl.scoring import completion_logits, prepare


@dataclass
class Case:
    """One policy with one reference, and how this backend trains."""

    policy: nn.Module
    """As it trains: wrapped, if the backend wraps."""
    reference: Reference
    plain: nn.Module
    """An unsharded, untouched copy of what the reference must be: of the policy as it stood when that was built."""
    step: Callable[[Tensor], None]
    """Backward from a loss, and one optimizer step that moves the policy visibly."""
    moves: bool
    """Whether the strategy can be updated."""
    folder: Path
    """The same on all ranks."""
    rate: float = 0.05
    """Of `step`, which is one of plain gradient descent; over ranks, on the mean gradient."""
    start: nn.Module | None = None
    """Where the reference is the bare base: such a copy of the policy."""
    tolerance: float = 0.0
    """How far a score may be from the right one, in nats: a quantised reference is not exact. 0 asks for equal bits."""

    only_logp: bool = False
    """True if it gives log-probabilities only, and has no weights in this process."""

    def right(self, found: Tensor, expected: Tensor) -> bool:
        """Whether these log-probabilities are those expected."""
        return float((found - expected).abs().max()) <= self.tolerance

    def expected(self, tokens: TokenBatch) -> Tensor:
        """The right log-probabilities, from the plain copy."""
        with torch.no_grad():
            return score_tokens(self.plain, tokens).logp

    def as_built(self, tokens: TokenBatch) -> Tensor:
        """The log-probabilities of the policy as it stood when the reference was built."""
        with torch.no_grad():
            return score_tokens(self.start or self.plain, tokens).logp

    def train(self) -> None:
        """One step that changes what the policy says."""
        self.step(score_tokens(self.policy, batch(seed=5)).logp.sum())


def check_scores_are_the_policys_as_built(case: Case) -> None:
    for padding in ("left", "right"):
        tokens = batch(padding=padding)
        assert case.right(case.reference.score(tokens).logp, case.expected(tokens))
        with torch.no_grad():
            assert case.right(score_tokens(case.policy, tokens).logp, case.as_built(tokens))


def check_training_does_not_move_it(case: Case) -> None:
    tokens = batch()
    before, fingerprint = case.reference.score(tokens).logp, case.reference.fingerprint()
    case.train()
    case.train()
    with torch.no_grad():
        drift = (score_tokens(case.policy, tokens).logp - before).abs().max()
    assert drift > 1e-3, "the policy must have moved for this check to mean anything"
    for _ in range(3):
        assert torch.equal(case.reference.score(tokens).logp, before)
    assert case.reference.fingerprint() == fingerprint


def check_nothing_leaks(case: Case) -> None:
    if case.only_logp:
        for wanted in ({"entropy": True}, {"hidden": True}):
            with pytest.raises(ValueError, match=case.reference.strategy):
                case.reference.score(batch(), **wanted)
        scores = case.reference.score(batch())
        assert scores.entropy is None and scores.hidden is None and not scores.logp.requires_grad
        return
    scores = case.reference.score(batch(), entropy=True, hidden=True)
    for tensor in (scores.logp, scores.entropy, scores.hidden):
        assert tensor is not None and not tensor.requires_grad and tensor.grad_fn is None
    own = getattr(case.reference, "model", None)
    if own is not None:
        case.train()
        assert all(not p.requires_grad and p.grad is None for p in own.parameters())
        inner = unwrap(case.policy)
        reshard(inner)
        trained = {local_shard(p).untyped_storage().data_ptr() for p in inner.parameters() if p.requires_grad}
        held = {local_shard(p).untyped_storage().data_ptr() for p in own.parameters()}
        assert not (trained - {0}) & held


def check_scoring_leaves_the_policy_as_it_was(case: Case) -> None:
    inner = unwrap(case.policy)
    inner.train()
    left_in_eval = next(m for m in inner.modules() if m is not inner)
    left_in_eval.eval()
    state = _state(inner)
    random = torch.get_rng_state()
    case.reference.score(batch())
    assert _state(inner) == state
    assert torch.equal(torch.get_rng_state(), random)


def check_a_score_that_raises_leaves_nothing_switched(case: Case) -> None:
    if case.only_logp:
        return  # its own errors are its author's to test
    tokens, inner = batch(), unwrap(case.policy)
    right, state = case.expected(tokens), _state(unwrap(case.policy))
    ran = getattr(case.reference, "model", inner)
    layer = next(m for m in ran.modules() if isinstance(m, nn.ModuleList))[1]  # its second block

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        case.reference.score(tokens)
    hook.remove()
    assert _state(inner) == state
    assert case.right(case.reference.score(tokens).logp, right)
    with torch.no_grad():
        assert torch.equal(score_tokens(case.policy, tokens).logp, case.as_built(tokens))


def check_dropout_never_turns_on(case: Case) -> None:
    tokens = batch()
    right = case.expected(tokens)
    unwrap(case.policy).train()
    own = getattr(case.reference, "model", None)
    if own is not None:
        own.train()
        for module in own.modules():
            nn.Module.train(module)
    assert case.right(case.reference.score(tokens).logp, right)


def check_policy_gradients_do_not_change(case: Case) -> None:
    """Scoring the reference between the policy's forward and backward must not touch the graph."""
    tokens, inner = batch(), unwrap(case.policy)
    if any(w.layout.sharded for w in weights_of(inner)) or inner is not case.policy:
        return  # the wrapper owns these gradients: check_a_step_with_a_score_in_it sees what they do

    def gradients(score: bool) -> list[Tensor]:
        loss = score_tokens(case.policy, tokens).logp.sum()
        if score:
            case.reference.score(tokens)
        grads = torch.autograd.grad(loss, [p for p in inner.parameters() if p.requires_grad])
        return [g.clone() for g in grads]

    for with_score, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_score, without)


def check_a_step_with_a_score_in_it(case: Case) -> None:
    """Forward, reference, backward, step: as gradient descent on a plain copy that no reference was scored beside."""

    def score() -> None:
        case.reference.score(batch())
        case.reference.score(batch(padding="left"), entropy=not case.only_logp)

    tokens = batch(seed=5)
    _step_is_gradient_descent(case, tokens, tokens, score)


def check_prompts_run_once(case: Case) -> None:
    """Completions of a prompt share it: the scores, and the step, of the batch as it is."""
    inner, plain, shared = unwrap(case.policy), shared_batch(prefix="off"), shared_batch()
    assert (prepare(inner, shared).packed is None) == (learned_prompt(inner) is not None)
    found, right = case.reference.score(shared).logp, case.reference.score(plain).logp
    rounding = 1e-5 if next(case.plain.parameters()).dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, right, rtol=0, atol=max(rounding, case.tolerance))
    _step_is_gradient_descent(case, shared, plain, lambda: case.reference.score(shared))


def _step_is_gradient_descent(case: Case, tokens: TokenBatch, plain: TokenBatch, between: Callable[[], Any]) -> None:
    """A step on `tokens`, with something between its forward and backward, is that of a plain copy on `plain`."""
    twin = copy.deepcopy(case.start or case.plain)
    trains = {name for name, t in named_weights(unwrap(case.policy)) if t.requires_grad}
    leaves = [p.requires_grad_(True) for name, p in named_weights(twin) if name in trains]
    grads = torch.autograd.grad(score_tokens(twin, plain).logp.sum(), leaves)
    scale = 0.9 / torch.cat([g.flatten() for g in grads]).norm()  # below what the launched runs clip at
    for parameter, grad in zip(leaves, grads, strict=True):
        parameter.data -= case.rate * scale * grad
    loss = score_tokens(case.policy, tokens).logp.sum() * scale
    between()
    case.step(loss)
    with torch.no_grad():
        right, before = score_tokens(twin, plain).logp, case.as_built(plain)
        found = score_tokens(case.policy, tokens).logp
    assert (right - before).abs().max() > 1e-3
    rounding = 2e-5 if next(twin.parameters()).dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, right, rtol=0, atol=rounding)


def check_a_pair_is_a_score_of_each(case: Case) -> None:
    """Log-probabilities as scored alone, and the divergence of the full distributions, after the policy has moved."""
    tokens, kl = batch(padding="left"), torch.zeros(1)
    case.reference.score(tokens)  # a rounded one measures its floor, before the policy trains
    for _ in range(10):  # launched runs clip their gradients
        if kl.max() > 5e-3:
            break
        case.train()
        with torch.no_grad():
            log_p, log_q = (
                torch.log_softmax(x.double(), -1) for x in (_logits(case.policy, tokens), _right(case, tokens))
            )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl.max() > 5e-3
    reference = case.reference.score(tokens).logp
    with torch.no_grad():
        policy = score_tokens(case.policy, tokens).logp
    pair = score_pair(case.policy, case.reference, tokens)
    if case.only_logp:
        assert torch.equal(pair.reference.logp, reference) and torch.equal(pair.policy.logp.detach(), policy)
        for use in (case.reference.check_exact, lambda: case.reference.logits(tokens).__enter__()):
            with pytest.raises(ValueError, match=rf"{case.reference.strategy}.* gives log-probabilities only"):
                use()
        return
    exact = score_pair(case.policy, case.reference, tokens, divergence="reverse_kl")
    assert torch.equal(pair.reference.logp, reference) and torch.equal(pair.policy.logp.detach(), policy)
    bf16 = next(case.plain.parameters()).dtype == torch.bfloat16
    close: dict[str, float] = {"rtol": 0.1 if bf16 else 1e-4, "atol": 0.05 if bf16 else 2e-5}
    assert exact.divergence is not None
    torch.testing.assert_close(exact.policy.logp.detach(), policy, **close)
    torch.testing.assert_close(exact.reference.logp, reference, **close)
    torch.testing.assert_close(exact.divergence.detach().double(), kl, **close)


def _logits(model: nn.Module, tokens: TokenBatch) -> Tensor:
    """[B, T, V] that predict each token, 0 where it is not scored."""
    scored = completion_logits(model, tokens)
    return scored.call.spread(scored.logits)


def _right(case: Case, tokens: TokenBatch) -> Tensor:
    """Those of the plain copy; where the reference is rounded, its own."""
    if not case.tolerance:
        return _logits(case.plain, tokens)
    with case.reference.logits(tokens) as scored:
        return scored.call.spread(scored.logits)


def check_update_mixes_weights(case: Case) -> None:
    if not case.moves:
        with pytest.raises(ValueError, match="cannot move"):
            case.reference.update(case.policy)
        return
    tokens = batch()
    case.reference.score(tokens)  # a forward may leave shards gathered: the update must reach the next one
    case.reference.score(tokens)
    fingerprint = case.reference.fingerprint()
    case.train()
    with torch.no_grad():
        theirs = {name: layout.join(local) for name, local, layout in weights_of(unwrap(case.policy))}
        for name, tensor in named_weights(case.plain):
            # An adapter that was off is taken up as one with the policy's own first factor, and a second one of 0.
            first = case.reference.strategy == "adapter" and "lora_A" in name
            tensor.data.lerp_(theirs[name], 1.0 if first else 0.25)
    if case.start is None:
        case.reference.update(case.policy, alpha=0.25)
        assert case.reference.fingerprint() != fingerprint
        for _ in range(3):
            found, right = case.reference.score(tokens).logp, case.expected(tokens)
            # Of a rounded one what was rounded before is rounded again.
            torch.testing.assert_close(found, right, rtol=0, atol=max(2 * case.tolerance, 2e-6))
    else:  # a trained adapter that was off for its base
        case.reference.update(case.policy, alpha=1.0)
    case.reference.update(case.policy, alpha=1.0)
    with torch.no_grad():
        assert case.right(case.reference.score(tokens).logp, score_tokens(case.policy, tokens).logp)
    assert case.reference.updates == 2
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        case.reference.update(case.policy, alpha=0.0)


def check_save_and_load(case: Case) -> None:
    tokens = batch()
    if case.only_logp:
        for use in (case.reference.save, case.reference.load):
            with pytest.raises(ValueError, match=rf"{case.reference.strategy}.* has no weights in this process"):
                use(case.folder / "saved")
        assert not (case.folder / "saved").exists()
        return
    case.reference.score(tokens)  # what rounding does is measured before the policy trains
    if case.moves:
        case.train()
        case.reference.update(case.policy, alpha=0.5 if case.start is None else 1.0)
    right, fingerprint = case.reference.score(tokens).logp, case.reference.fingerprint()
    case.reference.save(case.folder / "saved")
    if dist.is_initialized():
        dist.barrier()  # one rank writes
    if case.moves:
        case.train()
        case.reference.update(case.policy)
        assert not torch.equal(case.reference.score(tokens).logp, right)
    case.reference.load(case.folder / "saved")
    assert torch.equal(case.reference.score(tokens).logp, right)
    assert case.reference.fingerprint() == fingerprint
    assert case.reference.updates == int(case.moves)
    with pytest.raises(ValueError, match="holds no saved reference"):
        case.reference.load(case.folder / "nowhere")


def check_it_is_verified_and_found_right(case: Case) -> None:
    case.reference.score(batch())
    case.reference.verify()
    case.reference.verify(3)
    if case.start is None and not case.tolerance:
        findings = refkl.check_reference(case.policy, case.reference, batch())
        assert not [finding for finding in findings if finding.verdict == "fault"], findings


def check_provenance(case: Case) -> None:
    record = case.reference.provenance()
    assert record["strategy"] == case.reference.strategy
    assert record["fingerprint"] == case.reference.score(batch()).fingerprint == case.reference.fingerprint()
    assert case.reference.reason and not case.reference.reason.endswith(".")


STEPPING = ("check_update_mixes_weights", "check_a_step_with_a_score_in_it", "check_prompts_run_once")
"""Checks that train or move the plain copy: in FSDP's mixed precision nothing plain rounds as the policy does."""
CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What scoring must leave alone: modes, requires_grad flags, gradients, hooks, and which adapters are on."""
    modes = tuple(m.training for m in model.modules())
    flags = tuple(p.requires_grad for p in model.parameters())
    grads = tuple(p.grad is None for p in model.parameters())
    hooks = tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    disabled = tuple(getattr(m, "disable_adapters", None) for m in model.modules())
    return modes, flags, grads, hooks, disabled


def plain_copy(policy: nn.Module) -> nn.Module:
    """A frozen deep copy in eval mode: the plain and memory-hungry reference."""
    return copy.deepcopy(policy).eval().requires_grad_(False)
