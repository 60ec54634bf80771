"""Averages with a small alpha arrive where an average in fp64 does, and policies with NaN are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import lora, moved
from support.models import gpt2, llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from refkl import ReferenceConfig, build_reference, trainable_parameters
from refkl.backend import named_weights
from refkl.reference.moving import average as moving

SMALL = {"llama": lambda: llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=32),
         "gpt2": lambda: gpt2(n_embd=8, n_layer=1, n_head=2, vocab_size=32)}  # fmt: skip
CASES = [
    ("llama", torch.float32, ReferenceConfig(strategy="clone")),
    pytest.param("gpt2", torch.float32, ReferenceConfig(strategy="swap"), marks=pytest.mark.slow),
    ("gpt2", torch.bfloat16, ReferenceConfig(strategy="clone", averages="host")),
    pytest.param("llama", torch.bfloat16, ReferenceConfig(strategy="swap"), marks=pytest.mark.slow),
]
UPDATES, PART = 10_200, 5_100


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().double().clone() for name, tensor in named_weights(model)}


@pytest.mark.parametrize(("family", "dtype", "config"), CASES, ids=lambda x: getattr(x, "strategy", str(x)))
def test_many_small_updates_arrive_where_an_fp64_average_does(
    family: str, dtype: torch.dtype, config: ReferenceConfig
) -> None:
    """Norm weights are 1 and drift by 0.01: at alpha 1e-6, alpha · drift is less than half an ulp of 1 in fp32."""
    alpha = 1e-6
    policy = SMALL[family]().to(dtype)
    reference = build_reference(policy, config)
    exact, start = numbers(policy), numbers(policy)
    for _ in range(UPDATES // PART):  # the policy drifts on
        with torch.no_grad():
            for parameter in trainable_parameters(policy):
                parameter.add_(0.01 if dtype == torch.float32 else 0.02)
        theirs = numbers(policy)
        for name, tensor in exact.items():  # the closed form of PART updates towards a constant policy
            tensor += (theirs[name] - tensor) * (1.0 - (1.0 - alpha) ** PART)
        for _ in range(PART):
            reference.update(policy, alpha=alpha)
    averages = reference._mover.averages
    found = {name: averages.mean.get(name, local).double() for name, local, _ in reference.weights()}
    assert found.keys() == exact.keys()
    gone = {name: (tensor - start[name]).norm() for name, tensor in exact.items()}
    ulp = {name: 2.0**-24 * tensor.abs().max() for name, tensor in exact.items()}
    for name, tensor in found.items():
        assert gone[name] > 1e3 * ulp[name], name
        assert (tensor - exact[name]).abs().max() <= 1.01 * ulp[name], name
        rest = averages.lost[name].double()
        assert (tensor + rest - exact[name]).abs().max() <= 1e-5 * (exact[name] - start[name]).abs().max(), name


def test_the_lost_part_is_kept_only_for_a_small_alpha() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    moved(policy)
    before = reference.memory().total
    reference.update(policy, alpha=moving.SMALL_ALPHA)
    assert not reference._mover.averages.lost and reference.memory().total == before
    reference.update(policy, alpha=moving.SMALL_ALPHA / 2)
    count = sum(p.numel() for p in policy.parameters())
    assert reference.memory().total - before == 4 * count
    lost = reference._mover.averages.lost
    assert any(bool(t.any()) for t in lost.values())
    reference.update(policy, alpha=0.5)  # a larger step uses it too, and keeps it
    assert lost.keys() == reference._mover.averages.lost.keys()
    reference.update(policy, alpha=1.0)  # nothing is lost in a copy
    assert not reference._mover.averages.lost and reference.memory().total == before
    assert all(torch.equal(t, dict(named_weights(policy))[n]) for n, t, _ in reference.weights())
    wide = llama().double()
    reference = build_reference(wide, "clone")
    reference.update(moved(wide), alpha=1e-6)
    assert not reference._mover.averages.lost  # fp64 takes its own steps


def test_a_bias_is_added_to_an_average_that_does_not_stand_still() -> None:
    policy = SMALL["llama"]()
    reference = build_reference(policy, "clone")
    start = numbers(policy)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(0.01)
    theirs = numbers(policy)
    for _ in range(2000):
        reference.update(policy, alpha=1e-6, bias=0.25)
    for name, local, _ in reference.weights():
        lead = theirs[name] - start[name]
        right = start[name] + lead * (1.0 - (1.0 - 1e-6) ** 2000) + 0.25 * lead
        assert (local.double() - right).abs().max() <= 2.0**-23 * right.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_lost_part_comes_back_from_a_folder(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = SMALL["gpt2"]().to(dtype)
    start = copy.deepcopy(policy)
    reference = build_reference(policy, "clone")
    moved(policy, 0.02)
    for _ in range(50):
        reference.update(policy, alpha=1e-5)
    assert any(bool(t.any()) for t in reference._mover.averages.lost.values())
    reference.save(tmp_path)
    other = build_reference(start, "swap")
    other.load(tmp_path)
    for one in (reference, other):
        for _ in range(50):
            one.update(policy, alpha=1e-5)
    assert reference.fingerprint() == other.fingerprint()
    assert all(torch.equal(t, other._mover.averages.lost[n]) for n, t in reference._mover.averages.lost.items())


def test_it_is_cut_as_the_policy_is_and_chunks_are_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for chunk, sharded in ((1 << 17, False), (7, False), (1 << 17, True)):
            monkeypatch.setattr(moving, "_CHUNK", chunk)
            torch.manual_seed(0)
            policy = llama()
            reference = build_reference(policy, "swap")
            moved(policy, 0.02)
            for _ in range(20):
                reference.update(policy, alpha=1e-5)
            if sharded:
                fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
            for _ in range(20):
                reference.update(policy, alpha=1e-5)
            lost = reference._mover.averages.lost
            found.append((reference.fingerprint(), {name: tensor.clone() for name, tensor in lost.items()}))
    finally:
        torch.distributed.destroy_process_group()
    assert found[0][0] == found[1][0] == found[2][0]
    assert all(torch.equal(t, found[1][1][n]) and torch.equal(t, found[2][1][n]) for n, t in found[0][1].items())


def test_a_weight_that_is_cast_loses_it() -> None:
    policy = llama()
    reference = build_reference(policy, "swap")
    reference.update(moved(policy, 0.02), alpha=1e-5)
    policy.bfloat16()
    reference.update(policy, alpha=0.5)
    assert not reference._mover.averages.lost


def test_new_factors_of_lora_layers_have_lost_nothing() -> None:
    policy = lora()
    reference = build_reference(policy, "swap")
    moved(policy, 0.02)
    reference.update(policy, alpha=1e-5)
    assert reference._mover.averages.lost
    reference.update(policy, alpha=0.5, lora="product")
    assert not any("lora_" in name for name in reference._mover.averages.lost)


# values that are not finite


REFERENCES: dict[str, Callable[[], tuple[nn.Module, ReferenceConfig]]] = {
    "clone": lambda: (llama(), ReferenceConfig(strategy="clone")),
    "swap": lambda: (gpt2().bfloat16(), ReferenceConfig(strategy="swap")),
    "adapter": lambda: (lora(), ReferenceConfig(strategy="adapter")),
    "quantized": lambda: (gpt2(), ReferenceConfig(strategy="clone", quantize="int8", max_kl_floor=10.0)),
    "offloaded": lambda: (gpt2().half(), ReferenceConfig(strategy="clone", offload=True)),
}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_policy_that_is_not_finite_is_refused(name: str, value: float, alpha: float) -> None:
    policy, config = REFERENCES[name]()
    reference = build_reference(policy, config)
    before, strategy = reference.fingerprint(), reference.strategy
    tensor = moved(policy, 0.01) and list(trainable_parameters(policy))[-1]
    with torch.no_grad():
        tensor.view(-1)[tensor.numel() // 2] = value
    if value == value and alpha == 1.0:
        reference.update(policy, alpha)  # a bias of -inf excludes a token, and can be copied
        return
    words = "NaN" if alpha == 1.0 else "NaN or infinite values"
    with pytest.raises(ValueError, match=rf"holds {words} in .*The reference is unchanged"):
        reference.update(policy, alpha)
    assert (reference.fingerprint(), reference.updates, reference.strategy) == (before, 0, strategy)
    reference.update(moved(REFERENCES[name]()[0], 0.01), alpha)  # and it can still be moved


def test_nan_in_a_lora_layer_of_another_rank_is_refused() -> None:
    policy = lora()
    reference = build_reference(policy, "swap")
    moved(policy, 0.02)
    reference.update(policy, 0.5, lora="product")
    before = reference.fingerprint()
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_A" in n)[0, 0] = torch.nan
    for options in ({"alpha": 0.5, "lora": "product"}, {"alpha": 1.0}):
        with pytest.raises(ValueError, match="lora_A"):
            reference.update(policy, **options)
        assert reference.fingerprint() == before


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -0.1])
def test_an_alpha_or_bias_that_is_no_weight_is_refused(alpha: float) -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    before = reference.fingerprint()
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\]"):
        reference.update(policy, alpha)
    if alpha:
        with pytest.raises(ValueError, match=r"bias must be in \[0, 1\]"):
            reference.update(policy, 0.5, bias=alpha)
    assert reference.fingerprint() == before
