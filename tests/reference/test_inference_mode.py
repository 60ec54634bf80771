"""torch.inference_mode: tensors made inside it can never be written outside it, so a reference holds none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import lora, moved
from support.models import batch, gpt2, llama
from torch import nn

from refkl import KLPenalty, Reference, ReferenceConfig, build_reference, freeze, score_pair, score_tokens


def frozen_start() -> nn.Module:
    policy = llama()
    freeze(policy, ["model.embed_tokens", "model.layers.0"])
    return policy


CASES: dict[str, tuple[Callable[[], nn.Module], ReferenceConfig]] = {
    "clone": (llama, ReferenceConfig(strategy="clone")),
    "clone offloaded": (gpt2, ReferenceConfig(strategy="clone", offload=True)),
    "quantized": (gpt2, ReferenceConfig(strategy="clone", quantize="int8", max_kl_floor=10.0)),
    "swap": (gpt2, ReferenceConfig(strategy="swap")),
    "swap on the host": (llama, ReferenceConfig(strategy="swap", device="cpu")),
    "adapter": (lora, ReferenceConfig(strategy="adapter")),
    "shared_trunk": (frozen_start, ReferenceConfig(strategy="shared_trunk")),
}


def use(policy: nn.Module, reference: Reference, folder: Path) -> None:
    """All that a run does with a reference."""
    pair = score_pair(policy, reference, batch())
    KLPenalty()(pair.policy, pair.reference, batch().completion_mask).loss.backward()
    if reference.config.quantize is None:
        score_pair(policy, reference, batch(), divergence="reverse_kl").divergence.sum().backward()
    reference.update(moved(policy, 0.01), 0.5)
    reference.update(policy, 1e-5)
    reference.fingerprint()
    reference.save(folder)
    reference.load(folder)
    reference.verify()


@pytest.mark.parametrize("name", CASES)
def test_a_reference_built_inside_is_like_any_other(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    torch.manual_seed(0)
    policy = make()
    right = build_reference(policy, config).score(batch()).logp
    with torch.inference_mode():
        reference = build_reference(policy, config)
        assert torch.is_inference_mode_enabled()
    assert not any(weight.local.is_inference() for weight in reference.weights())
    assert torch.equal(reference.score(batch()).logp, right)
    use(policy, reference, tmp_path / "saved")


@pytest.mark.parametrize("name", CASES)
def test_everything_that_makes_tensors_can_be_called_inside(name: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    policy = make()
    reference = build_reference(policy, config)
    if config.quantize is None:
        reference.keep_first()
    with torch.inference_mode():
        scores = reference.score(batch())
        reference.update(policy, 1e-5)
        reference.score(batch(seed=1))
        reference.save(tmp_path / "a")
        reference.load(tmp_path / "a")
    assert not scores.logp.is_inference() and not scores.logp.requires_grad
    if config.quantize is None:
        policy.bfloat16()
        with torch.inference_mode():
            reference.score(batch(seed=2))  # casts what it holds
        with torch.no_grad():
            for weight in reference.weights():
                assert not weight.local.is_inference() or not reference.owns(weight.name)
        policy.float()
    use(policy, reference, tmp_path / "b")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("strategy", ["swap", "adapter"])
def test_a_policy_made_inside_is_refused_where_its_weights_are_shared(strategy: str) -> None:
    with torch.inference_mode():
        policy = lora() if strategy == "adapter" else gpt2()
    with pytest.raises(ValueError, match=r"was made inside torch.inference_mode.*Load the policy outside"):
        build_reference(policy, strategy)


def test_a_policy_made_inside_can_be_compared() -> None:
    with torch.inference_mode():
        policy = gpt2()
        reference = build_reference(policy, "clone")
        pair = score_pair(policy, reference, batch())
    assert torch.equal(pair.policy.logp, pair.reference.logp)


def test_the_policy_trains_after_scores_inside() -> None:
    policy = llama()
    with torch.inference_mode():
        inside = score_tokens(policy, batch()).logp
    outside = score_tokens(policy, batch()).logp
    assert torch.equal(inside, outside)
    outside.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
