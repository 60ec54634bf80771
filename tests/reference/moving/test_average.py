"""A reference that moves: to the number, in every dtype, for every adapter, and never half-way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import ADAPTERS, lora, moved, scored
from support.models import batch, gpt2, llama, qwen2
from support.storages import counting
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from refkl import Reference, ReferenceConfig, build_reference, freeze, score_pair, trainable_parameters
from refkl.backend import named_weights
from refkl.reference.moving import average as moving
from refkl.reference.weights.shard_files import Files

HELD = {
    "clone": ReferenceConfig(strategy="clone"),
    "clone offloaded": ReferenceConfig(strategy="clone", offload=True),
    "swap": ReferenceConfig(strategy="swap"),
    "swap on the host": ReferenceConfig(strategy="swap", device="cpu"),
    "averages on the host": ReferenceConfig(strategy="clone", averages="host"),
    "shared_trunk": ReferenceConfig(strategy="shared_trunk"),
}


def policy_for(config: ReferenceConfig, **options: Any) -> nn.Module:
    policy = llama(**options)
    if config.strategy == "shared_trunk":
        freeze(policy, ["model.embed_tokens", "model.layers.0"])
    return policy


def numbers(reference: Reference) -> dict[str, Tensor]:
    return {name: local.clone() for name, local, _ in reference.weights() if reference.owns(name)}


# 16 bits


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_arrive_in_16_bits(dtype: torch.dtype, name: str) -> None:
    """Toward a constant policy what is left after n updates is (1 - alpha)^n; done in bf16 itself, nearly all is."""
    policy = policy_for(HELD[name]).to(dtype)
    reference = build_reference(policy, HELD[name])
    first = {n: t.float() for n, t in numbers(reference).items()}
    moved(policy, 0.05)
    theirs = {n: t.detach().float() for n, t in named_weights(policy)}
    naive = {n: t.to(dtype) for n, t in first.items()}
    for _ in range(300):
        reference.update(policy, alpha=0.001)
        for n, tensor in naive.items():
            tensor.lerp_(theirs[n].to(dtype), 0.001)
    found = numbers(reference)
    assert found and {t.dtype for t in found.values()} == {dtype}

    def left(now: dict[str, Tensor]) -> float:
        gaps = [(torch.linalg.vector_norm(theirs[n] - t.float()), torch.linalg.vector_norm(theirs[n] - first[n]))
                for n, t in now.items()]  # fmt: skip
        return float(sum(a**2 for a, _ in gaps) ** 0.5 / sum(b**2 for _, b in gaps) ** 0.5)

    assert left(found) == pytest.approx(0.999**300, rel=0.01)
    if dtype == torch.bfloat16:
        assert left(naive) > 0.9 > 0.999**300
    for n, mean in reference._mover.averages.mean.items():
        assert mean.dtype == torch.float32 and torch.equal(found[n], mean.to(dtype))


def test_averages_are_kept_only_where_they_are_needed() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    moved(policy)
    reference.update(policy, alpha=0.3)
    assert not reference._mover.averages.mean  # fp32 takes its own steps
    half = llama().bfloat16()
    reference = build_reference(half, "clone")
    moved(half)
    reference.update(half, alpha=1.0)
    assert not reference._mover.averages.mean and torch.equal(reference.score(batch()).logp, scored(half))
    moved(half)
    reference.update(half, alpha=0.5)
    assert reference._mover.averages.mean
    moved(half)
    reference.update(half, alpha=1.0)  # a copy again, the averages with it
    assert torch.equal(reference.score(batch()).logp, scored(half))
    for name, theirs in named_weights(half):
        assert torch.equal(reference._mover.averages.mean[name], theirs.float())


@pytest.mark.parametrize("strategy", ["clone", "swap"])
@pytest.mark.parametrize("where", ["device", "host"])
def test_averages_are_counted_as_memory(where: str, strategy: str) -> None:
    policy = llama().bfloat16()
    reference = build_reference(policy, ReferenceConfig(strategy=strategy, averages=where))
    moved(policy)
    with counting(policy) as count:
        before = reference.memory()
        reference.update(policy, alpha=0.5)
        after = reference.memory()
        # The counter looks at everything; what a Python object that is not a module holds is found as well.
        assert count() == pytest.approx(4 * sum(p.numel() for p in policy.parameters()), rel=0.01)
    assert after.total - before.total == 4 * sum(p.numel() for p in policy.parameters())
    assert (after.host - before.host > 0) == (where == "host")


class _Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(a.untyped_storage()._cdata) for a in args if isinstance(a, Tensor)}
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known and given is not None:
            self.found = max(self.found, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_an_update_takes_no_memory_but_for_a_chunk(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_CHUNK", 64)
    policy = llama()
    for config in HELD.values():
        policy = policy_for(config)
        reference = build_reference(policy, config)
        moved(policy)
        with _Largest() as largest:
            reference.update(policy, alpha=alpha)
        assert 0 < largest.found <= 4 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [0.001, 0.3, 0.6, 1.0])
def test_an_element_comes_out_the_same_wherever_a_weight_is_cut(alpha: float, dtype: torch.dtype) -> None:
    """So that shards of a weight do: torch's lerp has one path for full vectors and one for what is left over."""
    own, theirs = torch.randn(2, 1003).to(dtype)
    whole = torch.lerp(own, theirs, alpha)
    for length in (1, 3, 7, 16, 33, 500):
        parts = [own[i : i + length].clone().lerp_(theirs[i : i + length], alpha) for i in range(0, 1003, length)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_are_no_matter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 20, 7):
        monkeypatch.setattr(moving, "_CHUNK", chunk)
        torch.manual_seed(0)
        policy = llama().to(dtype)
        reference = build_reference(policy, "clone")
        moved(policy)
        reference.update(policy, alpha=0.3)
        found.append(reference.fingerprint())
    assert found[0] == found[1]


# the formula


@pytest.mark.parametrize("name", HELD)
def test_weights_and_buffers_are_mixed_by_name(name: str) -> None:
    config = HELD[name]
    policy = policy_for(config)
    policy.model.layers[1].register_buffer("seen", torch.full((3,), 2.0))
    policy.model.layers[1].register_buffer("count", torch.tensor(4))
    reference = build_reference(policy, config)
    first = {n: t.double() for n, t in numbers(reference).items()}
    moved(policy)
    policy.model.layers[1].seen.fill_(6.0)
    policy.model.layers[1].count.fill_(9)
    reference.update(policy, alpha=0.25)
    theirs = dict(named_weights(policy))
    found = numbers(reference)
    for n, tensor in found.items():
        if n.endswith("count"):
            assert int(tensor) == 9  # a count has no average
        else:
            torch.testing.assert_close(tensor.double(), 0.75 * first[n] + 0.25 * theirs[n].double(), rtol=0, atol=1e-6)
    assert found["model.layers.1.seen"].tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["clone", "swap", "averages on the host"])
def test_an_average_that_is_corrected_for_its_lag(name: str, dtype: torch.dtype) -> None:
    """BEMA as it is written, in fp64: EMA + bias (theta - theta_start)."""
    policy = policy_for(HELD[name]).to(dtype)
    reference = build_reference(policy, HELD[name])
    start = {n: t.double() for n, t in numbers(reference).items()}
    average = {n: t.clone() for n, t in start.items()}
    for t in range(1, 8):
        moved(policy, 0.1)
        alpha, bias = (10 + t) ** -0.5, (10 + t) ** -0.2
        reference.update(policy, alpha, bias=bias)
        theirs = {n: p.double() for n, p in named_weights(policy)}
        for n in average:
            average[n] += alpha * (theirs[n] - average[n])
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    for n, tensor in numbers(reference).items():
        right = average[n] + bias * (theirs[n] - start[n])
        torch.testing.assert_close(tensor.double(), right, rtol=tolerance, atol=tolerance / 4)
    reference.update(policy)  # a copy; a bias after it begins anew from there
    assert not reference._mover.averages.start and torch.equal(reference.score(batch()).logp, scored(policy))
    reference.update(policy, 0.5, bias=0.5)
    torch.testing.assert_close(reference.score(batch()).logp, scored(policy), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"bias must be in \[0, 1\]"):
        reference.update(policy, 0.5, bias=-0.5)


# adapters


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapters_reference_is_the_policy_after_a_copy(name: str, tmp_path: Path) -> None:
    """However it was held before; and the policy trains on as if nothing had been."""
    policy = ADAPTERS[name]().eval()
    reference = build_reference(policy)
    was = reference.strategy
    moved(policy)
    right = scored(policy)
    weights = {n: p.clone() for n, p in policy.named_parameters()}
    flags = [p.requires_grad for p in policy.parameters()]
    reference.update(policy)
    assert reference.strategy == "swap" and (was in ("adapter", "swap"))
    assert torch.equal(reference.score(batch()).logp, right)
    assert reference.memory().total > 0
    moved(policy)
    assert torch.equal(reference.score(batch()).logp, right) and not torch.equal(scored(policy), right)
    assert flags == [p.requires_grad for p in policy.parameters()]
    moved_on = {n: p.clone() for n, p in policy.named_parameters()}
    reference.score(batch())
    assert all(torch.equal(p, moved_on[n]) for n, p in policy.named_parameters()) and set(weights) == set(moved_on)
    reference.verify()
    policy.save_pretrained(tmp_path / "adapter")
    assert not [f for f in (tmp_path / "adapter").rglob("*") if "reference" in f.name]


LINEAR = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "LoRA with a bias": lambda: get_peft_model(
        qwen2(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True)
    ),
    "embedding": ADAPTERS["embedding"],
    "trainable tokens": ADAPTERS["trainable tokens"],
    "modules to save": ADAPTERS["modules to save"],
    "parameters of experts": ADAPTERS["parameters of experts"],
    "IA3": ADAPTERS["IA3"],
    "VeRA": ADAPTERS["VeRA"],
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_fresh_adapters_average_is_between_the_base_and_the_policy(name: str) -> None:
    """Each layer's weight is (1 - alpha) base + alpha policy: what these adapters do is linear in what they learn."""
    policy = LINEAR[name]().eval()
    reference = build_reference(policy)
    assert reference.strategy == "adapter"
    moved(policy)
    alpha = 0.3
    on = copy.deepcopy(policy).merge_and_unload()
    average = copy.deepcopy(on)
    base = dict(named_weights(policy))
    with torch.no_grad():
        for n, parameter in average.named_parameters():
            parameter.copy_((1 - alpha) * base[n] + alpha * parameter)
    reference.update(policy, alpha=alpha)
    torch.testing.assert_close(reference.score(batch()).logp, scored(average), rtol=0, atol=3e-5)
    assert reference.strategy == "swap"


def test_an_adapter_that_nothing_is_known_of_is_not_averaged() -> None:
    policy = ADAPTERS["DoRA"]().eval()
    reference = build_reference(policy)
    assert reference.strategy == "adapter"
    first, right = reference.fingerprint(), reference.score(batch()).logp
    moved(policy)
    for move in (reference.check_movable, reference.update):
        with pytest.raises(ValueError, match=r"q_proj has an adapter .*alpha 1, or reference\.strategy 'swap'"):
            move(policy, 0.5)
    assert reference.strategy == "adapter" and reference.fingerprint() == first and not reference.updates
    assert torch.equal(reference.score(batch()).logp, right) and reference.memory().total == 0
    reference.check_movable(policy)
    reference.update(policy)
    assert torch.equal(reference.score(batch()).logp, scored(policy))


def test_an_update_that_fails_leaves_the_adapter_off() -> None:
    policy = lora()
    reference = build_reference(policy)
    right = reference.score(batch()).logp
    with pytest.raises(ValueError, match="the policy has no weight"):
        reference.update(llama())
    moved(policy)
    assert reference.strategy == "adapter" and torch.equal(reference.score(batch()).logp, right)


def test_a_reference_that_moved_is_loaded_into_one_whose_adapter_is_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = lora()
    reference = build_reference(policy)
    moved(policy)
    reference.update(policy, alpha=0.4)
    reference.save(tmp_path)
    torch.manual_seed(0)
    for strategy in ("adapter", "swap", "clone"):
        again = lora()
        other = build_reference(again, strategy)
        other.load(tmp_path)
        assert other.fingerprint() == reference.fingerprint() and other.updates == 1
        assert torch.equal(other.score(batch()).logp, reference.score(batch()).logp)
        torch.manual_seed(0)


# all or nothing


@pytest.mark.parametrize("name", HELD)
def test_nothing_is_written_where_something_does_not_fit(name: str) -> None:
    config = HELD[name]
    policy = policy_for(config)
    reference = build_reference(policy, config)
    first = reference.fingerprint()
    for other, match in (
        (policy_for(config, num_hidden_layers=3), "that the reference lacks"),
        (policy_for(config, num_hidden_layers=1), "has no weight"),
        (policy_for(config, intermediate_size=72), "with shape"),
    ):
        if config.strategy == "swap" and "lacks" in match:
            continue  # it looks at what it holds a copy of
        with pytest.raises(ValueError, match=match):
            reference.update(moved(other), alpha=0.5)
    assert reference.fingerprint() == first and reference.updates == 0 and not reference._mover.averages.mean


def test_a_policy_in_parts_does_not_move_a_whole_reference(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        reference = build_reference(llama(), "clone")
        first = reference.fingerprint()
        sharded = fully_shard(moved(llama()), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="is sharded in the policy, but whole"):
            reference.update(sharded)
        assert reference.fingerprint() == first and not reference.updates
    finally:
        torch.distributed.destroy_process_group()


def test_a_policy_that_holds_the_references_numbers_does_not_move_it(tmp_path: Path) -> None:
    policy = moved(lora())
    reference = build_reference(policy, "swap")
    moved(policy)
    for use in (lambda: reference.update(policy), reference.fingerprint, lambda: reference.save(tmp_path)):
        with reference.keep_active(), pytest.raises(ValueError, match="Leave that context first"):
            use()
    reference.update(policy)
    assert torch.equal(reference.score(batch()).logp, scored(policy))


def test_an_error_half_way_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    reference.save(tmp_path)
    right = reference.score(batch()).logp
    moved(policy)
    move, calls = moving.Averages.move, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        return move(*args)

    monkeypatch.setattr(moving.Averages, "move", fails)
    with pytest.raises(MemoryError):
        reference.update(policy, alpha=0.5)
    for use in (lambda: reference.score(batch()), lambda: reference.save(tmp_path / "b")):
        with pytest.raises(ValueError, match="ended the reference's last update half-way"):
            use()
    with pytest.raises(ValueError, match="half-way"):
        reference.update(policy, alpha=0.5)  # it would be of a mixture
    reference.load(tmp_path)
    assert torch.equal(reference.score(batch()).logp, right)
    calls.clear()
    with pytest.raises(MemoryError):
        reference.update(policy, alpha=0.5)
    reference.update(policy)  # a copy mends it too
    assert torch.equal(reference.score(batch()).logp, scored(policy))


def test_a_load_half_way_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    reference.update(moved(policy))
    reference.save(tmp_path)
    reference.update(moved(policy))
    read, calls = Files.read, []

    def fails(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 30:
            raise OSError("the disk is gone")
        return read(*args)

    monkeypatch.setattr(Files, "read", fails)
    with pytest.raises(OSError, match="is gone"):
        reference.load(tmp_path)
    with pytest.raises(ValueError, match="half-way"):
        reference.score(batch())
    reference.load(tmp_path)
    reference.score(batch())


def test_no_memory_for_averages_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = llama().bfloat16()
    reference = build_reference(policy, "clone")
    first = reference.fingerprint()
    moved(policy)
    place, calls = moving.Averages.place, []

    def fails(self: Any, tensor: Tensor, *device: Any) -> Tensor:
        calls.append(tensor)
        if len(calls) == 5:
            raise MemoryError
        return place(self, tensor, *device)

    monkeypatch.setattr(moving.Averages, "place", fails)
    with pytest.raises(MemoryError):
        reference.update(policy, alpha=0.5)
    assert reference.fingerprint() == first and not reference._mover.averages.mean
    reference.score(batch())


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_write_that_is_lost_is_found(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As into a gathered copy of a ZeRO-3 parameter, which is dropped."""
    policy = llama()
    reference = build_reference(policy, "clone")
    moved(policy)
    pairs = reference.pairs

    def lost(theirs: nn.Module) -> list[moving.Pair]:
        return [p._replace(own=p.own._replace(local=p.own.local.clone())) if "up_proj" in p.own.name else p
                for p in pairs(theirs)]  # fmt: skip

    monkeypatch.setattr(reference, "pairs", lost)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj\.weight did not change"):
        reference.update(policy, alpha=alpha)


def test_a_policy_that_did_not_move_moves_nothing() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    first = reference.fingerprint()
    for alpha in (0.3, 1.0):
        reference.update(policy, alpha=alpha)
    assert reference.fingerprint() == first and reference.updates == 2


# what it was first


FIRST: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    **{name: (config, lambda config=config: policy_for(config)) for name, config in HELD.items()},
    "adapter": ("adapter", lora),
    "swap of an adapter": ("swap", lambda: moved(lora())),
    "int8": (ReferenceConfig(strategy="clone", quantize="int8", max_kl_floor=9.0), llama),
    "tied": ("clone", gpt2),
}


@pytest.mark.parametrize("name", FIRST)
def test_it_scores_as_it_did_first(name: str, tmp_path: Path) -> None:
    config, make = FIRST[name]
    torch.manual_seed(1)
    policy = make().eval()
    reference = build_reference(policy, config)
    reference.keep_first()
    first, stamp = reference.score(batch()), reference.fingerprint()
    with reference.first():
        assert torch.equal(reference.score(batch()).logp, first.logp)
    for _ in range(2):
        moved(policy)
        reference.update(policy, alpha=0.5)
    now, present = reference.score(batch()).logp, reference.fingerprint()
    assert not torch.equal(now, first.logp)
    for _ in range(2):
        with pytest.raises(KeyError), reference.first():
            scores = reference.score(batch())
            assert torch.equal(scores.logp, first.logp) and scores.fingerprint == stamp
            raise KeyError
        assert torch.equal(reference.score(batch()).logp, now) and reference.fingerprint() == present
    reference.verify()
    reference.save(tmp_path)
    torch.manual_seed(1)
    again = make().eval()
    other = build_reference(again, config)
    if name == "int8":
        other.score(batch())
    other.load(tmp_path)
    with other.first():
        assert torch.equal(other.score(batch()).logp, first.logp)
    assert torch.equal(other.score(batch()).logp, now)


def test_an_error_while_the_first_is_put_in_place_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    reference.keep_first()
    reference.update(moved(policy))
    weights = list(reference.weights())

    def fails() -> Any:
        yield from weights[:3]
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(reference, "weights", fails)
        patched.setattr(reference._mover.averages, "follow", lambda weights: None)
        with pytest.raises(MemoryError), reference.first():
            raise AssertionError
    with pytest.raises(ValueError, match="half-way"):
        reference.score(batch())


def test_gradients_are_kept_while_the_first_is_in_place() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    reference.keep_first()
    reference.update(moved(policy))
    with reference.first():
        assert score_pair(policy, reference, batch()).policy.logp.requires_grad


def test_the_first_is_not_taken_from_one_that_did_not_keep_it_so(tmp_path: Path) -> None:
    """An adapter keeps none: it was off. A swap that loads what it saved has no first, and says so."""
    torch.manual_seed(4)
    policy = lora()
    reference = build_reference(policy, "adapter")
    reference.keep_first()
    reference.update(moved(policy))
    reference.save(tmp_path / "a")
    for strategy, knows in (("adapter", True), ("swap", False), ("clone", False)):
        torch.manual_seed(4)
        again = lora()
        other = build_reference(again, strategy)
        right = other.score(batch()).logp
        other.load(tmp_path / "a")
        if knows:
            with other.first():
                assert torch.equal(other.score(batch()).logp, right)
        else:
            with pytest.raises(ValueError, match="was not kept"), other.first():
                pass


def test_what_is_kept_follows_the_policys_dtype() -> None:
    policy = llama().bfloat16()
    reference = build_reference(policy, "swap")
    reference.keep_first()
    first = reference.score(batch()).logp
    reference.update(moved(policy, 0.05), alpha=0.5)
    policy.float()
    reference.update(moved(policy, 0.05), alpha=0.5)
    now = reference.score(batch()).logp
    with reference.first():
        torch.testing.assert_close(reference.score(batch()).logp, first, rtol=0, atol=0.05)  # bf16's rounding
    assert torch.equal(reference.score(batch()).logp, now)
    reference.verify()


def test_what_is_kept_is_cut_as_the_policy_is(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = moved(lora()).bfloat16()
        reference = build_reference(policy, "swap")
        reference.keep_first()
        first = {n: t.clone() for n, t in reference._mover.averages.first.items()}
        reference.update(moved(policy, 0.05), alpha=0.5)
        means = {n: t.clone() for n, t in reference._mover.averages.mean.items()}
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        for parameter in trainable_parameters(policy):
            parameter.data.add_(0.01)
        reference.update(policy, alpha=0.5)
        assert all(layout.sharded for n, layout in reference._mover.averages.layouts.items() if n in means)
        theirs = dict(named_weights(policy))
        for name, mean in means.items():
            local = theirs[name].to_local().float()
            assert torch.equal(reference._mover.averages.mean[name], torch.lerp(mean, local, 0.5))
            assert torch.equal(reference._mover.averages.first[name], first[name])
    finally:
        torch.distributed.destroy_process_group()


def test_what_was_not_kept_in_time_is_refused() -> None:
    for policy, strategy in ((llama(), "clone"), (lora(), "adapter")):
        reference = build_reference(policy, strategy)
        with pytest.raises(ValueError, match=r"Call reference\.keep_first\(\)"), reference.first():
            pass
        moved(policy)
        reference.update(policy)
        with pytest.raises(ValueError, match="has moved already"):
            reference.keep_first()


def test_the_cache_knows_the_first_from_the_moved(tmp_path: Path) -> None:
    policy = llama()
    reference = build_reference(policy, ReferenceConfig(strategy="clone", cache=str(tmp_path)))
    reference.keep_first()
    first = reference.score(batch()).logp
    moved(policy)
    reference.update(policy)
    now = reference.score(batch()).logp
    assert reference.cache is not None and reference.cache.stats.hits == 0 and torch.equal(now, scored(policy))
    with reference.first():
        assert torch.equal(reference.score(batch()).logp, first) and reference.cache.stats.hits == 3
    assert torch.equal(reference.score(batch()).logp, now) and reference.cache.stats.hits == 6


def test_averages_come_back_from_a_folder(tmp_path: Path) -> None:
    """Without them the next small step would begin at the rounded weights."""
    torch.manual_seed(2)
    policy = llama().bfloat16()
    start = copy.deepcopy(policy)
    reference = build_reference(policy, "clone")
    moved(policy)
    for _ in range(20):
        reference.update(policy, alpha=0.001)
    reference.save(tmp_path)
    other = build_reference(start, "clone")
    other.load(tmp_path)
    for one in (reference, other):
        for _ in range(20):
            one.update(policy, alpha=0.001)
    assert reference.fingerprint() == other.fingerprint() and other.updates == 40
    assert all(torch.equal(t, reference._mover.averages.mean[n]) for n, t in other._mover.averages.mean.items())
    file = tmp_path / "reference.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="was altered"):
        build_reference(start, "clone").load(tmp_path)


def test_trainable_parameters_are_untouched_by_an_update() -> None:
    policy = llama()
    reference = build_reference(policy)
    before = [p.clone() for p in trainable_parameters(policy)]
    reference.update(moved(copy.deepcopy(policy)), alpha=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, trainable_parameters(policy), strict=True))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("place", [0, 4095, 4096, 9000, 12799])
def test_one_changed_element_is_found_wherever_it_is(place: int, alpha: float) -> None:
    """After a move, an element that changed is read again, as the forward would read it."""
    policy = llama(vocab_size=200, hidden_size=64)
    reference = build_reference(policy, "clone")
    weight, before = policy.model.embed_tokens.weight, policy.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[place] += 1.0
    reference.update(policy, alpha)
    found = {name: local for name, local, _ in reference.weights()}["model.embed_tokens.weight"]
    change = (found - before).view(-1)
    assert change[place].item() == pytest.approx(alpha, rel=1e-6) and change.count_nonzero() == 1
