"""Checks that a reference is the intended one, on a policy, its reference and a batch, before a run and during it.

Each check returns a Finding: the property that was checked, the result, and what to do if that is wrong. The checks
change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refkl.backend import (
    base_model,
    dropout_rates,
    evaluating,
    full_shape,
    learned_prompt,
    local_shard,
    named_weights,
    reshard,
    unwrap,
)
from refkl.kl import estimate
from refkl.messages import size
from refkl.reference import Reference, score_pair
from refkl.scoring import score_tokens
from refkl.types import TokenBatch

_OVER_FLOOR = 4.0
"""A KL at step 0 of more than this many times the floor is a fault. Different texts account for smaller factors."""
Verdict = Literal["ok", "note", "fault"]
_Score = Callable[[TokenBatch], Tensor]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """The property that was checked."""
    verdict: Verdict
    """"ok"; "note": legitimate but worth knowing; "fault": the run would not do what it seems to do."""
    found: str
    """The measured result."""
    advice: str = ""
    """The recommended action; empty for "ok"."""


def check_held(
    policy: nn.Module,
    reference: Reference,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Finding]:
    """Check shared memory, gradients, the optimizer and memory use, without a forward pass.

    Args:
        policy, reference, optimizer: as in `check_reference`.
    """
    inner = unwrap(policy)
    reshard(inner)
    findings = [_shared(inner, reference), _frozen(reference)]
    if optimizer is not None:
        findings.append(_in_optimizer(optimizer, reference))
    findings.append(_memory(reference))
    return findings


def check_reference(
    policy: nn.Module,
    reference: Reference,
    batch: TokenBatch,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    vocabulary: int | None = None,
    temperature: float = 1.0,
) -> list[Finding]:
    """Run all checks that are possible before the first step. If weights are sharded, every rank must call this.

    Args:
        policy: the policy, wrapped as in training and not yet trained.
        reference: from build_reference.
        batch: some real sequences. Use rows of different lengths, so that the effect of padding shows.
        optimizer: the policy's.
        vocabulary: number of tokens of the tokenizer.
        temperature: divides the logits.

    Returns:
        One finding per check, in a fixed order.
    """
    inner = unwrap(policy)
    findings = check_held(policy, reference, optimizer=optimizer)
    if vocabulary is not None:
        findings.append(check_vocabulary(policy, reference, vocabulary))

    def of_policy(tokens: TokenBatch) -> Tensor:
        with torch.no_grad():
            return score_tokens(policy, tokens, temperature=temperature).logp

    def of_reference(tokens: TokenBatch) -> Tensor:
        return reference.score(tokens, temperature=temperature).logp

    if reference.freed:
        raise ValueError("The reference's weights were freed, so they cannot be checked. Check before freeing them.")
    reference = reference.uncached  # cached scores would be equal whatever the model does
    with _seeded():
        if reference.config.quantize is not None and reference.config.source == "policy":
            findings.append(_step_zero_quantized(policy, reference, batch))
        else:
            findings.append(_step_zero(inner, reference, batch, of_policy, of_reference))
        findings.append(_reference_dropout(inner, batch, of_reference))
        findings.append(_policy_dropout(inner, batch, of_policy))
        findings.append(_padding(inner, reference, batch, of_policy, of_reference))
    findings.append(_unchanged(reference))
    return findings


def _shared(policy: nn.Module, reference: Reference) -> Finding:
    check = "policy and reference share no trainable weights"
    trained = {_memory_of(local_shard(p)): name for name, p in named_weights(policy) if p.requires_grad}
    for name, local, _ in reference.weights():
        if local.numel() and (theirs := trained.get(_memory_of(local))) is not None:
            return Finding(
                check,
                "fault",
                f"{name} of the reference shares memory with {theirs} of the policy, which is trainable",
                "training would move the reference with the policy: build the reference with build_reference, after "
                "the last change of requires_grad",
            )
    return Finding(check, "ok", f"{len(trained)} trainable tensors, none of them in the reference")


def _frozen(reference: Reference) -> Finding:
    check = "the reference does not train"
    own = getattr(reference, "model", None)
    wrong = [] if own is None else [n for n, p in own.named_parameters() if p.requires_grad or p.grad is not None]
    if wrong:
        return Finding(
            check, "fault", f"{wrong[0]} requires grad or has one", "freeze it: reference.model.requires_grad_(False)"
        )
    return Finding(check, "ok", "none of its weights requires grad")


def _in_optimizer(optimizer: torch.optim.Optimizer, reference: Reference) -> Finding:
    check = "the optimizer does not hold the reference"
    held = {_memory_of(local_shard(p)) for group in optimizer.param_groups for p in group["params"]}
    for name, local, _ in reference.weights():
        if reference.owns(name) and local.numel() and _memory_of(local) in held:
            return Finding(
                check,
                "fault",
                f"{name} of the reference is among the parameters of the optimizer",
                "give the optimizer only refkl.trainable_parameters(policy)",
            )
    return Finding(check, "ok", f"{len(held)} tensors in the optimizer, none of them of the reference")


def _memory(reference: Reference) -> Finding:
    held = reference.memory()
    where = [f"{size(n)} on the {place}" for place, n in (("device", held.device), ("host", held.host)) if n]
    return Finding("memory", "ok", f"{reference.strategy} adds {' and '.join(where) or 'nothing'} on this rank")


def check_vocabulary(policy: nn.Module, reference: Reference, vocabulary: int) -> Finding:
    """Check that policy and reference have a logit for each token of the tokenizer, and equally many logits."""
    check = "tokenizer and logits agree"
    widths = {"policy": _width(policy)}
    own = getattr(reference, "model", None)
    if own is not None:
        widths["reference"] = _width(own)
    for side, width in widths.items():
        if width is not None and width < vocabulary:
            return Finding(
                check,
                "fault",
                f"the tokenizer has {vocabulary} tokens and the {side} {width} logits",
                "load the model's own tokenizer, or resize_token_embeddings before build_reference",
            )
    if len(known := {w for w in widths.values() if w is not None}) > 1:
        return Finding(
            check,
            "fault",
            f"the policy has {widths['policy']} logits and the reference {widths['reference']}",
            "build the reference after the vocabulary was resized",
        )
    return Finding(check, "ok", f"{vocabulary} tokens, {', '.join(map(str, known)) or 'unknown'} logits")


def _step_zero(
    policy: nn.Module, reference: Reference, batch: TokenBatch, of_policy: _Score, of_reference: _Score
) -> Finding:
    check = "the KL is 0 before the first step"
    with evaluating(policy):
        now, then = of_policy(batch), of_reference(batch)
    if torch.equal(now, then):
        return Finding(check, "ok", "exactly 0.0 for each token")
    kl = _kl(now, then, batch)
    found = f"{kl:.3g} nats per token; the largest difference is {float((now - then).abs().max()):.3g}"
    if (why := why_not_zero(policy, reference)) is not None:
        return Finding(check, "note", found, why)
    return Finding(check, "fault", found, CHANGED)


CHANGED = (
    "the policy was changed after the reference was built, or its output does not depend only on its weights: build "
    "the reference right before training"
)
"""The cause of an unexpected KL before the first step."""


def why_not_zero(policy: nn.Module, reference: Reference) -> str | None:
    """Return why the KL of an untrained policy need not be 0; None if it must be (except for the policy's dropout)."""
    config = reference.config
    if config.source != "policy":
        return f"reference.source is {config.source!r}: the reference is meant to be another model"
    if (prompt := learned_prompt(policy)) is not None:
        return (
            f"a learned prompt ({prompt.kind}) changes the policy from the start, and the reference is the bare base "
            "without it: the KL begins at this value instead of 0"
        )
    if config.dtype is not None:
        return f"reference.dtype is {config.dtype!r}: a KL below this floor is only rounding"
    if config.quantize is not None:
        return f"reference.quantize is {config.quantize!r}: a KL below its floor is only rounding"
    return None


def _step_zero_quantized(policy: nn.Module, reference: Reference, batch: TokenBatch) -> Finding:
    """Check the exact KL against the floor, which is exact too: on tokens that the policy did not sample, k3 does not
    estimate the KL."""
    check = "the KL is 0 before the first step"
    with torch.no_grad(), evaluating(unwrap(policy)):
        pair = score_pair(policy, reference, batch, divergence="reverse_kl")
    floor = reference.kl_floor
    mask = batch.completion_mask
    if floor is None or pair.divergence is None or not mask.any():
        return Finding(check, "note", "no token is scored", "give check_reference a batch with a completion")
    kl = float(pair.divergence[mask].mean())
    found = f"{kl:.3g} nats per token; the floor from quantising is {floor.mean:.3g} (at most {floor.max:.3g})"
    if kl <= _OVER_FLOOR * floor.mean:
        kind = reference.config.quantize
        return Finding(check, "note", found, f"reference.quantize is {kind!r}: a KL below this floor is rounding")
    return Finding(
        check,
        "fault",
        found,
        "the policy was changed after the reference was built, or its floor was measured on very different text: build "
        "the reference right before training, and calibrate it on data of the run",
    )


def _reference_dropout(policy: nn.Module, batch: TokenBatch, of_reference: _Score) -> Finding:
    check = "the reference has no dropout"
    with _training(policy):
        torch.manual_seed(1)
        first = of_reference(batch)
        torch.manual_seed(2)
        second = of_reference(batch)
    if torch.equal(first, second):
        return Finding(check, "ok", "two scores are equal, even with the policy in training mode")
    return Finding(
        check,
        "fault",
        f"two scores of the same tokens differ by up to {float((first - second).abs().max()):.3g}",
        "a part of the model draws random numbers in eval mode: find a custom layer, or a forward that calls F.dropout "
        "with training=True",
    )


def _policy_dropout(policy: nn.Module, batch: TokenBatch, of_policy: _Score) -> Finding:
    check = "the policy has no dropout"
    with evaluating(policy):
        off = of_policy(batch)
    with _training(policy):
        torch.manual_seed(1)
        on = of_policy(batch)
    if torch.equal(on, off):
        return Finding(check, "ok", "training mode gives the same scores")
    kl, names = _kl(on, off, batch), _dropouts(policy)
    where = f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
    return Finding(
        check,
        "note",
        f"training mode by itself gives a KL of {kl:.3g} nats per token{where}",
        "set the dropout rates to 0 if the KL should measure only training; TRL does so with disable_dropout",
    )


def _padding(
    policy: nn.Module, reference: Reference, batch: TokenBatch, of_policy: _Score, of_reference: _Score
) -> Finding:
    check = "padding does not change scores"
    exact = all(p.dtype in (torch.float32, torch.float64) for p in policy.parameters() if p.is_floating_point())
    # Each model rounds in its own dtype, and rounding differs between batches of different width.
    coarse = reference.config.dtype not in (None, "float32", "float64")
    found = [(0.0, 0.0, "policy")]  # (difference / limit, difference in nats, model)
    for name, score, rounds in (("policy", of_policy, not exact), ("reference", of_reference, coarse or not exact)):
        allowed = 0.1 if rounds else 1e-3
        with evaluating(policy):
            there = score(batch)[batch.completion_mask]
            for left in (False, True):
                other = repadded(batch, left=left, extra=3)
                far = float((score(other)[other.completion_mask] - there).abs().max()) if there.numel() else 0.0
                found.append((far / allowed, far, name))
    ratio, worst, side = max(found)
    if ratio <= 1:
        return Finding(check, "ok", f"3 more columns on the left or right change scores by {worst:.1g} nats at most")
    return Finding(
        check,
        "fault",
        f"the {side}'s scores of the same tokens differ by up to {worst:.3g} nats",
        "the model does not use position_ids or the attention mask as other models do: pad on the side that it was "
        "trained with, and set TokenBatch.position_ids",
    )


def _unchanged(reference: Reference) -> Finding:
    check = "the reference is as it was built"
    try:
        reference.verify()
    except ValueError as error:
        return Finding(check, "fault", str(error), "look for code that writes to the policy's frozen weights")
    return Finding(check, "ok", f"fingerprint {reference.fingerprint()[:12]}")


def repadded(batch: TokenBatch, *, left: bool, extra: int) -> TokenBatch:
    """Return the same sequences padded on one side, with `extra` more columns, for the model to read as they are."""
    width = batch.input_ids.shape[1] + extra
    rows: list[list[Tensor]] = []
    for ids, attention, scored in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        real = attention.bool()
        missing = width - int(real.sum())
        pad = (missing, 0) if left else (0, missing)
        rows.append([nn.functional.pad(t[real], pad) for t in (ids, attention, scored.long())])
    ids, attention, scored = (torch.stack(column) for column in zip(*rows, strict=True))
    return TokenBatch(ids, attention, scored.bool(), model_inputs=batch.model_inputs, prefix="off")


def _kl(logp: Tensor, ref_logp: Tensor, batch: TokenBatch) -> float:
    """Estimate the KL with k3, in nats per scored token."""
    mask = batch.completion_mask
    return float(estimate(logp[mask], ref_logp[mask], "k3", gradient="none").mean()) if mask.any() else 0.0


def _dropouts(model: nn.Module) -> list[str]:
    """List the model's dropout modules and their rates."""
    return [
        f"{name}: {rate:g}" if key == "p" else f"{name}.{key}: {rate:g}"
        for name, module in model.named_modules()
        for key, rate in dropout_rates(module).items()
    ]


def _width(model: nn.Module) -> int | None:
    """Return the number of logits of a model."""
    head = base_model(model).get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    return full_shape(weight)[0] if isinstance(weight, Tensor) and len(full_shape(weight)) == 2 else None


def _memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    """Return the device and address of a tensor's data. The storage would not do: DeepSpeed puts many parameters in
    one."""
    return tensor.device, tensor.data_ptr()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Switch to training mode; restore each submodule's mode on exit."""
    before = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _seeded() -> Iterator[None]:
    """Restore the random state on exit, so that seeds set inside do not leak."""
    devices: list[Any] = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
