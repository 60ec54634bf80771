"""Random lives of a policy and its references, beside plain deep copies that are trained and moved by hand.

After every step the references score as their copies do, and the policy's weights, gradients, buffers, modes, hooks,
adapters and requires_grad flags, and torch's random state, are as its own copy's.
"""

from __future__ import annotations

import copy
import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from peft import LoraConfig, PeftModel, get_peft_model
from support.hostile import examples
from support.models import batch, llama, shared_batch
from torch import Tensor, nn

from refkl import Reference, ReferenceConfig, TokenBatch, build_reference, score_pair, score_tokens
from refkl.backend import named_weights

SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
BATCHES = {
    "left": batch((6, 4), 2, padding="left"),
    "right": batch((5, 3, 2), 1),
    "shared": shared_batch(((0, 2), (0, 3), (1, 2)), (4, 2, 1)),
}
KINDS = {
    "all of it trains": ("clone", "auto", "streamed"),
    "its last layer trains": ("auto", "swap", "clone", "shared_trunk"),
    "LoRA": ("auto", "adapter", "swap", "clone", "shared_trunk"),
}
CLOSE = {"rtol": 0.0, "atol": 2e-5}
PICK, BATCH = st.integers(0, 1), st.sampled_from(sorted(BATCHES))


def made(kind: str) -> nn.Module:
    model = llama(**SIZE, attention_dropout=0.5)
    if kind == "LoRA":
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)).eval()
    if kind == "its last layer trains":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name or "norm.weight" in name)
    return model


def plain_logp(model: nn.Module, tokens: TokenBatch) -> Tensor:
    """Return log-probabilities [B, T] of the scored tokens, from the logits of one call of the model."""
    attention = tokens.attention_mask.long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=tokens.input_ids, attention_mask=attention, position_ids=positions).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens.input_ids[:, 1:, None])[..., 0]
    return nn.functional.pad(logp, (1, 0)).masked_fill(~tokens.completion_mask, 0.0)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def surroundings(model: nn.Module) -> dict[str, Any]:
    """Return what a reference must leave alone in a policy, besides tensors."""
    return {
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "adapters": [
            (getattr(m, "disable_adapters", None), getattr(m, "active_adapters", None)) for m in model.modules()
        ],
        "merged": [getattr(m, "merged", None) for m in model.modules()],
        "forwards": ["forward" in vars(m) for m in model.modules()],
    }


def equal(found: Tensor | None, right: Tensor | None) -> bool:
    return (found is None and right is None) or (found is not None and right is not None and torch.equal(found, right))


@dataclass(eq=False)
class Held:
    """A reference, the plain copy of what it must be, and what its copies were when it was saved."""

    reference: Reference
    plain: nn.Module
    first: nn.Module
    """Its copy when it was built."""
    saved: list[tuple[Path, nn.Module, int]] = field(default_factory=list)
    updates: int = 0
    keeps_first: bool = False


class Life(RuleBasedStateMachine):
    """One policy, one or two references of it, and the copies of all."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.folder = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.held: list[Held] = []

    def teardown(self) -> None:
        self.cleanup.close()

    @initialize(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1000), data=st.data())
    def make(self, kind: str, seed: int, data: st.DataObject) -> None:
        torch.manual_seed(seed)
        self.kind, self.policy = kind, made(kind)
        self.copy = copy.deepcopy(self.policy)
        self.around = surroundings(self.policy)
        self.build(data.draw(st.sampled_from(KINDS[kind]), label="strategy"))

    def build(self, name: str) -> None:
        config = (
            ReferenceConfig(strategy="clone", offload=True) if name == "streamed" else ReferenceConfig(strategy=name)
        )
        try:
            reference = build_reference(self.policy, config)
        except ValueError as error:
            assert "cannot work here" in str(error)
            event(f"refused: {name} where {self.kind}")
            reference = build_reference(self.policy)
        event(f"{reference.strategy} where {self.kind}")
        self.held.append(Held(reference, frozen_copy(self.copy), frozen_copy(self.copy)))

    @precondition(lambda self: len(self.held) == 1)
    @rule(data=st.data())
    def build_another(self, data: st.DataObject) -> None:
        self.build(data.draw(st.sampled_from(KINDS[self.kind]), label="strategy"))

    def pick(self, which: int) -> Held:
        return self.held[which % len(self.held)]

    # The policy.

    @rule(seed=st.integers(0, 1000), by=st.sampled_from([1e-3, 0.05, 0.2]))
    def move_the_policy(self, seed: int, by: float) -> None:
        """As an optimizer does, in place."""
        for model in (self.policy, self.copy):
            source = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in parameters(model).values():
                    if parameter.requires_grad:
                        parameter += by * torch.randn(parameter.shape, generator=source)

    @rule(which=PICK, name=BATCH, paired=st.booleans(), kind=st.sampled_from([None, "reverse_kl", "jsd"]))
    def train_a_step(self, which: int, name: str, paired: bool, kind: str | None) -> None:
        """Gradient descent, with a score of the reference between the forward and the backward pass."""
        held, tokens, modes = self.pick(which), BATCHES[name], [m.training for m in self.policy.modules()]
        self.policy.eval(), self.copy.eval()
        if paired:
            pair = score_pair(self.policy, held.reference, tokens, divergence=kind)
            torch.testing.assert_close(pair.reference.logp, plain_logp(held.plain, tokens), **CLOSE)
            logp = pair.policy.logp
        else:
            logp = score_tokens(self.policy, tokens).logp
            held.reference.score(tokens)
        right = plain_logp(self.copy, tokens)
        torch.testing.assert_close(logp, right, **CLOSE)
        logp.sum().backward(), right.sum().backward()
        with torch.no_grad():
            for (one, own), other in zip(parameters(self.policy).items(), parameters(self.copy).values(), strict=True):
                assert (own.grad is None) == (other.grad is None), one
                if own.grad is None or other.grad is None:
                    continue
                largest = max(1.0, float(other.grad.abs().max()))
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-3 * largest)
                other.grad.copy_(own.grad)  # from here on, equal bits
                for parameter in (own, other):
                    parameter -= 0.01 * parameter.grad / largest
        for model in (self.policy, self.copy):
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode

    @rule(training=st.booleans())
    def change_its_mode(self, training: bool) -> None:
        self.policy.train(training), self.copy.train(training)
        self.around = surroundings(self.policy)

    @rule(none=st.booleans())
    def zero_its_gradients(self, none: bool) -> None:
        self.policy.zero_grad(set_to_none=none), self.copy.zero_grad(set_to_none=none)

    @precondition(lambda self: isinstance(self.policy, PeftModel))
    @rule(which=PICK, name=BATCH)
    def merge_and_unmerge_its_adapter(self, which: int, name: str) -> None:
        """While it is merged, a reference scores as before or refuses. Unmerging rounds; then the bits are put back."""
        held, tokens = self.pick(which), BATCHES[name]
        self.policy.merge_adapter()
        try:
            found = held.reference.score(tokens).logp
            torch.testing.assert_close(found, plain_logp(held.plain, tokens), **CLOSE)
            event("scored while merged")
        except ValueError as error:
            assert "merged" in str(error)
            event("refused while merged")
        finally:
            self.policy.unmerge_adapter()
        with torch.no_grad():
            for own, other in zip(self.policy.parameters(), self.copy.parameters(), strict=True):
                own.copy_(other)

    # The reference.

    @rule(which=PICK, alpha=st.sampled_from([1.0, 0.5, 0.1, 1e-3]), seed=st.integers(0, 1000), train=st.booleans())
    def update(self, which: int, alpha: float, seed: int, train: bool) -> None:
        """Move the reference, perhaps right after a step of the policy; each weight is as one computed in fp64."""
        held = self.pick(which)
        if train:
            self.move_the_policy(seed, 0.05)
        taken_up = held.reference.strategy == "adapter"  # with the policy's own first factors, and second ones of 0
        held.reference.update(self.policy, alpha)
        held.updates += 1
        theirs = parameters(self.copy)
        for name, tensor in parameters(held.plain).items():
            share = 1.0 if taken_up and "lora_A" in name else alpha
            if theirs[name].requires_grad:
                tensor.data = (tensor.data.double().lerp(theirs[name].detach().double(), share)).float()
        plain = dict(named_weights(held.plain))
        copied = {name for name, tensor in named_weights(self.copy) if tensor.requires_grad}
        for name, own, _ in held.reference.weights():
            close = {"rtol": 0.0, "atol": 0.0 if alpha == 1.0 and name in copied else 1e-6}
            torch.testing.assert_close(own, plain[name], msg=lambda text, name=name: f"{name}: {text}", **close)

    @rule(which=PICK, alpha=st.sampled_from([0.0, -0.5, 1.5, math.nan]))
    def update_by_nonsense(self, which: int, alpha: float) -> None:
        with pytest.raises(ValueError, match="alpha"):
            self.pick(which).reference.update(self.policy, alpha)

    @rule(which=PICK)
    def save(self, which: int) -> None:
        held = self.pick(which)
        folder = self.folder / f"{which}-{len(held.saved)}"
        held.reference.save(folder)
        held.saved.append((folder, frozen_copy(held.plain), held.updates))

    @rule(which=PICK, data=st.data())
    def load(self, which: int, data: st.DataObject) -> None:
        held = self.pick(which)
        if not held.saved:
            with pytest.raises(ValueError, match="holds no saved reference"):
                held.reference.load(self.folder / "nowhere")
            return
        folder, plain, updates = data.draw(st.sampled_from(held.saved), label="saved")
        held.reference.load(folder)
        held.plain, held.updates = frozen_copy(plain), updates

    @rule(which=PICK)
    def keep_first(self, which: int) -> None:
        held = self.pick(which)
        if held.updates or held.keeps_first:
            return
        held.reference.keep_first()
        held.keeps_first, held.first = True, frozen_copy(held.plain)

    @rule(which=PICK, name=BATCH, fails=st.booleans())
    def show_first(self, which: int, name: str, fails: bool) -> None:
        held, tokens = self.pick(which), BATCHES[name]
        if not held.keeps_first:
            return
        try:
            with held.reference.first():
                torch.testing.assert_close(held.reference.score(tokens).logp, plain_logp(held.first, tokens), **CLOSE)
                with pytest.raises(ValueError, match="first"):
                    held.reference.update(self.policy)
                if fails:
                    raise KeyError("in the middle")
        except KeyError:
            assert fails

    @rule(which=PICK, name=BATCH, fails=st.booleans())
    def keep_active(self, which: int, name: str, fails: bool) -> None:
        """Nested, with scores inside it, a score of the other reference, and perhaps an error."""
        held, tokens = self.pick(which), BATCHES[name]
        try:
            with held.reference.keep_active(), held.reference.keep_active():
                for _ in range(2):
                    found = held.reference.score(tokens).logp
                    torch.testing.assert_close(found, plain_logp(held.plain, tokens), **CLOSE)
                for other in self.held:
                    self.scored_or_refused(other, tokens)
                if fails:
                    raise KeyError("in the middle")
        except KeyError:
            assert fails

    def scored_or_refused(self, held: Held, tokens: TokenBatch) -> None:
        """Score inside another reference's context: right, or refused because the policy is in use."""
        try:
            found = held.reference.score(tokens).logp
        except ValueError as error:
            assert "is open" in str(error)
            return
        torch.testing.assert_close(found, plain_logp(held.plain, tokens), **CLOSE)

    @rule(which=PICK, name=BATCH, inside=st.sampled_from(["policy", "update", "save", "other", "error"]))
    def hold_logits(self, which: int, name: str, inside: str) -> None:
        """While its logits are held, everything else is right or refused."""
        held, tokens = self.pick(which), BATCHES[name]
        try:
            with held.reference.logits(tokens) as scored:
                assert not scored.logits.requires_grad
                if inside == "policy":
                    with torch.no_grad():
                        modes = self.policy.training
                        found = score_tokens(self.policy.eval(), tokens).logp
                        self.policy.train(modes)
                    torch.testing.assert_close(found, plain_logp(frozen_copy(self.copy), tokens), **CLOSE)
                elif inside == "update":
                    held.reference.update(self.policy, 0.0)
                elif inside == "save":
                    held.reference.save(self.folder / "never")
                    pytest.fail("saved while it is in use")
                elif inside == "other":
                    self.scored_or_refused(self.held[-1], tokens)
                else:
                    raise KeyError("in the middle")
        except ValueError as error:
            assert "open" in str(error) or "alpha" in str(error)
            self.policy.train(self.copy.training)
        except KeyError:
            assert inside == "error"

    @rule(which=PICK, name=BATCH, layer=st.integers(0, 1))
    def fail_in_a_forward(self, which: int, name: str, layer: int) -> None:
        held = self.pick(which)
        ran = getattr(held.reference, "model", self.policy)
        module = next((m for n, m in ran.named_modules() if n.endswith(f"layers.{layer}")), None)
        if module is None:
            return

        def fail(*args: Any) -> None:
            raise RuntimeError("in the middle")

        hook = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(RuntimeError, match="in the middle"):
                held.reference.score(BATCHES[name])
        finally:
            hook.remove()

    @rule(which=PICK, data=st.data())
    def tamper_with_it(self, which: int, data: st.DataObject) -> None:
        """A weight that changes without an update is named by `verify`."""
        held = self.pick(which)
        held.reference.fingerprint()
        weights = list(held.reference.weights())
        weight = data.draw(st.sampled_from(weights), label="weight")
        before = weight.local.detach().clone()
        with torch.no_grad():
            weight.local.detach().view(-1)[0] += 1.0
        try:
            with pytest.raises(ValueError, match=weight.name.split(".")[-2]):
                held.reference.verify()
        finally:
            with torch.no_grad():
                weight.local.detach().copy_(before)

    @rule(which=PICK, count=st.sampled_from([None, 1, 3]))
    def verify(self, which: int, count: int | None) -> None:
        self.pick(which).reference.verify(count)

    # What always holds.

    @invariant()
    def references_score_as_their_copies(self) -> None:
        for number, held in enumerate(self.held):
            tokens = BATCHES[sorted(BATCHES)[(number + held.updates) % len(BATCHES)]]
            random = torch.get_rng_state()
            scores = held.reference.score(tokens, entropy=True)
            assert torch.equal(torch.get_rng_state(), random)
            torch.testing.assert_close(scores.logp, plain_logp(held.plain, tokens), **CLOSE)
            assert not scores.logp.requires_grad and held.reference.updates == held.updates

    @invariant()
    def the_policy_is_as_its_copy(self) -> None:
        if not self.held:
            return
        for (name, own), other in zip(self.policy.named_parameters(), self.copy.parameters(), strict=True):
            assert torch.equal(own, other), name
            assert equal(own.grad, other.grad), f"the gradient of {name}"
        for (name, own), other in zip(self.policy.named_buffers(), self.copy.buffers(), strict=True):
            assert torch.equal(own, other), name
        assert surroundings(self.policy) == self.around


TestLives = Life.TestCase
TestLives.settings = examples(25, stateful_step_count=14)
