"""`swap`: right for whatever trains, and the policy is the user's again afterwards, also amid a backward pass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from support.adapters import ADAPTERS, lora, moved
from support.models import batch, llama
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from refkl import ReferenceConfig, build_reference, score_pair, score_tokens, trainable_parameters
from refkl import kl as kls
from refkl.backend import Backend, named_weights
from refkl.reference import BuildRequest, SwapReference

HOST = ReferenceConfig(strategy="swap", device="cpu")


def merged() -> PeftModel:
    policy = moved(lora())
    policy.merge_adapter()
    return policy


@pytest.mark.parametrize("host", [False, True], ids=["beside", "host"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_trained_adapter_of_any_kind(name: str, host: bool, tmp_path: Path) -> None:
    """Bit for bit a frozen deep copy, before and after training; and what the user saves is theirs."""
    policy = moved(ADAPTERS[name]()).eval()
    plain = copy.deepcopy(policy).requires_grad_(False)
    auto = build_reference(policy)
    assert auto.strategy == "swap", auto.reason
    reference = build_reference(policy, HOST) if host else auto
    trained = sum(p.numel() * p.element_size() for p in trainable_parameters(policy))
    found = reference.memory()
    assert trained <= found.total <= trained + 64  # AdaLoRA counts its ranks
    assert (found.device, found.host)[host] == found.total
    moved(policy)
    twin = copy.deepcopy(policy)
    right = score_tokens(plain, batch()).logp
    assert not torch.allclose(score_tokens(policy, batch()).logp, right, atol=1e-3)
    assert torch.equal(reference.score(batch()).logp, right)
    assert torch.equal(score_tokens(policy, batch()).logp, score_tokens(twin, batch()).logp)
    policy.save_pretrained(tmp_path / "scored")
    twin.save_pretrained(tmp_path / "twin")
    names = sorted(path.name for path in (tmp_path / "twin").iterdir())
    assert sorted(path.name for path in (tmp_path / "scored").iterdir()) == names
    for file in names:
        if file.endswith(".safetensors"):
            assert (tmp_path / "scored" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()


@pytest.mark.parametrize("host", [False, True], ids=["beside", "host"])
def test_a_merged_adapter_stays_merged(host: bool) -> None:
    policy = merged().eval()
    right = score_tokens(policy, batch()).logp
    reference = build_reference(policy, HOST if host else "auto")
    assert reference.strategy == "swap"
    assert torch.equal(reference.score(batch()).logp, right)
    assert all(m.merged for m in policy.modules() if hasattr(m, "lora_A"))
    policy.unmerge_adapter()
    with pytest.raises(ValueError, match=r"q_proj was merged \(default\) when .* and is not merged now"):
        reference.score(batch())


def test_switching_adapters_is_found() -> None:
    policy = moved(lora())
    policy.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    reference = build_reference(policy, "swap")
    right = reference.score(batch()).logp
    policy.set_adapter("other")
    with pytest.raises(ValueError, match=r"is on with \['other'\]"):
        reference.score(batch())
    policy.set_adapter("default")
    assert torch.equal(reference.score(batch()).logp, right)


def test_adalora_that_cuts_its_ranks_leaves_the_reference_alone() -> None:
    policy = moved(ADAPTERS["AdaLoRA"]()).eval()
    references = [build_reference(policy, "swap"), build_reference(policy, "clone")]
    right = score_tokens(policy, batch()).logp
    tensors = [p for n, p in policy.named_parameters() if "ranknum" in n]
    assert tensors
    with torch.no_grad():
        for parameter in tensors:
            parameter.fill_(2.0)
    moved(policy)
    for reference in references:
        assert torch.equal(reference.score(batch()).logp, right)


# the policy's backward pass


def gradients(policy: nn.Module, between: Callable[[], object]) -> list[Tensor]:
    loss = score_tokens(policy, batch()).logp.sum()
    between()
    return list(torch.autograd.grad(loss, trainable_parameters(policy)))


@pytest.mark.parametrize("host", [False, True], ids=["beside", "host"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "recomputed"])
@pytest.mark.parametrize("what", ["full", "LoRA"])
def test_a_score_between_forward_and_backward_changes_no_gradient(
    host: bool, checkpointing: bool | None, what: str
) -> None:
    """With gradient checkpointing the forward runs again in the backward: with the policy's weights."""
    policy = llama() if what == "full" else moved(lora())
    policy.train()
    if checkpointing is not None:
        policy.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        policy.enable_input_require_grads()
    reference = build_reference(policy, HOST if host else "swap")
    moved(policy)
    if checkpointing:  # torch.autograd.grad is not for reentrant checkpoints
        found = []
        for between in (lambda: None, lambda: reference.score(batch())):
            policy.zero_grad()
            loss = score_tokens(policy, batch()).logp.sum()
            between()
            loss.backward()
            found.append([p.grad.clone() for p in trainable_parameters(policy)])
    else:
        found = [gradients(policy, lambda: None), gradients(policy, lambda: reference.score(batch()))]
    for without, with_score in zip(*found, strict=True):
        assert torch.equal(without, with_score)


@pytest.mark.parametrize("host", [False, True], ids=["beside", "host"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_inside_a_swap_raises(host: bool, checkpointing: bool) -> None:
    policy = llama().train()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    reference = build_reference(policy, HOST if host else "swap")
    right = score_tokens(policy, batch()).logp
    moved(policy)
    loss = score_tokens(policy, batch()).logp.sum()
    with pytest.raises(RuntimeError, match="swapped into it"), reference.logits(batch()):
        loss.backward()
    policy.zero_grad()
    assert torch.equal(reference.score(batch()).logp, right)
    score_tokens(policy, batch()).logp.sum().backward()  # and outside of it nothing is in the way


def test_a_swap_that_fails_half_way_is_undone() -> None:
    policy = llama()
    reference = build_reference(policy, HOST)
    moved(policy)
    before = {name: t.clone() for name, t in named_weights(policy)}
    real, calls = reference.snapshot._exchange, []

    def failing(tensor: Tensor, name: str) -> None:
        calls.append(name)
        if len(calls) == 5:
            raise MemoryError("no room")
        real(tensor, name)

    reference.snapshot._exchange = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        reference.score(batch())
    assert all(torch.equal(t, before[name]) for name, t in named_weights(policy))
    assert not any(p._backward_hooks for p in policy.parameters())


# what changes after it was built


def test_built_before_the_policy_is_cast() -> None:
    policy = llama()
    reference = build_reference(policy, "swap")
    first = reference.fingerprint()
    policy.to(torch.bfloat16)
    right = score_tokens(policy, batch()).logp
    assert torch.equal(reference.score(batch()).logp, right)
    assert reference.fingerprint() != first and reference.score(batch()).fingerprint == reference.fingerprint()
    moved(policy)
    assert torch.equal(reference.score(batch()).logp, right)


def test_what_is_unfrozen_later_is_found() -> None:
    policy = lora()
    reference = build_reference(policy, "swap")
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight trains now"):
        reference.score(batch())


def test_a_resized_vocabulary_is_found() -> None:
    policy = llama()
    reference = build_reference(policy, "swap")
    policy.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \[300, 32\] .* \[258, 32\]"):
        reference.score(batch())


def test_a_buffer_that_training_changes_is_held_too() -> None:
    """Such as the balance of experts in DeepSeek's router: a buffer, saved with the model, that no gradient reaches."""
    policy = llama()
    layer = policy.model.layers[0].mlp
    layer.register_buffer("balance", torch.zeros(32))
    layer.register_forward_pre_hook(lambda module, args: (args[0] + module.balance,))
    reference = build_reference(policy, "swap")
    right = score_tokens(policy, batch()).logp
    layer.balance += 1.0
    assert not torch.allclose(score_tokens(policy, batch()).logp, right, atol=1e-3)
    assert torch.equal(reference.score(batch()).logp, right)


# refusals


@pytest.mark.parametrize(
    ("policy", "options", "match"),
    [
        (llama, {"source": "pretrained"}, "reference.source asks for 'pretrained'"),
        (llama, {"dtype": "bfloat16"}, "reference.dtype cannot be set"),
        (llama, {"device": "cuda:1"}, "None .* or 'cpu'"),
        (lambda: llama().requires_grad_(False), {}, "the policy has no trainable parameters"),
        (
            lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            {},
            "a learned prompt .* is not part of the reference",
        ),
    ],
    ids=["pretrained", "dtype", "device", "frozen", "prompt"],
)
def test_refused_with_the_reason(policy: Callable[[], nn.Module], options: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_reference(policy(), ReferenceConfig(strategy="swap", **options))


@pytest.mark.parametrize("strategy", ["auto", "clone", "swap", "adapter"])
def test_an_adapter_that_does_not_train_is_refused_by_all(strategy: str, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(llama(), tmp_path)  # is_trainable=False is PEFT's default
    with pytest.raises(ValueError, match="is_trainable=False"):
        build_reference(policy, strategy)


# with other parts


def test_what_everybody_holds_has_one_fingerprint() -> None:
    policy = moved(lora())
    prints = {build_reference(policy, s).fingerprint() for s in ("clone", "swap", HOST)}
    assert len(prints) == 1
    assert build_reference(moved(policy), "swap").fingerprint() not in prints


@pytest.mark.parametrize("host", [False, True], ids=["beside", "host"])
@pytest.mark.parametrize("head", ["trained", "tied", "frozen"])
def test_exact_divergence_is_that_of_a_clone(head: str, host: bool) -> None:
    policy = llama(tie_word_embeddings=head == "tied")
    if head == "frozen":
        policy.lm_head.requires_grad_(False)
    clone, swap = build_reference(policy, "clone"), build_reference(policy, HOST if host else "swap")
    moved(policy, 0.05)
    found, expected = (score_pair(policy, r, batch(), divergence="reverse_kl") for r in (swap, clone))
    assert expected.divergence.max() > 1e-3
    torch.testing.assert_close(found.divergence, expected.divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.reference.logp, expected.reference.logp, rtol=0, atol=1e-5)
    leaves = trainable_parameters(policy)
    for a, b in zip(*(torch.autograd.grad(p.divergence.sum(), leaves) for p in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_qlora_has_the_quantised_base_and_says_so(tmp_path: Path) -> None:
    """The frozen base is NF4: step 0 is zero against it, and would not be against the base that it was made from."""
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    full = score_tokens(LlamaForCausalLM.from_pretrained(tmp_path / "model"), batch()).logp
    right = score_tokens(policy, batch()).logp
    assert not torch.allclose(right, full, atol=1e-3)
    fresh = build_reference(policy)
    trained = build_reference(moved(policy), "swap")
    also_right = score_tokens(policy, batch()).logp
    moved(policy)
    for reference, strategy, expected in ((fresh, "adapter", right), (trained, "swap", also_right)):
        assert reference.strategy == strategy
        assert torch.equal(reference.score(batch()).logp, expected)
        assert "its base is quantised (bitsandbytes)" in reference.source


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_policy_trains_on_after_it_was_scored(bits: int, tmp_path: Path) -> None:
    """bitsandbytes rewrites 4-bit weights in eval mode on some processors, here on all, and they then pass no gradient;
    its 8-bit layers compute something else in eval mode."""
    bnb = pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised)
    policy = moved(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))).train()
    layers = [m for m in policy.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert layers
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    leaves = trainable_parameters(policy)
    ids = batch().input_ids

    def gradient() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(policy(ids).logits.log_softmax(-1)[..., 3].mean(), leaves)

    right, weights = gradient(), [layer.weight.data.clone() for layer in layers]
    # A copy too, but for 8 bits, where it would not have what its layers compute with.
    strategies = ("swap", "clone") if bits == 4 else ("swap",)
    for strategy in strategies:
        pair = score_pair(policy, build_reference(policy, strategy), batch())
        assert torch.equal(pair.policy.logp, pair.reference.logp)
    if bits == 8:
        for strategy in ("clone", "shared_trunk"):
            with pytest.raises(ValueError, match=r"q_proj\S* is in 8 bits .* Use 'swap' instead"):
                build_reference(policy, strategy)
    assert all(torch.equal(layer.weight.data, weight) for layer, weight in zip(layers, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradient(), right, strict=True))
    assert all(layer.training for layer in layers)


def test_kl_is_zero_at_step_zero_and_its_gradient_too() -> None:
    policy = moved(lora())
    pair = score_pair(policy, build_reference(policy), batch())
    loss = kls.estimate(pair.policy.logp, pair.reference.logp, "k3").sum()
    assert loss.item() == 0.0
    assert all(not g.any() for g in torch.autograd.grad(loss, trainable_parameters(policy)))


def test_a_large_snapshot_of_a_policy_on_a_device_waits_in_host_memory() -> None:
    """A tenth of the device's memory is the limit. Here the device is a processor that is taken for one of its own."""
    policy, tokens = llama(), batch()
    right = score_tokens(policy, tokens).logp.detach()
    trained = sum(p.numel() * 4 for p in policy.parameters())
    for memory, on_host in ((10 * trained + 10, False), (10 * trained - 10, True)):
        request = BuildRequest(policy, ReferenceConfig(), Backend("plain", 1), None)
        vars(request)["shape"] = dataclasses.replace(request.shape, on_host=False, memory=memory)
        cost, reference = SwapReference.cost(request), SwapReference.build(request, "")
        assert (reference.memory().device, reference.memory().host) == ((0, trained) if on_host else (trained, 0))
        assert (cost.device, cost.host) == (reference.memory().device, reference.memory().host)
        assert ("in host memory" in SwapReference.why(request)) == on_host
        assert torch.equal(reference.score(tokens).logp, right)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("first", ["reference", "policy"])
def test_a_shared_autocast_does_not_hand_one_sides_weights_to_the_other(first: str, device: str | None) -> None:
    """Autocast keeps its casts by parameter for as long as a region is open, and the parameters are the same."""
    policy, tokens = llama(), batch()
    plain = copy.deepcopy(policy)
    reference = build_reference(policy, ReferenceConfig(strategy="swap", device=device))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    twin = copy.deepcopy(policy)
    with torch.autocast("cpu", torch.bfloat16):
        right = score_tokens(plain, tokens).logp.detach()
    with torch.autocast("cpu", torch.bfloat16):
        trained = score_tokens(twin, tokens).logp
        trained.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        if first == "reference":
            found = reference.score(tokens).logp
            ours = score_tokens(policy, tokens).logp
        else:
            ours = score_tokens(policy, tokens).logp
            found = reference.score(tokens).logp
        ours.sum().backward()
    assert torch.equal(found, right) and torch.equal(ours, trained) and not torch.equal(ours, found)
    for own, other in zip(policy.parameters(), twin.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)


def test_several_scores_exchange_once() -> None:
    policy, parts = llama(), [batch(seed=seed) for seed in range(3)]
    reference = build_reference(policy, HOST)
    right = [reference.score(part).logp for part in parts]
    with torch.no_grad():
        policy.lm_head.weight.add_(0.1)
    now = score_tokens(policy, parts[0]).logp.detach()
    exchanges = []
    exchange = reference.snapshot._exchange
    reference.snapshot._exchange = lambda *args: exchanges.append(1) or exchange(*args)  # type: ignore[method-assign]
    with reference.keep_active():
        found = [reference.score(part).logp for part in parts]
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert len(exchanges) == 2 * len(reference.snapshot.names)
    assert torch.equal(score_tokens(policy, parts[0]).logp, now)
    with pytest.raises(RuntimeError, match="in the middle"), reference.keep_active():
        raise RuntimeError("in the middle")
    assert torch.equal(score_tokens(policy, parts[0]).logp, now) and torch.equal(
        reference.score(parts[0]).logp, right[0]
    )
