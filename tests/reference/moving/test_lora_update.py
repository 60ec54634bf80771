"""A LoRA reference that moves by the product B · A, against full weights that are mixed one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from support.models import batch, gpt2, llama, qwen2
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from refkl import Reference, ReferenceConfig, build_reference, score_tokens, trainable_parameters
from refkl.backend import named_weights
from refkl.config import SyncConfig
from refkl.reference.moving.lora_algebra import Factors, compressed, packed, stacked, unpacked

HOLDERS: dict[str, ReferenceConfig] = {
    "swap": ReferenceConfig(strategy="swap"),
    "swap on the host": ReferenceConfig(strategy="swap", device="cpu"),
    "clone": ReferenceConfig(strategy="clone"),
    "clone offloaded": ReferenceConfig(strategy="clone", offload=True),
}


def lora(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """In fp64, so that what is compared is exact but for its last digits."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
    return get_peft_model(llama() if base is None else base, config).eval().double()


def experts() -> PeftModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    config = Qwen3MoeConfig(vocab_size=258, num_experts_per_tok=2, initializer_range=0.2, **sizes, **heads)
    config._experts_implementation = "eager"  # the other takes no fp64
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return lora(Qwen3MoeForCausalLM(config), r=2, target_modules=["q_proj"], target_parameters=parameters)


def norms_too() -> PeftModel:
    policy = lora()
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return policy


POLICIES: dict[str, Callable[[], PeftModel]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "Conv1D": lambda: lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "a bias": lambda: lora(qwen2(), lora_bias=True),
    "experts": experts,
    "modules to save": lambda: lora(modules_to_save=["lm_head"]),
    "trainable tokens": lambda: lora(trainable_token_indices=[3, 5, 7]),
    "norms": norms_too,
    "scalings of their own": lambda: lora(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 40}),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "MiCA": lambda: lora(init_lora_weights="mica"),
    "A frozen": lambda: _frozen_a(lora()),
}


def _frozen_a(policy: PeftModel) -> PeftModel:
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return policy


def train(policy: nn.Module, by: float = 0.3) -> nn.Module:
    """As if trained: every trained tensor moves."""
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(by * torch.randn_like(parameter))
    return policy


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's own full change of weight of each layer, in fp64."""
    whole = copy.deepcopy(model).double()
    return {name: module.get_delta_weight("default").detach() for name, module in layers(whole).items()}


class Plain:
    """The plain and slow average: of full weights in fp64, and of all that trains beside LoRA's factors."""

    def __init__(self, policy: nn.Module) -> None:
        self.model = copy.deepcopy(policy).double()
        self.deltas = deltas(policy)

    def mix(self, policy: nn.Module, alpha: float) -> None:
        found = deltas(policy)
        self.deltas = {name: (1 - alpha) * own + alpha * found[name] for name, own in self.deltas.items()}
        with torch.no_grad():
            theirs = dict(named_weights(policy))
            for name, own in named_weights(self.model):
                own.lerp_(theirs[name].double(), alpha)

    def logp(self, tokens: Any) -> Tensor:
        """Of a model with the averages in its base, and no product in its adapter."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, module in layers(model).items():
                base = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
                base += self.deltas[name]
            for name, parameter in model.named_parameters():
                if "lora_embedding_B" in name or ("lora_B" in name and not name.endswith("bias")):
                    parameter.zero_()
            return score_tokens(model, tokens).logp


def held(reference: Reference) -> dict[str, Tensor]:
    return {weight.name: weight.local for weight in reference.weights()}


def ranks(reference: Reference) -> set[int]:
    """Of the reference's LoRA layers."""
    return {len(tensor) for name, tensor in held(reference).items() if "lora_A" in name}


def bits(policy: nn.Module) -> list[tuple[int, Tensor]]:
    """Where each parameter lies, and a copy of its numbers."""
    return [(p.data_ptr(), p.detach().clone()) for p in policy.parameters()]


def assert_untouched(policy: nn.Module, before: list[tuple[int, Tensor]]) -> None:
    for parameter, (place, numbers) in zip(policy.parameters(), before, strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, numbers)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", POLICIES)
def test_many_updates_are_those_of_full_weights(kind: str, holder: str) -> None:
    policy = train(POLICIES[kind]())
    reference, plain, tokens = build_reference(policy, HOLDERS[holder]), Plain(policy), batch()
    start = reference.score(tokens).logp
    for alpha in (0.3, 0.6, 0.25):
        train(policy)
        before = bits(policy)
        reference.update(policy, alpha, lora="product")
        plain.mix(policy, alpha)
        found = reference.score(tokens).logp
        torch.testing.assert_close(found, plain.logp(tokens), rtol=0, atol=1e-9)
        assert (found - start).abs().max() > 1e-2
        assert_untouched(policy, before)
    fingerprint = reference.fingerprint()
    reference.verify()
    reference.update(policy, 1.0, lora="product")
    with torch.no_grad():
        assert torch.equal(reference.score(tokens).logp, score_tokens(policy, tokens).logp)
    assert reference.fingerprint() != fingerprint
    shapes = {name: tensor.shape for name, tensor in held(reference).items()}
    assert shapes == {name: tensor.shape for name, tensor in named_weights(policy)}


def test_the_rank_grows_and_is_bounded() -> None:
    policy = train(lora())
    reference = build_reference(policy, "swap")
    plain, sizes, memory = Plain(policy), [], []
    for _ in range(9):
        train(policy)
        reference.update(policy, 0.4, lora="product")
        plain.mix(policy, 0.4)
        sizes.append(sorted(ranks(reference)))
        memory.append(reference.memory().total)
    # v_proj is 32 to 16, q_proj 32 to 32.
    assert sizes == [[8], [12], [16], [16, 20], [16, 24], [16, 28], [16, 32], [16, 32], [16, 32]]
    assert memory == sorted(memory) and memory[-1] == memory[-2] > 3 * memory[0]
    assert reference.last_update is not None and reference.last_update.rank == 32
    torch.testing.assert_close(reference.score(batch()).logp, plain.logp(batch()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("holder", ["swap", "swap on the host", "clone"])
@pytest.mark.parametrize("kind", ["LoRA", "experts", "embedding"])
def test_a_rank_that_is_asked_for_is_the_best_there_is(kind: str, holder: str) -> None:
    policy = train(POLICIES[kind]())
    reference = build_reference(policy, HOLDERS[holder])
    average = deltas(policy)
    train(policy)
    average = {name: 0.7 * own + 0.3 * deltas(policy)[name] for name, own in average.items()}
    reference.update(policy, 0.3, lora="product", rank=3)
    found, lost, total = _products(reference, policy), 0.0, 0.0
    for name, whole in average.items():
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        best = u[..., :3] * s[..., None, :3] @ v[..., :3, :]
        torch.testing.assert_close(found[name], best, rtol=0, atol=1e-11)
        lost, total = lost + float((whole - best).square().sum()), total + float(whole.square().sum())
    assert reference.last_update is not None and reference.last_update.rank == 3
    assert lost > 0 and reference.last_update.cut == pytest.approx((lost / total) ** 0.5, rel=1e-9)


def _products(reference: Reference, policy: PeftModel) -> dict[str, Tensor]:
    """Full changes of weight of the reference: those that PEFT gives for a policy that holds its tensors."""
    twin = copy.deepcopy(policy)
    for name, tensor in named_weights(twin):
        tensor.data = held(reference)[name].clone()
    return deltas(twin)


def test_small_steps_add_up_in_16_bits_with_a_rank() -> None:
    policy = train(lora()).bfloat16()
    reference, plain = build_reference(policy, "swap"), Plain(policy)
    first = _products(reference, policy)
    train(policy)
    for _ in range(30):
        reference.update(policy, 0.004, lora="product", rank=8)
        plain.mix(policy, 0.004)
    for name, found in _products(reference, policy).items():
        way, error = plain.deltas[name] - first[name], found - plain.deltas[name]
        assert float(error.norm() / plain.deltas[name].norm()) < 4e-3  # the bf16 of what is held
        assert float(error.norm() / way.norm()) < 0.05
    means = {name: mean for name, mean in reference._mover.averages.mean.items() if "lora_" in name}
    assert means and all(mean.dtype == torch.float32 for mean in means.values())
    for name, mean in means.items():
        assert torch.equal(held(reference)[name], mean.bfloat16())


@pytest.mark.parametrize("mode", ["factors", "product"])
@pytest.mark.parametrize("kind", ["LoRA", "scalings of their own", "experts", "Conv1D"])
def test_the_distance_of_the_two_averages(kind: str, mode: Any) -> None:
    policy = train(POLICIES[kind]())
    reference = build_reference(policy, "swap")
    assert reference.last_update is None
    own, twin = deltas(policy), copy.deepcopy(policy)
    train(policy)
    with torch.no_grad():
        theirs = dict(named_weights(policy))
        for name, tensor in named_weights(twin):
            tensor.lerp_(theirs[name], 0.3)
    average = {name: 0.7 * w + 0.3 * deltas(policy)[name] for name, w in own.items()}
    apart = sum(float((w - average[name]).square().sum()) for name, w in deltas(twin).items())
    expected = (apart / sum(float(w.square().sum()) for w in average.values())) ** 0.5
    reference.update(policy, 0.3, lora=mode)
    assert reference.last_update is not None
    assert expected > 0.05 and reference.last_update.distance == pytest.approx(expected, rel=1e-9)
    reference.update(policy, 0.3, lora="product")
    if mode == "product":
        assert reference.last_update.distance is None  # of unlike ranks
    reference.update(policy, 1.0)
    assert reference.last_update.distance is None


def test_no_distance_without_lora_layers_or_of_those_that_are_not_linear() -> None:
    for policy in (llama(), lora(use_dora=True), _ia3()):
        reference = build_reference(train(policy), "swap")
        reference.update(train(policy), 0.5)
        assert reference.last_update is not None and reference.last_update.distance is None


def _ia3() -> PeftModel:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return get_peft_model(llama(), config)


def test_an_adapters_first_update_keeps_the_rank() -> None:
    tokens, scores = batch(), []
    for mode in ("factors", "product"):
        torch.manual_seed(1)
        policy = lora()
        reference, plain = build_reference(policy, "adapter"), Plain(policy)
        train(policy)
        reference.check_movable(policy, 0.3, lora=mode)
        assert reference.strategy == "adapter"
        reference.update(policy, 0.3, lora=mode)
        plain.mix(policy, 0.3)
        assert ranks(reference) == {4} and reference.last_update is not None
        assert reference.last_update.distance == 0.0 and reference.last_update.rank == 4
        scores.append(reference.score(tokens).logp)
        torch.testing.assert_close(scores[-1], plain.logp(tokens), rtol=0, atol=1e-9)
        train(policy)
        reference.update(policy, 0.3, lora="product")
        plain.mix(policy, 0.3)
        assert ranks(reference) == {8}
        torch.testing.assert_close(reference.score(tokens).logp, plain.logp(tokens), rtol=0, atol=1e-9)
    assert torch.equal(*scores)


def test_a_factor_that_both_have_adds_no_rank() -> None:
    for kind in ("A frozen", "MiCA"):
        policy = train(POLICIES[kind]())
        reference = build_reference(policy, "swap")
        reference.update(train(policy), 0.3, lora="product")
        assert reference.last_update is not None
        assert ranks(reference) == {4} and reference.last_update.distance == 0.0


def test_a_product_that_is_zero_adds_no_rank() -> None:
    policy = lora()
    reference, plain = build_reference(policy, "swap"), Plain(policy)  # B is 0, and A trains too
    train(policy)
    reference.update(policy, 0.3, lora="product")
    plain.mix(policy, 0.3)
    assert ranks(reference) == {4}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    reference.update(policy, 0.3, lora="product")
    plain.mix(policy, 0.3)
    assert ranks(reference) == {4}
    torch.testing.assert_close(reference.score(batch()).logp, plain.logp(batch()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("holder", ["swap", "swap on the host", "clone"])
def test_a_policys_training_goes_on(holder: str) -> None:
    """With a score of a reference of another rank amid a step, it is that of a policy that no reference is beside."""
    policy = train(lora())
    reference = build_reference(policy, HOLDERS[holder])
    reference.update(train(policy), 0.5, lora="product")
    twin = copy.deepcopy(policy)
    for model in (policy, twin):
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01)
        for _ in range(3):
            loss = score_tokens(model, batch()).logp.sum()
            if model is policy:
                with reference.keep_active():
                    reference.score(batch(padding="left"))
                    reference.score(batch(seed=3))
                reference.update(policy, 0.5, lora="product")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for own, other in zip(policy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)


def test_several_scores_in_one_exchange_give_the_same() -> None:
    for holder in ("swap", "swap on the host"):
        policy = train(lora())
        reference = build_reference(policy, HOLDERS[holder])
        reference.update(train(policy), 0.5, lora="product")
        alone, before, fingerprint = reference.score(batch()).logp, bits(policy), reference.fingerprint()
        with reference.keep_active():
            assert torch.equal(reference.score(batch()).logp, alone)
            assert torch.equal(reference.score(batch()).logp, alone)
        assert_untouched(policy, before)
        assert torch.equal(reference.score(batch()).logp, alone)
        assert reference.fingerprint() == fingerprint


def test_a_score_that_raises_gives_the_policy_back() -> None:
    for holder in ("swap", "swap on the host"):
        policy = train(lora())
        reference = build_reference(policy, HOLDERS[holder])
        reference.update(train(policy), 0.5, lora="product")
        right, before = reference.score(batch()).logp, bits(policy)

        def fail(*args: Any) -> None:
            raise RuntimeError("in the middle")

        hook = policy.base_model.model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            reference.score(batch())
        hook.remove()
        assert_untouched(policy, before)
        assert torch.equal(reference.score(batch()).logp, right)


def test_whoever_holds_it_has_the_same_fingerprint() -> None:
    found = set()
    for config in HOLDERS.values():
        torch.manual_seed(2)
        policy = train(lora())
        reference = build_reference(policy, config)
        for rank in (None, 6):
            reference.update(train(policy), 0.5, lora="product", rank=rank)
        found.add(reference.fingerprint())
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("holder", [*HOLDERS, "adapter"])
def test_save_and_load(holder: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = HOLDERS.get(holder, ReferenceConfig(strategy="adapter"))
    policy = lora().to(dtype)
    if holder != "adapter":
        train(policy)
    start = copy.deepcopy(policy)
    reference = build_reference(policy, config)
    for _ in range(2):
        reference.update(train(policy), 0.5, lora="product")
    assert ranks(reference) == {8 if holder == "adapter" else 12}
    right, fingerprint = reference.score(batch()).logp, reference.fingerprint()
    reference.save(tmp_path)

    resumed = build_reference(start, config)
    start.load_state_dict(policy.state_dict())
    resumed.load(tmp_path)
    assert resumed.fingerprint() == fingerprint and torch.equal(resumed.score(batch()).logp, right)
    train(policy)
    start.load_state_dict(policy.state_dict())
    for each, model in ((reference, policy), (resumed, start)):
        each.update(model, 0.25, lora="product", rank=5)
    assert resumed.fingerprint() == reference.fingerprint()
    assert resumed.memory() == reference.memory()
    # And back to a folder of a lower rank.
    reference.load(tmp_path)
    assert reference.fingerprint() == fingerprint and torch.equal(reference.score(batch()).logp, right)


def test_a_saved_rank_with_another_scaling_is_refused(tmp_path: Path) -> None:
    policy = train(lora())
    reference = build_reference(policy, "swap")
    reference.update(train(policy), 0.5, lora="product")
    reference.save(tmp_path)
    for other in (lora(r=8), lora(lora_alpha=16)):
        for strategy in ("swap", "clone", "adapter"):
            beside = build_reference(other, strategy)
            before = beside.fingerprint()
            with pytest.raises(ValueError, match=r"another r or lora_alpha|shared with the policy"):
                beside.load(tmp_path)
            assert beside.fingerprint() == before and beside.strategy == strategy


def test_a_saved_rank_without_its_scaling_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(3)
    policy = train(lora())
    build_reference(policy, "swap").save(tmp_path)
    record = (tmp_path / "reference.json").read_text()
    (tmp_path / "reference.json").write_text(record.replace('"scalings"', '"nothing"'))
    build_reference(policy, "swap").load(tmp_path)  # an older folder, of the same rank
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="a scaling that was not recorded"):
        build_reference(lora(r=8), "swap").load(tmp_path)


@pytest.mark.parametrize("holder", ["swap", "swap on the host", "clone"])
def test_what_it_was_first_comes_back(holder: str, tmp_path: Path) -> None:
    policy = train(lora())
    reference = build_reference(policy, HOLDERS[holder])
    first = reference.score(batch())
    reference.keep_first()
    reference.update(train(policy), 0.5, lora="product")
    present, before = reference.score(batch()).logp, bits(policy)
    for _ in range(2):
        with reference.first():
            found = reference.score(batch())
        assert torch.equal(found.logp, first.logp) and found.fingerprint == first.fingerprint
        assert torch.equal(reference.score(batch()).logp, present)
        reference.save(tmp_path)
        reference.load(tmp_path)
    assert not torch.equal(present, first.logp)
    assert_untouched(policy, before)


def test_factors_of_unlike_rank_have_no_average() -> None:
    policy = train(lora())
    reference = build_reference(policy, "swap")
    reference.update(train(policy), 0.5, lora="product")
    before, options = reference.fingerprint(), [{"alpha": 0.5}, {"alpha": 1.0, "bias": 0.5}]
    for option in options:
        for call in (reference.update, reference.check_movable):
            with pytest.raises(
                ValueError, match=r"q_proj has rank 8 in the reference and 4 .* lora='product', or alpha 1"
            ):
                call(policy, **option)
    assert reference.fingerprint() == before and reference.updates == 1
    reference.update(policy)
    copied = reference.fingerprint()
    train(policy)
    reference.verify()
    assert reference.fingerprint() == copied, "it holds memory of the policy's"
    reference.update(policy, 0.5)
    assert reference.updates == 3 and ranks(reference) == {4}


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no LoRA": (llama, {"alpha": 0.5}, "has no LoRA layers"),
    "no LoRA, copied": (llama, {"alpha": 1.0}, "has no LoRA layers"),
    "IA3": (_ia3, {"alpha": 0.5}, "has no LoRA layers"),
    "DoRA": (lambda: lora(use_dora=True), {"alpha": 0.5}, r"q_proj: its adapter is DoRA.*lora='factors', or alpha 1"),
    "AdaLoRA": (
        lambda: get_peft_model(llama(), AdaLoraConfig(init_r=6, target_r=4, total_step=9, target_modules=["q_proj"])),
        {"alpha": 0.5},
        r"q_proj: its adapter has factors .* that are not two matrices",
    ),
    "a bias": (lora, {"alpha": 0.5, "bias": 0.2}, "bias .* lora='product'"),
    "rank of factors": (lora, {"alpha": 0.5, "lora": "factors", "rank": 4}, "rank is for lora='product'"),
    "rank 0": (lora, {"alpha": 0.5, "rank": 0}, "at least 1"),
    "unknown": (lora, {"alpha": 0.5, "lora": "both"}, "'factors' or 'product'"),
}


@pytest.mark.parametrize("strategy", ["swap", "clone"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_run_and_at_the_update(case: str, strategy: str) -> None:
    make, options, match = REFUSED[case]
    policy = train(make())
    reference = build_reference(policy, strategy)
    before, options = reference.fingerprint(), {"lora": "product", **options}
    for call in (reference.check_movable, reference.update):
        with pytest.raises(ValueError, match=match):
            call(policy, **options)
    assert reference.fingerprint() == before and reference.updates == 0


def test_an_adapter_refuses_too_and_stays_one() -> None:
    for policy, match in ((_ia3(), "has no LoRA layers"), (lora(), "bias")):
        reference = build_reference(policy, "adapter")
        options: dict[str, Any] = {"lora": "product", "bias": 0.1 if match == "bias" else None}
        for call in (reference.check_movable, reference.update):
            with pytest.raises(ValueError, match=match):
                call(policy, 0.5, **options)
        assert reference.strategy == "adapter"


def test_dora_is_copied_whatever_is_asked_to_be_averaged() -> None:
    policy = train(lora(use_dora=True))
    reference = build_reference(policy, "swap")
    reference.update(train(policy), 1.0, lora="product")
    with torch.no_grad():
        assert torch.equal(reference.score(batch()).logp, score_tokens(policy, batch()).logp)


def test_sharded_policies_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = train(lora())
        early = build_reference(policy, "swap")
        early.update(train(policy), 0.5, lora="product")
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        reference = build_reference(policy, "swap")
        for call in (reference.check_movable, reference.update):
            with pytest.raises(ValueError, match=r"each rank holds only a part .*lora='factors'"):
                call(policy, 0.5, lora="product")
        reference.update(policy, 0.5)
        assert reference.last_update is not None and reference.last_update.distance is None
        with pytest.raises(ValueError, match="another LoRA rank in the reference"):
            early.score(batch())
    finally:
        torch.distributed.destroy_process_group()


def test_an_update_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = train(lora())
    reference = build_reference(policy, "swap")
    before, right, calls = reference.fingerprint(), reference.score(batch()).logp, []

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return packed(*args)

    monkeypatch.setattr("refkl.reference.moving.lora_update.packed", fail)
    with pytest.raises(torch.OutOfMemoryError):
        reference.update(train(policy), 0.5, lora="product")
    assert reference.fingerprint() == before and reference.updates == 0
    assert torch.equal(reference.score(batch()).logp, right)
    monkeypatch.undo()
    reference.update(policy, 0.5, lora="product")


def test_a_policy_whose_own_rank_changes_is_still_found() -> None:
    policy = train(lora())
    reference = build_reference(policy, "swap")
    reference.update(train(policy), 0.5, lora="product")
    factor = next(m for m in layers(policy).values()).lora_A["default"].weight
    factor.data = factor.data[:3].clone()
    with pytest.raises(ValueError, match="changed after the reference was built"):
        reference.score(batch())


def test_the_layouts_of_experts_come_back() -> None:
    a, b = torch.arange(24.0).view(6, 4), torch.arange(30.0).view(5, 6)
    factors = unpacked(a, b, experts=3)
    assert factors.a.shape == (3, 2, 4) and factors.b.shape == (3, 5, 2)
    # PEFT's: experts lie before ranks in A, and after them in B.
    assert torch.equal(factors.a[1], a[2:4]) and torch.equal(factors.b[1], b[:, [1, 4]])
    for found, given in zip(packed(factors), (a, b), strict=True):
        assert torch.equal(found, given)


def test_by_hand() -> None:
    """Of weights that are one number: 0.75 · (2 · 3) + 0.25 · (4 · 5) is 9.5."""
    own, theirs = (Factors(torch.tensor([[[a]]]), torch.tensor([[[b]]])) for a, b in ((3.0, 2.0), (5.0, 4.0)))
    both = stacked(own, theirs, 0.25)
    assert both.rank == 2 and float(both.b @ both.a) == 9.5
    one, lost = compressed(both, 1)
    assert one.rank == 1 and float(one.b @ one.a) == pytest.approx(9.5) and float(lost) == pytest.approx(0.0)


def test_sync_config() -> None:
    assert SyncConfig(lora="product", lora_rank=8).lora_rank == 8 and SyncConfig().lora == "factors"
    for options, match in (
        ({"lora_rank": 8}, "no use with lora 'factors'"),
        ({"lora": "product", "lora_rank": 0}, "at least 1"),
        ({"lora": "products"}, "sync.lora"),
    ):
        with pytest.raises(ValueError, match=match):
            SyncConfig(**options)  # type: ignore[arg-type]
