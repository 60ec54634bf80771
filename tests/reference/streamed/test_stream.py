"""Offload: what is on the device and when, one sweep a batch, and the numbers of a plain copy whatever the model."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import tiny
from support.models import MODELS, batch, gpt2, llama
from support.storages import counting
from support.trl_runs import dpo, grpo, logged
from torch import nn

from refkl import KLConfig, ReferenceConfig, SyncConfig, build_reference, freeze, score_pair, score_tokens
from refkl.reference import CloneReference
from refkl.reference.streamed import row_chunks, stream
from refkl.scoring.row_proof import RowProof, row_proof
from refkl.trl import KLDPOTrainer, KLGRPOTrainer

OFFLOAD = ReferenceConfig(strategy="clone", offload=True)
LLAMA_UNITS = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(5)), "model.norm", "lm_head"]


def offloaded(policy: nn.Module, **options: Any) -> CloneReference:
    reference = build_reference(policy, ReferenceConfig(strategy="clone", offload=True, **options))
    assert isinstance(reference.uncached, CloneReference) and reference.one_sweep
    return reference


def fetched(reference: CloneReference) -> Counter[str]:
    assert reference._stream is not None
    return Counter(reference._stream.fetched)


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def chunked_like_plain(policy: nn.Module, tokens: Any, monkeypatch: pytest.MonkeyPatch, chunk: int) -> CloneReference:
    """Asserts that in chunks of so many tokens the offloaded copy says what the plain one does, in one sweep."""
    right = build_reference(policy, "clone").score(tokens).logp
    monkeypatch.setattr(stream, "CHUNK_TOKENS", chunk)
    reference = offloaded(policy)
    torch.testing.assert_close(reference.score(tokens).logp, right, rtol=0, atol=2e-5)
    before = fetched(reference)
    torch.testing.assert_close(reference.score(tokens).logp, right, rtol=0, atol=2e-5)
    assert set((fetched(reference) - before).values()) == {1}
    return reference


# What is on the device, and when.


def test_two_units_at_most_are_on_the_device_and_two_they_are() -> None:
    """By counting every storage in the process, at the end of each unit's forward."""
    policy = llama(num_hidden_layers=5)
    reference, tokens = offloaded(policy), batch((3,), 1)
    model = reference.model
    reference.score(tokens)  # finds the head
    units = [(name, size(model.get_submodule(name).parameters())) for name in LLAMA_UNITS]
    following = dict(zip(LLAMA_UNITS, [*(nbytes for _, nbytes in units[1:]), 0], strict=True))
    found: dict[str, int] = {}
    with counting(nn.ModuleList([policy, model])) as count:
        for name, _ in units:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: found.update({name: count()}))
        reference.score(tokens)
        assert count() == 0
    for name, nbytes in units:
        activations = found[name] - nbytes - following[name]
        assert 0 <= activations < 12_000, (name, activations)  # less than half a layer
    assert min(nbytes for name, nbytes in units if "layers" in name) > 24_000


def test_weights_wait_where_they_were_and_nothing_writes_them() -> None:
    reference = offloaded(llama())
    home, fingerprint = addresses(reference.model), reference.fingerprint()
    seen: dict[str, bool] = {}

    def look(module: nn.Module, args: Any) -> None:
        now = addresses(reference.model)
        seen.update({name: now[name] != home[name] for name in home})

    reference.model.model.layers[1].self_attn.register_forward_pre_hook(look)
    reference.score(batch())
    assert addresses(reference.model) == home and reference.fingerprint() == fingerprint
    assert {name for name, away in seen.items() if away} == {
        name for name in home if name.startswith("model.layers.1.") or name == "model.norm.weight"
    }


def test_a_forward_that_raises_leaves_nothing_on_the_device() -> None:
    policy = llama()
    reference = offloaded(policy)
    home, right = addresses(reference.model), reference.score(batch()).logp

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    hook = reference.model.model.layers[1].mlp.register_forward_hook(fail)
    with counting(nn.ModuleList([policy, reference.model])) as count:
        with pytest.raises(RuntimeError, match="in the middle"):
            reference.score(batch())
        assert count() == 0
    hook.remove()
    assert addresses(reference.model) == home
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in reference.model.modules())
    assert torch.equal(reference.score(batch()).logp, right)


def test_memory_is_the_hosts_but_for_rotary_frequencies() -> None:
    policy = llama(tie_word_embeddings=True)
    freeze(policy, "model.layers.0")  # nothing is shared with the policy: that would be on its device
    held = offloaded(policy).memory()
    assert held.host == size(policy.parameters())
    assert held.device == size(policy.buffers()) > 0


# The order of units.


def test_an_order_that_is_not_the_registered_one_is_learned() -> None:
    def shuffled() -> nn.Module:
        torch.manual_seed(0)
        policy = llama(num_hidden_layers=4)
        modules = policy.model._modules
        modules["embed_tokens"] = modules.pop("embed_tokens")  # registered last, called first
        return policy

    policy, tokens = shuffled(), batch()
    reference = offloaded(policy)
    right = build_reference(policy, "clone").score(tokens).logp
    for _ in range(2):
        assert torch.equal(reference.score(tokens).logp, right)
    before = fetched(reference)
    reference.score(tokens)
    once = fetched(reference) - before
    # The first that is registered is fetched before anything has run, in vain.
    assert once == Counter(dict.fromkeys([u.name for u in reference._stream.units], 1)) + Counter(["model.layers.0"])


def test_an_order_that_changes_between_scores_is_still_right() -> None:
    policy, tokens = llama(num_hidden_layers=4), batch(prefix="off")
    reference, plain = offloaded(policy), build_reference(policy, "clone")
    first = reference.score(tokens).logp
    most = 0

    def look(*args: Any) -> None:
        nonlocal most
        most = max(most, len([unit for unit in reference._stream._resident if unit.name]))

    for model in (reference.model, plain.model):
        layers = model.model.layers
        layers._modules = dict(zip(layers._modules, reversed(layers._modules.values()), strict=True))
    for module in reference.model.model.layers:
        module.register_forward_hook(look)
    right = plain.score(tokens).logp
    assert not torch.equal(right, first)
    before = fetched(reference)
    for _ in range(2):
        assert torch.equal(reference.score(tokens).logp, right)
    assert most == 2
    more = fetched(reference) - before
    assert sum(more.values()) > 2 * 7 and max(more.values()) <= 4  # some were fetched in vain, the first time
    before = fetched(reference)
    reference.score(tokens)
    assert set((fetched(reference) - before).values()) == {1}


def test_a_module_that_is_called_between_all_layers() -> None:
    """What follows it is another layer each time."""
    policy, tokens = llama(num_hidden_layers=3), batch(prefix="off")
    reference, plain = offloaded(policy), build_reference(policy, "clone")
    for model in (reference.model, plain.model):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, hidden, norm=model.model.norm: norm(hidden))
    right = plain.score(tokens).logp
    for _ in range(3):
        assert torch.equal(reference.score(tokens).logp, right)
    before = fetched(reference)
    reference.score(tokens)
    once = fetched(reference) - before
    assert [once[f"model.layers.{n}"] for n in range(3)] == [1, 1, 1]


def test_a_batch_is_not_packed_under_an_unknown_hook() -> None:
    """A trial would move all weights several times: the code decides. In parts, hooks that see other rows count too."""
    policy, tokens = llama(), batch()
    reference = offloaded(policy)
    row = reference.score(tokens).logp
    assert row_proof(reference.model, tokens) == RowProof()
    reference.model.model.layers[0].mlp.register_forward_hook(lambda module, args, hidden: hidden - hidden.mean((0, 1)))
    proof = row_proof(reference.model, tokens)
    assert proof.packed is not None and proof.packed == proof.apart and "host memory" in proof.packed
    plain = build_reference(policy, "clone")
    plain.model.model.layers[0].mlp.register_forward_hook(lambda module, args, hidden: hidden - hidden.mean((0, 1)))
    assert torch.equal(reference.score(tokens).logp, plain.score(tokens).logp)
    assert not torch.equal(reference.score(tokens).logp, row)


def test_neighbours_that_share_a_module() -> None:
    """Its weights stay on the device from one to the other, and come home with the last."""
    policy = llama(num_hidden_layers=3)
    policy.model.layers[1].mlp = policy.model.layers[0].mlp
    reference, right = offloaded(policy), build_reference(policy, "clone").score(batch()).logp
    home = addresses(reference.model)
    for _ in range(2):
        assert torch.equal(reference.score(batch()).logp, right)
    assert addresses(reference.model) == home


# One sweep a batch.


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("chunk", [1, 27, 40])
def test_many_chunks_are_one_sweep(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row each, of three, and of four with one left over."""
    policy = MODELS[family]()
    reference = chunked_like_plain(policy, batch((9, 6, 4, 8, 9, 9, 5, 7, 3)), monkeypatch, chunk)
    rows: list[int] = []
    name = next(u.name for u in reference._stream.units if u.layer)
    attention = next(m for m in reference.model.get_submodule(name).modules() if "Attention" in type(m).__name__)
    attention.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    reference.score(batch((9, 6, 4, 8, 9, 9, 5, 7, 3)))
    assert rows == {1: [1] * 9, 27: [3] * 3, 40: [4, 4, 1]}[chunk]


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "BloomForCausalLM", "MptForCausalLM"])
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts; positions as a bias whose first dimension is heads times rows (Bloom), or heads, be there as many rows
    as heads (MPT)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        chunked_like_plain(tiny(name), batch((9, 6, 4, 8)), monkeypatch, 18)


def test_a_layer_whose_inputs_do_not_divide_takes_all_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's layers hand each other keys and values in a dict: a chunk would overwrite another's."""
    with pytest.warns(UserWarning, match=r"layers\.0 takes inputs of which it is not known how they divide into rows"):
        chunked_like_plain(tiny("Gemma3nForCausalLM"), batch((9, 6, 4, 8)), monkeypatch, 18)


def test_as_many_tokens_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask over tokens alone is not cut though it is as long as the batch."""
    policy = llama()
    chunked_like_plain(policy, batch((6, 6, 6, 6, 6, 6)), monkeypatch, 12)
    one = row_chunks._OneRow(6, {("hidden",): 1, ("mask",): 6, ("bias",): 4})
    given = {("hidden",): torch.zeros(6, 6, 3), ("mask",): torch.zeros(6, 6), ("bias",): torch.zeros(4, 6, 6)}
    assert one.having_rows(given, 6, 6) == [("hidden",)]
    assert one.having_rows({**given, ("new",): torch.zeros(6, 2)}, 6, 6) is None
    assert one.having_rows({**given, ("state",): {}}, 6, 6) is None
    assert one.having_rows({**given, ("bias",): torch.zeros(5, 6, 6)}, 6, 6) is None


def test_one_chunk_is_bitwise_the_plain_copy() -> None:
    for policy in (llama(), gpt2(), tiny("MixtralForCausalLM")):
        tokens = batch(padding="left")
        plain, own = build_reference(policy, "clone"), offloaded(policy)
        for field in ("logp", "entropy", "hidden"):
            found, right = (getattr(r.score(tokens, entropy=True, hidden=True), field) for r in (own, plain))
            assert torch.equal(found, right)


# The host's copy is the truth.


def test_fingerprint_is_the_plain_copys_through_update_and_load(tmp_path: Path) -> None:
    policy = llama()
    plain, own = build_reference(policy, "clone"), offloaded(policy)
    assert own.fingerprint() == plain.fingerprint()
    home = addresses(own.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    own.score(batch())
    for reference in (plain, own):
        reference.update(policy, alpha=0.3)
    assert own.fingerprint() == plain.fingerprint() and addresses(own.model) == home
    assert torch.equal(own.score(batch()).logp, plain.score(batch()).logp)
    own.save(tmp_path)
    third = offloaded(policy)
    assert third.fingerprint() != own.fingerprint()
    third.load(tmp_path)
    assert third.fingerprint() == own.fingerprint()
    assert torch.equal(third.score(batch()).logp, own.score(batch()).logp)
    own.model.model.norm.weight.data[0] += 1.0
    with pytest.raises(ValueError, match=r"model\.norm\.weight has other values"):
        own.verify()


def test_follows_the_policy_to_another_dtype() -> None:
    policy = llama()
    reference = offloaded(policy)
    policy.to(torch.bfloat16)
    right = build_reference(policy, "clone")
    assert torch.equal(reference.score(batch()).logp, right.score(batch()).logp)
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert reference.fingerprint() == right.fingerprint()
    held = offloaded(policy, dtype="float32")
    assert {p.dtype for p in held.model.parameters()} == {torch.float32}


def test_from_a_folder(tmp_path: Path) -> None:
    first, policy = llama(), get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    first.save_pretrained(tmp_path)
    reference = offloaded(policy, source=str(tmp_path))
    assert torch.equal(reference.score(batch()).logp, score_tokens(first, batch()).logp)


def test_a_lora_policy_with_an_adapted_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head and its adapter are one unit, and the scores go through the logits."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"], use_dora=False)
    policy = get_peft_model(llama(), config).eval()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    reference = chunked_like_plain(policy, batch((9, 6, 4, 8)), monkeypatch, 18)
    assert reference.memory().host == size(policy.parameters())
    assert [u.name.split(".")[-1] for u in reference._stream.units] == ["embed_tokens", "0", "1", "norm", "lm_head"]


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("tied", [True, False])
def test_exact_divergence(tied: bool, kind: str) -> None:
    policy, tokens = llama(tie_word_embeddings=tied), batch()
    references = build_reference(policy, "clone"), offloaded(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pairs = [score_pair(policy, reference, tokens, divergence=kind) for reference in references]
    assert pairs[0].divergence.abs().max() > 1e-3
    assert torch.equal(pairs[0].divergence, pairs[1].divergence)
    assert torch.equal(pairs[0].reference.logp, pairs[1].reference.logp)
    head = references[1].head()
    assert head is not None and head.module is not references[1].model.lm_head


# What cannot be.


class Packed(nn.Parameter):
    """As bitsandbytes holds a weight: beside its numbers there is more."""


def test_refusals() -> None:
    policy = llama()
    for other in ({"device": "cpu"}, {"quantize": "int8"}):
        with pytest.raises(ValueError, match=r"offload runs a copy in full precision on the policy's device, so"):
            build_reference(policy, ReferenceConfig(strategy="clone", offload=True, **other))
    fresh = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no weights of its own that reference\.offload .* Use 'swap' instead"):
        build_reference(fresh, ReferenceConfig(strategy="adapter", offload=True))
    policy.lm_head.weight = Packed(policy.lm_head.weight.data)
    with pytest.raises(ValueError, match=r"lm_head\.weight is a Packed, quantised or packed"):
        offloaded(policy)


def test_auto_and_swap_take_it() -> None:
    policy = llama()
    taken = build_reference(policy, ReferenceConfig(offload=True))
    assert taken.strategy == "clone" and "in host memory, streamed" in taken.reason
    freeze(policy, "model.layers.0")
    swapped = build_reference(policy, ReferenceConfig(offload=True))
    host = build_reference(policy, ReferenceConfig(strategy="swap", device="cpu"))
    assert swapped.strategy == "swap" and swapped.memory() == host.memory() and swapped.memory().device == 0
    assert torch.equal(swapped.score(batch()).logp, build_reference(policy, "clone").score(batch()).logp)


# Trainers.


def test_grpo_sweeps_once_a_rollout_and_once_after_a_sync(tmp_path: Path) -> None:
    options = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4,
        "num_iterations": 2, "max_steps": 4,
    }  # fmt: skip
    policy = llama()
    kl = KLConfig(coef=0.1)
    trainer = grpo(KLGRPOTrainer, policy, tmp_path, options, kl=kl, reference=OFFLOAD)
    trainer.reference.score(batch())
    before = fetched(trainer.reference)
    trainer.train()
    assert set((fetched(trainer.reference) - before).values()) == {2}  # 4 steps of 4 micro-batches on 2 rollouts
    assert abs(logged(trainer, "kl")[0]) < 1e-9 and logged(trainer, "kl")[1] > 1e-6

    sync = SyncConfig(every=1, alpha=1.0)
    runs = []
    for config in (OFFLOAD, "clone"):
        torch.manual_seed(0)
        moved = grpo(KLGRPOTrainer, llama(), tmp_path, options, kl=kl, reference=config, sync=sync)
        if config is OFFLOAD:
            moved.reference.score(batch())
            before = fetched(moved.reference)
        moved.train()
        runs.append(moved)
    # Each rollout once, and once more for its second use, after a sync: for all micro-batches that are left of it.
    assert set((fetched(runs[0].reference) - before).values()) == {4}
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), abs=2e-5)
    assert logged(runs[0], "kl") == pytest.approx([0.0] * 4, abs=1e-9)


def test_dpo_sweeps_once_an_optimizer_step(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3, "optim": "sgd"}
    runs = []
    for config in (OFFLOAD, "clone"):
        torch.manual_seed(0)
        trainer = dpo(KLDPOTrainer, llama(), tmp_path, options, reference=config, kl=KLConfig(coef=0.1))
        if config is OFFLOAD:
            trainer.reference.score(batch())
            before = fetched(trainer.reference)
        trainer.train()
        runs.append(trainer)
    assert set((fetched(runs[0].reference) - before).values()) == {3}
    for key in ("loss", "kl", "rewards/margins"):
        assert logged(runs[0], key) == pytest.approx(logged(runs[1], key), abs=2e-6), key


def test_the_cache_asks_for_what_is_missing_in_one_sweep(tmp_path: Path) -> None:
    reference = offloaded(llama(), cache=str(tmp_path))
    reference.score(batch((9, 6, 4)))
    before = fetched(reference)
    scores = reference.score(batch((9, 6, 4, 7, 5))).logp
    assert set((fetched(reference) - before).values()) == {1} and scores.shape[0] == 5
    before = fetched(reference)
    reference.score(batch((9, 6, 4)))
    assert fetched(reference) == before
