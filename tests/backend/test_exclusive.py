"""While a reference has borrowed the policy, nothing else runs it: contexts in any order, threads, and moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, gpt2, llama
from torch import Tensor, nn

from refkl import Reference, build_reference, score_pair, score_tokens


def lora(base: nn.Module) -> nn.Module:
    target = ["q_proj"] if hasattr(base.config, "num_key_value_heads") else ["c_attn"]
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=target))


BORROWERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "swap of llama": (llama, "swap"),
    "swap of gpt2": (gpt2, "swap"),
    "adapter of llama": (lambda: lora(llama()), "adapter"),
    "adapter of gpt2": (lambda: lora(gpt2()), "adapter"),
}
CASES = BORROWERS | {"clone of llama": (llama, "clone")}
CONTEXTS: dict[str, Callable[[Reference], AbstractContextManager[Any]]] = {
    "keep_active": lambda reference: reference.keep_active(),
    "logits": lambda reference: reference.logits(batch()),
}


def built(case: str) -> tuple[nn.Module, Reference, Tensor, Tensor]:
    """A policy that has trained since its reference was built, and the right scores of both."""
    make, strategy = CASES[case]
    policy = make()
    reference = build_reference(policy, strategy)
    right = reference.score(batch()).logp
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        own = score_tokens(policy, batch()).logp
    assert float((own - right).abs().max()) > 1e-2
    return policy, reference, own, right


def scored(policy: nn.Module) -> Tensor:
    with torch.no_grad():
        return score_tokens(policy, batch()).logp


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("case", BORROWERS)
def test_the_policy_is_not_scored_while_it_is_borrowed(case: str, context: str) -> None:
    policy, reference, own, right = built(case)
    with CONTEXTS[context](reference):
        for run in (score_pair, lambda *given: score_tokens(given[0], given[2])):
            with pytest.raises(ValueError, match=rf"reference\.{context} is open, so the policy holds"):
                run(policy, reference, batch())
        assert torch.equal(reference.score(batch()).logp, right)
    assert torch.equal(scored(policy), own) and torch.equal(reference.score(batch()).logp, right)


@pytest.mark.parametrize("outer", CONTEXTS)
@pytest.mark.parametrize("inner", CONTEXTS)
@pytest.mark.parametrize("case", CASES)
def test_contexts_of_one_reference_nest(case: str, inner: str, outer: str) -> None:
    policy, reference, own, right = built(case)
    with CONTEXTS[outer](reference), CONTEXTS[inner](reference):
        assert torch.equal(reference.score(batch()).logp, right)
    assert torch.equal(scored(policy), own) and torch.equal(reference.score(batch()).logp, right)


@pytest.mark.parametrize("case", CASES)
def test_nothing_moves_or_is_saved_while_it_runs(case: str, tmp_path: Path) -> None:
    policy, reference, own, right = built(case)
    reference.keep_first()
    uses: list[Callable[[], Any]] = [
        lambda: reference.update(policy),
        lambda: reference.save(tmp_path / "saved"),
        lambda: reference.load(tmp_path / "saved"),
        reference.keep_first,
        lambda: reference.first().__enter__(),
    ]
    for use in uses:
        with reference.logits(batch()), pytest.raises(ValueError, match="is open and uses the reference's weights"):
            use()
        with reference.first(), pytest.raises(ValueError, match=r"reference\.first\(\) is open"):
            use()
    assert not list(tmp_path.iterdir())
    assert torch.equal(scored(policy), own) and torch.equal(reference.score(batch()).logp, right)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("case", BORROWERS)
def test_two_references_of_one_policy_do_not_mix(case: str, context: str) -> None:
    policy, reference, own, right = built(case)
    other = build_reference(policy, "swap")
    with CONTEXTS[context](reference), pytest.raises(ValueError, match="of another reference is open"):
        other.score(batch())
    assert torch.equal(other.score(batch()).logp, own) and torch.equal(reference.score(batch()).logp, right)


@pytest.mark.parametrize("case", CASES)
def test_threads_wait_for_each_other(case: str) -> None:
    policy, reference, own, right = built(case)
    wrong: list[str] = []

    def of_reference() -> None:
        for _ in range(15):
            if not torch.equal(reference.score(batch()).logp, right):
                wrong.append("reference")

    def of_policy() -> None:
        for _ in range(15):
            if not torch.equal(scored(policy), own):
                wrong.append("policy")

    done: list[int] = []

    def counted(work: Callable[[], None]) -> None:
        work()
        done.append(1)

    threads = [threading.Thread(target=counted, args=(w,)) for w in (of_reference, of_reference, of_policy)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(done) == 3 and not wrong
    assert torch.equal(scored(policy), own)
