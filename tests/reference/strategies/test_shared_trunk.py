"""`shared_trunk`: frozen lower layers run once for policy and reference, and nothing else changes by it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import batch, gpt2, gpt_neox, llama, qwen2
from torch import Tensor, nn

from refkl import (
    PairScores,
    ReferenceConfig,
    TokenBatch,
    build_reference,
    freeze,
    score_pair,
    score_tokens,
    trainable_parameters,
)
from refkl.backend import Backend, decoder_layers, evaluating
from refkl.reference import BuildRequest, CloneReference, SharedTrunkReference, Step
from refkl.reference.strategies.shared_trunk import _differs
from refkl.scoring import prepare

LAYERS, DEPTH = 4, 2


def _frozen(model: nn.Module, *patterns: str) -> nn.Module:
    freeze(model, [*patterns])
    return model


def _llama(**options: Any) -> nn.Module:
    options = {"num_hidden_layers": LAYERS, **options}
    return _frozen(llama(**options), "model.embed_tokens", "model.layers.0", "model.layers.1")


def _gpt2(**options: Any) -> nn.Module:
    return _frozen(gpt2(n_layer=LAYERS, **options), "transformer.wte", "transformer.wpe", "transformer.h.0",
                   "transformer.h.1")  # fmt: skip


def _gpt_neox() -> nn.Module:
    return _frozen(gpt_neox(num_hidden_layers=LAYERS), "gpt_neox.embed_in", "gpt_neox.layers.0", "gpt_neox.layers.1")


def _qwen2() -> nn.Module:
    return _frozen(qwen2(num_hidden_layers=LAYERS), "model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head")


def _lora() -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3], lora_dropout=0.5)
    model = get_peft_model(llama(num_hidden_layers=LAYERS), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "qwen2": _qwen2,
    "a trained LoRA above": _lora,
}


@contextmanager
def _runs(*models: nn.Module) -> Iterator[list[int]]:
    """How often each layer's attention ran, over all the models: [L]."""
    counts, hooks = [0] * LAYERS, []

    def count(place: int) -> None:
        counts[place] += 1

    for model in models:
        layers = decoder_layers(model)
        assert layers is not None
        for place, layer in enumerate(layers):
            attention = next(m for name, m in layer.named_children() if "attn" in name or name == "attention")
            hooks.append(attention.register_forward_pre_hook(lambda *_, place=place: count(place)))
    for model in models:  # a packed row is tried once in each state, and counting is a new one
        prepare(model, batch())
        with evaluating(model):
            prepare(model, batch())
    counts[:] = [0] * LAYERS
    yield counts
    for hook in hooks:
        hook.remove()


def _train(policy: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _gradients(policy: nn.Module, pair: PairScores) -> list[Tensor]:
    weights = torch.linspace(-1, 1, pair.policy.logp.numel()).view_as(pair.policy.logp)
    loss = (pair.policy.logp * weights).sum()
    if pair.divergence is not None:
        loss = loss + pair.divergence.sum()
    loss.backward()
    found = [p.grad for p in trainable_parameters(policy)]
    policy.zero_grad()
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("divergence", [None, "reverse_kl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_pair_is_that_of_a_plain_clone_and_the_trunk_ran_once(
    name: str, padding: str, divergence: str | None
) -> None:
    policy, tokens = POLICIES[name](), batch(padding=padding)
    twin = copy.deepcopy(policy)
    reference, plain = build_reference(policy, "shared_trunk"), build_reference(twin, "clone")
    assert isinstance(reference, SharedTrunkReference)
    _train(policy)
    _train(twin)
    right = score_pair(twin, plain, tokens, temperature=0.7, entropy=True, divergence=divergence)
    score_pair(policy, reference, tokens)  # the first of all is checked on the reference's side, too
    with _runs(policy, reference.model) as counts:
        found = score_pair(policy, reference, tokens, temperature=0.7, entropy=True, divergence=divergence)
    assert counts == [1] * DEPTH + [2] * (LAYERS - DEPTH)
    assert (right.policy.logp - right.reference.logp).abs().max() > 1e-2
    for ours, theirs in ((found.policy, right.policy), (found.reference, right.reference)):
        assert torch.equal(ours.logp, theirs.logp)
        assert ours.entropy is not None and theirs.entropy is not None and torch.equal(ours.entropy, theirs.entropy)
    if divergence is not None:
        assert found.divergence is not None and right.divergence is not None
        assert torch.equal(found.divergence, right.divergence)
    for ours, theirs in zip(_gradients(policy, found), _gradients(twin, right), strict=True):
        assert torch.equal(ours, theirs)


def test_a_pair_through_the_logits_runs_the_trunk_once() -> None:
    """Where the heads cannot be compared inside the policy's forward, the policy is the first of the two."""
    policy = _frozen(llama(num_hidden_layers=LAYERS), "model.embed_tokens", "model.layers.0", "model.layers.1")
    policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["lm_head"], layers_to_transform=None))
    reference = build_reference(policy, "shared_trunk")
    nn.init.normal_(policy.base_model.model.lm_head.lora_B["default"].weight, std=0.3)
    tokens = batch()
    with _runs(policy, reference.model) as counts:
        pair = score_pair(policy, reference, tokens, divergence="reverse_kl")
    assert counts == [1 + 1] * LAYERS, "the whole stack is frozen: once to check, once for both"
    assert torch.equal(pair.reference.logp, reference.score(tokens).logp)
    assert pair.divergence is not None and pair.divergence.max() > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inputs_require_grad", [True, False])
def test_gradient_checkpointing(reentrant: bool, inputs_require_grad: bool) -> None:
    """The gradients of a plain backward, and the trunk is not run again in it."""
    policy, tokens = _llama(), batch()
    plain = copy.deepcopy(policy)
    right = _gradients(plain, score_pair(plain, build_reference(plain, "clone"), tokens))
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if inputs_require_grad:
        policy.enable_input_require_grads()  # type: ignore[operator]
    policy.train()
    reference = build_reference(policy, "shared_trunk")
    score_pair(policy, reference, tokens)
    with _runs(policy, reference.model) as counts:
        found = _gradients(policy, score_pair(policy, reference, tokens))
    assert counts == [1] * DEPTH + [3] * (LAYERS - DEPTH)
    layers = decoder_layers(policy)
    assert layers is not None and all(layer.gradient_checkpointing for layer in layers)
    for ours, theirs in zip(found, right, strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_in_a_training_trunk_is_not_the_references() -> None:
    policy = _gpt2(resid_pdrop=0.5)
    reference, tokens = build_reference(policy, "shared_trunk"), batch()
    right = score_pair(policy, reference, tokens).reference.logp  # the heads are found, by a forward of their own
    policy.train()
    with _runs(policy, reference.model) as counts:
        pair = score_pair(policy, reference, tokens)
    assert counts == [2] * LAYERS
    assert torch.equal(pair.reference.logp, right) and not torch.equal(pair.policy.logp, right)
    policy.eval()
    with _runs(policy, reference.model) as counts:
        assert torch.equal(score_pair(policy, reference, tokens).policy.logp, right)
    assert counts == [1] * DEPTH + [2] * (LAYERS - DEPTH)


def test_dropout_above_the_trunk_is_no_matter() -> None:
    policy = _lora()
    reference = build_reference(policy, "shared_trunk")
    policy.train()
    score_pair(policy, reference, batch())
    with _runs(policy, reference.model) as counts:
        score_pair(policy, reference, batch())
    assert counts == [1] * DEPTH + [2] * (LAYERS - DEPTH)


def test_noise_on_the_embeddings_is_not_the_references() -> None:
    policy = _llama()
    reference, tokens = build_reference(policy, "shared_trunk"), batch()
    right = score_pair(policy, reference, tokens)
    policy.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, args, out: out + torch.randn_like(out)
    )
    with _runs(policy, reference.model) as counts:
        pair = score_pair(policy, reference, tokens)
    assert counts == [2] * LAYERS
    assert torch.equal(pair.reference.logp, right.reference.logp)
    assert not torch.equal(pair.policy.logp, right.policy.logp)


def test_a_score_that_raises_leaves_both_as_they_were() -> None:
    policy, tokens = _llama(), batch()
    reference = build_reference(policy, "shared_trunk")
    right = score_pair(policy, reference, tokens)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    hook = policy.get_submodule("model.layers.3").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        score_pair(policy, reference, tokens)
    hook.remove()
    for model in (policy, reference.model):
        assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(score_pair(policy, reference, tokens).policy.logp, right.policy.logp)
    # Each alone, outside of a pair, runs all of its layers.
    with _runs(policy, reference.model) as counts:
        assert torch.equal(reference.score(tokens).logp, right.reference.logp)
    assert counts == [1] * LAYERS


def test_a_weight_that_trains_under_the_trunk_is_found() -> None:
    policy = _frozen(gpt2(n_layer=LAYERS), "transformer.wte", "transformer.h.0")
    reference = build_reference(policy, "shared_trunk")
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight trains and runs before the frozen layers"):
        score_pair(policy, reference, batch())


def test_layers_that_need_more_than_the_one_below_are_found() -> None:
    policy = _llama()
    reference = build_reference(policy, "shared_trunk")
    for model in (policy, reference.model):
        kept: dict[str, Tensor] = {}
        model.get_submodule("model.layers.0.mlp").register_forward_hook(
            lambda m, a, out, kept=kept: kept.update(out=out)
        )

        def reach_down(module: nn.Module, args: Any, out: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
            return out + kept.pop("out", 0.0)

        model.get_submodule("model.layers.3.mlp").register_forward_hook(reach_down)
    with pytest.raises(ValueError, match="need more than the output of the last frozen layer"):
        score_pair(policy, reference, batch())


def test_what_has_no_trunk_is_refused() -> None:
    cases: list[tuple[nn.Module, ReferenceConfig | str, str]] = [
        (llama(), "shared_trunk", "the lowest layer is not frozen"),
        (_frozen(llama(), "model.layers.0"), "shared_trunk", "the lowest layer is not frozen, or the embeddings"),
        (_frozen(llama(tie_word_embeddings=True), "model.layers.0"), "shared_trunk", "the lowest layer is not frozen"),
        (_llama(), ReferenceConfig(strategy="shared_trunk", dtype="bfloat16"), "cannot be set"),
        (_llama(), ReferenceConfig(strategy="shared_trunk", source="pretrained"), "cannot be set"),
        (_llama(), ReferenceConfig(strategy="shared_trunk", offload=True), "cannot be set"),
        (_llama(), ReferenceConfig(strategy="shared_trunk", quantize="int8"), "cannot be set"),
    ]
    for policy, config, words in cases:
        with pytest.raises(ValueError, match=words):
            build_reference(policy, config)


def test_a_layer_unfrozen_later_is_refused() -> None:
    policy = _llama()
    reference = build_reference(policy, "shared_trunk")
    policy.get_submodule("model.layers.1").requires_grad_(True)
    with pytest.raises(ValueError, match="trains now, but did not when the reference was built"):
        score_pair(policy, reference, batch())


def test_it_counts_the_forward_that_it_saves() -> None:
    policy = _llama()
    step = Step(2, 8, LAYERS, 32)
    request = BuildRequest(policy, ReferenceConfig(), Backend("plain", 1), None, step)
    clone, trunk = (s.cost(request) for s in (CloneReference, SharedTrunkReference))
    projections = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # of a layer: four of the attention, three of the MLP
    assert clone.flops - trunk.flops == DEPTH * 2 * 16 * (projections + 8 * 32)
    assert clone.device == trunk.device


def test_auto_takes_it_by_name_alone() -> None:
    assert build_reference(_llama()).strategy == "swap"


def test_tokens(recwarn: pytest.WarningsRecorder) -> None:
    """Rows of which nothing is scored, and one row alone."""
    policy = _llama()
    reference = build_reference(policy, "shared_trunk")
    tokens = batch()
    nothing = TokenBatch(tokens.input_ids, tokens.attention_mask, torch.zeros_like(tokens.completion_mask))
    assert not score_pair(policy, reference, nothing).policy.logp.any()
    pair = score_pair(policy, reference, TokenBatch(*(t[:1] for t in (tokens.input_ids, tokens.attention_mask,
                                                                    tokens.completion_mask))))  # fmt: skip
    torch.testing.assert_close(pair.policy.logp, pair.reference.logp, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", [None, "reverse_kl"])
def test_what_is_frozen_later_is_no_part_of_the_trunk(divergence: str | None) -> None:
    """Of those layers the reference has a copy of its own, and the policy's have moved."""
    policy, tokens = _llama(), batch()
    reference = build_reference(policy, "shared_trunk")
    before = score_pair(policy, reference, tokens).reference.logp
    _train(policy)
    right = score_pair(policy, reference, tokens, divergence=divergence)
    policy.requires_grad_(False)
    with _runs(policy, reference.model) as counts:
        found = score_pair(policy, reference, tokens, divergence=divergence)
    assert counts == [1] * DEPTH + [2] * (LAYERS - DEPTH)
    torch.testing.assert_close(found.reference.logp, before, rtol=0, atol=1e-5 if divergence else 0)
    assert torch.equal(found.policy.logp, right.policy.logp)


def test_another_mask_is_another_run() -> None:
    policy, tokens = _llama(), batch(padding="right")
    reference = build_reference(policy, "shared_trunk")
    score_pair(policy, reference, tokens)
    mask = tokens.attention_mask.clone()
    mask[:, 1] = 0
    scored = tokens.completion_mask & mask.bool()
    other = TokenBatch(tokens.input_ids, mask, scored, position_ids=(tokens.attention_mask.cumsum(-1) - 1).clamp(min=0))
    right = score_tokens(policy, other).logp
    with reference.sharing_work_with(policy, tokens):
        reference.score(tokens)
        found = score_tokens(policy, other).logp
    assert torch.equal(found, right)


def test_a_compiled_policy_is_run_in_full() -> None:
    policy = _llama()
    reference = build_reference(policy, "shared_trunk")
    assert not _differs(policy, DEPTH) and _differs(torch.compile(policy), DEPTH)
    policy.get_submodule("model.layers.0").compile()
    assert _differs(policy, DEPTH)
    del reference
