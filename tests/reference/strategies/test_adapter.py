"""`adapter`: taken where switched off is provably the policy as built, refused by name everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support.models import batch, llama, qwen2
from torch import nn

from refkl import ReferenceConfig, build_reference, score_tokens
from refkl.backend.adapters import switched_off
from refkl.reference.strategies import adapter


def _lora(**options: object) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})).eval()


def _trained(policy: PeftModel) -> PeftModel:
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return policy


def _unfrozen() -> PeftModel:
    policy = _lora()
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    return policy


def _merged() -> PeftModel:
    policy = _trained(_lora())
    policy.merge_adapter()
    return policy


def _not_trainable() -> PeftModel:
    policy = _lora()
    policy.requires_grad_(False)
    return policy


def _trained_token_row() -> PeftModel:
    """Trained rows that no other check would see: only token 200 differs."""
    policy = _lora(trainable_token_indices=[200])
    for name, parameter in policy.named_parameters():
        if "trainable_tokens_delta" in name:
            with torch.no_grad():
                parameter.add_(1.0)
    return policy


def _trained_saved_module() -> PeftModel:
    policy = _lora(modules_to_save=["embed_tokens"])
    wrapper = policy.get_base_model().model.embed_tokens
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight[200] += 1.0
    return policy


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "trained before": (lambda: _trained(_lora()), "trained already"),
    "PiSSA": (lambda: _lora(init_lora_weights="pissa"), "making it changed the base"),
    "OLoRA": (lambda: _lora(init_lora_weights="olora"), "making it changed the base"),
    "bias all": (
        lambda: get_peft_model(qwen2(), LoraConfig(r=4, target_modules=["q_proj"], bias="all")),
        "trains and is not part of the adapter",
    ),
    "a norm unfrozen by hand": (_unfrozen, r"model\.norm\.weight trains"),
    "merged": (_merged, "merged"),
    "not trainable": (_not_trainable, "is_trainable=False"),
    "a trained token row": (_trained_token_row, "trainable_tokens_delta.default differs"),
    "a trained module_to_save": (_trained_saved_module, r"modules_to_save\.default\.weight differs"),
    "no adapter": (llama, "no PEFT adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str) -> None:
    policy, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        build_reference(policy(), "adapter")


@pytest.mark.parametrize("case", ["trained before", "PiSSA", "bias all", "a norm unfrozen by hand", "merged"])
def test_auto_then_takes_a_swap_that_is_right(case: str) -> None:
    """disable_adapter() would give another model in each of these cases."""
    policy = REFUSED[case][0]().eval()
    right = score_tokens(policy, batch()).logp
    reference = build_reference(policy)
    assert reference.strategy == "swap"
    assert torch.equal(reference.score(batch()).logp, right)
    if case in ("trained before", "PiSSA"):
        with policy.disable_adapter():
            assert not torch.allclose(score_tokens(policy, batch()).logp, right, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda options: "-".join(options),
)
def test_fresh_variants_are_taken_and_stay_right_while_the_adapter_trains(options: dict[str, object]) -> None:
    policy = _lora(**options)
    base = score_tokens(llama_twin(), batch()).logp
    reference = build_reference(policy)
    assert reference.strategy == "adapter" and reference.memory().total == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    assert not torch.allclose(score_tokens(policy, batch()).logp, base, atol=1e-3)
    assert torch.equal(reference.score(batch()).logp, base)


def llama_twin() -> nn.Module:
    """The base that _lora() started from: the seed is the test's."""
    torch.manual_seed(0)
    return llama()


def test_what_the_user_froze_in_the_adapter_stays_frozen() -> None:
    """disable_adapter() turns requires_grad back on for the whole adapter."""
    policy = _lora()
    frozen = [p for n, p in policy.named_parameters() if "lora_A" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    build_reference(policy, "adapter").score(batch())
    assert not any(p.requires_grad for p in frozen)


def test_what_the_user_switched_off_in_the_adapter_stays_off() -> None:
    """disable_adapter() turns the whole adapter on afterwards."""
    policy = _lora()
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    build_reference(policy, "adapter").score(batch())
    layers = [m for m in policy.modules() if isinstance(m, LoraLayer)]
    assert [m for m in layers if m.disable_adapters] == [layer] and len(layers) > 1
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and not any("layers.0.self_attn.q_proj" in name for name in trained)


def test_several_scores_switch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, parts = _lora(), [batch(seed=seed) for seed in range(3)]
    reference = build_reference(policy, "adapter")
    right = [reference.score(part).logp for part in parts]
    trained = score_tokens(_trained(policy), parts[0]).logp.detach()
    switched = []
    monkeypatch.setattr(adapter, "switched_off", lambda policy: switched.append(1) or switched_off(policy))
    with reference.keep_active():
        found = [reference.score(part).logp for part in parts]
    assert len(switched) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert torch.equal(score_tokens(policy, parts[0]).logp, trained)
    with pytest.raises(RuntimeError, match="in the middle"), reference.keep_active():
        raise RuntimeError("in the middle")
    assert torch.equal(score_tokens(policy, parts[0]).logp, trained)
    assert torch.equal(reference.score(parts[0]).logp, right[0])


def test_it_does_not_move_between_several_scores(tmp_path: Path) -> None:
    policy = _lora()
    saved = build_reference(policy, "adapter")
    saved.update(policy)
    saved.save(tmp_path)
    reference = build_reference(policy, "adapter")
    right = reference.score(batch()).logp
    _trained(policy)
    for move in (lambda: reference.update(policy), lambda: reference.load(tmp_path)):
        with pytest.raises(ValueError, match="is open and uses the reference's weights"), reference.keep_active():
            move()
        assert reference.strategy == "adapter" and torch.equal(reference.score(batch()).logp, right)
    reference.keep_first()
    reference.update(policy)
    with (
        pytest.raises(ValueError, match="is open and uses the reference's weights"),
        reference.keep_active(),
        reference.first(),
    ):
        pass
    with reference.first():
        assert torch.equal(reference.score(batch()).logp, right)
    assert torch.equal(reference.score(batch()).logp, score_tokens(policy, batch()).logp)


def test_merging_later_is_an_error_not_another_reference() -> None:
    policy = _lora()
    reference = build_reference(policy, "adapter")
    policy.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        reference.score(batch())


def test_a_base_unfrozen_later_is_an_error_not_a_moving_reference() -> None:
    policy = _lora()
    reference = build_reference(policy, "adapter")
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight trains"):
        reference.score(batch())


def test_load_never_writes_into_the_policys_base(tmp_path) -> None:
    build_reference(_lora(), "adapter").save(tmp_path)
    other = _lora()
    with torch.no_grad():
        other.get_base_model().model.norm.weight.add_(1.0)
    before = other.get_base_model().model.norm.weight.clone()
    for strategy in ("adapter", "clone"):
        reference = build_reference(other, strategy)
        with pytest.raises(ValueError, match=r"shared with the policy|has a weight|has no weight"):
            reference.load(tmp_path)
        assert torch.equal(other.get_base_model().model.norm.weight, before)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_its_state_before_the_first_move_loads_after_it(alpha: float, tmp_path: Path) -> None:
    """Then it is the policy with its adapter off again, and moves again as it did."""
    policy = _lora()
    reference = build_reference(policy, "adapter")
    start, fingerprint = reference.score(batch()).logp, reference.fingerprint()
    reference.save(tmp_path / "start")
    _trained(policy)
    reference.update(policy, alpha)
    moved = reference.score(batch()).logp
    reference.save(tmp_path / "moved")
    reference.load(tmp_path / "start")
    assert torch.equal(reference.score(batch()).logp, start) and not torch.equal(moved, start)
    assert (reference.strategy, reference.updates, reference.fingerprint()) == ("adapter", 0, fingerprint)
    assert reference.memory().total == 0
    reference.update(policy, alpha)
    assert torch.equal(reference.score(batch()).logp, moved)
    reference.load(tmp_path / "start")
    reference.load(tmp_path / "moved")
    assert torch.equal(reference.score(batch()).logp, moved) and reference.strategy == "swap"


def test_a_refused_load_of_another_base_leaves_a_moved_reference_as_it_was(tmp_path: Path) -> None:
    build_reference(_lora(), "adapter").save(tmp_path)
    policy = _lora()  # with other random weights
    reference = build_reference(policy, "adapter")
    reference.update(_trained(policy), 0.3)
    moved, fingerprint = reference.score(batch()).logp, reference.fingerprint()
    with pytest.raises(ValueError, match="shared with the policy"):
        reference.load(tmp_path)
    assert torch.equal(reference.score(batch()).logp, moved) and reference.strategy == "swap"
    assert reference.updates == 1 and reference.fingerprint() == fingerprint


def test_options_that_it_cannot_honour_are_refused() -> None:
    for options in ({"dtype": "bfloat16"}, {"device": "cpu"}, {"source": "pretrained"}):
        with pytest.raises(ValueError, match="adapter"):
            build_reference(_lora(), ReferenceConfig(strategy="adapter", **options))


def test_fingerprint_is_that_of_the_bare_base() -> None:
    torch.manual_seed(0)
    policy = _lora()
    assert build_reference(policy).fingerprint() == build_reference(llama_twin(), "clone").fingerprint()


def test_a_cast_of_the_policy_is_followed() -> None:
    """DeepSpeed casts fp32 weights that are to train in bf16: no other reference, and nothing to find fault with."""
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    reference = build_reference(policy, "adapter")
    before = reference.fingerprint()
    policy.bfloat16()
    reference.verify()
    assert reference.recorded_fingerprint != before
    policy.base_model.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"up_proj\.weight has other values"):
        reference.verify()
    # To record it is not to approve of it.
    assert reference.provenance()["fingerprint"] == reference.recorded_fingerprint
    with pytest.raises(ValueError, match=r"up_proj\.weight has other values"):
        reference.verify()
