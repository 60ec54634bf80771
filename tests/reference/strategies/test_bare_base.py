"""reference.source "base": the bare base of a PEFT policy, bit for bit, however its adapter was trained; or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.models import batch, llama, qwen2
from support.train_inputs import write_config
from torch import nn

from refkl import ReferenceConfig, build_reference, check_reference, score_tokens, trainable_parameters
from refkl.cli import main
from refkl.reference.strategies.bare_base import _LEAVES_THE_BASE

BASE = ReferenceConfig(source="base")
TARGETS = {"target_modules": ["q_proj", "v_proj"]}


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, **TARGETS, **options})


def moved(policy: nn.Module, seed: int = 1) -> nn.Module:
    """As if trained: every trained tensor moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def kind_of(name: str, **options: object) -> PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]](**{"target_modules": ["q_proj", "o_proj"], **options})


OPTIONS: dict[str, dict[str, object]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 16},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 4, "init_weights": "bat"},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PSOFT": {"r": 4, "ab_svd_init": "pissa_init"},
    "SHIRA": {"r": 4},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [*range(100)]},
    "VBLORA": {"r": 2, "vector_length": 4, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 16},
}
"""Where a tiny model needs others than the defaults, or another setting is the likelier one to change the base."""
PROMPTS = {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
"""In test_learned_prompts.py."""
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA": lambda: lora(use_rslora=True),
    "LoRA with a bias of its own": lambda: lora(lora_bias=True),
    "LoRA, orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "trainable tokens": lambda: lora(trainable_token_indices=[*range(100)]),
    "modules to save": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    **{
        name: lambda name=name: kind_of(name, **OPTIONS.get(name, {}))
        for name in sorted(_LEAVES_THE_BASE - PROMPTS - {"LORA"})
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_of_any_kind(kind: str, tmp_path: Path) -> None:
    base = llama()
    bare = copy.deepcopy(base)
    right = score_tokens(bare, batch()).logp
    policy = moved(get_peft_model(base, KINDS[kind]())).train()
    twin = copy.deepcopy(policy)
    flags = [p.requires_grad for p in policy.parameters()]
    reference = build_reference(policy, BASE)
    assert reference.strategy == "adapter" and reference.memory().total == 0
    assert reference.source == "the policy's bare base, without its adapter"
    assert "reference.source" in reference.reason
    for seed in (2, 3):
        assert not torch.allclose(score_tokens(policy, batch()).logp, right, atol=1e-3)
        assert torch.equal(reference.score(batch()).logp, right)
        moved(policy, seed), moved(twin, seed)
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert reference.fingerprint() == build_reference(bare, "clone").fingerprint()
    for name, model in (("scored", policy), ("twin", twin)):
        model.save_pretrained(tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "scored" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()


def norm_unfrozen() -> PeftModel:
    policy = get_peft_model(llama(), lora())
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    return policy


def merged() -> PeftModel:
    policy = moved(get_peft_model(llama(), lora()))
    policy.merge_adapter()
    return policy


def with_biases(bias: str) -> PeftModel:
    """Loaded to be looked at, so that nothing trains: the configuration alone tells."""
    return get_peft_model(qwen2(), lora(target_modules=["q_proj"], bias=bias)).requires_grad_(False)


def second_pissa() -> PeftModel:
    policy = get_peft_model(llama(), lora())
    policy.add_adapter("other", lora(init_lora_weights="pissa"))
    return policy


def named_after(init: str) -> PeftModel:
    """PEFT makes CorDA and LoRA-GA from data, and LoftQ on a GPU: what the configuration says of them is enough."""
    policy = get_peft_model(llama(), lora())
    policy.peft_config["default"].init_lora_weights = init
    return policy


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "PiSSA": (lambda: get_peft_model(llama(), lora(init_lora_weights="pissa")), "init_lora_weights='pissa'"),
    "PiSSA in steps": (
        lambda: get_peft_model(llama(), lora(init_lora_weights="pissa_niter_2")),
        "init_lora_weights='pissa_niter_2'",
    ),
    "OLoRA": (lambda: get_peft_model(llama(), lora(init_lora_weights="olora")), "init_lora_weights='olora'"),
    "CorDA": (lambda: named_after("corda"), "init_lora_weights='corda'"),
    "LoRA-GA": (lambda: named_after("lora_ga"), "init_lora_weights='lora_ga'"),
    "LoftQ": (lambda: named_after("loftq"), "init_lora_weights='loftq'"),
    "an adapter that is not active": (second_pissa, "init_lora_weights='pissa'"),
    "layers repeated": (lambda: get_peft_model(llama(), lora(layer_replication=[(0, 2), (1, 2)])), "layer_replication"),
    "bias all": (lambda: with_biases("all"), "bias='all'"),
    "bias of LoRA's layers": (lambda: with_biases("lora_only"), "bias='lora_only'"),
    "a norm unfrozen by hand": (norm_unfrozen, r"model\.norm\.weight trains"),
    "merged": (merged, "merged"),
    "a kind that is not known": (
        lambda: moved(get_peft_model(llama(), kind_of("FROD"))),
        "it is not known if FROD leaves the base as it was loaded",
    ),
}


@pytest.mark.parametrize("strategy", ["adapter", "auto"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_what_to_set_instead(case: str, strategy: str) -> None:
    policy, reason = REFUSED[case]
    with pytest.raises(ValueError, match=rf"(?s){reason}.*reference.source to 'pretrained'"):
        build_reference(policy(), ReferenceConfig(strategy=strategy, source="base"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_refused_would_have_been_another_model(init: str) -> None:
    base = llama()
    right = score_tokens(base, batch()).logp
    policy = get_peft_model(base, lora(init_lora_weights=init))
    with policy.disable_adapter():
        assert not torch.allclose(score_tokens(policy, batch()).logp, right, atol=1e-3)


def test_a_resumed_run_has_the_base_that_it_began_with(tmp_path: Path) -> None:
    base = llama()
    bare = copy.deepcopy(base)
    policy = get_peft_model(base, lora())
    first = build_reference(policy, BASE)
    moved(policy).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path, is_trainable=True)
    resumed = build_reference(again, BASE)
    assert resumed.strategy == "adapter" and resumed.fingerprint() == first.fingerprint()
    assert torch.equal(resumed.score(batch()).logp, score_tokens(bare, batch()).logp)
    stands = build_reference(again)  # by default, what was loaded
    assert stands.strategy == "swap" and torch.equal(stands.score(batch()).logp, score_tokens(again, batch()).logp)


def test_a_kind_that_is_not_known_is_taken_while_it_is_fresh() -> None:
    base = llama()
    right = score_tokens(base, batch()).logp
    policy = get_peft_model(base, kind_of("FROD"))
    reference = build_reference(policy, BASE)
    moved(policy)
    assert torch.equal(reference.score(batch()).logp, right)


def test_a_policy_without_an_adapter_is_refused() -> None:
    for strategy in ("auto", "adapter", "clone"):
        with pytest.raises(ValueError, match=r"'base' is the bare model under a PEFT adapter, but .* LlamaForCausalLM"):
            build_reference(llama(), ReferenceConfig(strategy=strategy, source="base"))


@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_a_copy_of_the_base_is_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=r"the policy holds its base itself.*Use 'adapter' instead"):
        build_reference(get_peft_model(llama(), lora()), ReferenceConfig(strategy=strategy, source="base"))


def test_a_sync_moves_it_to_the_policy() -> None:
    policy = moved(get_peft_model(llama(), lora()))
    reference = build_reference(policy, BASE)
    first = reference.score(batch()).logp
    reference.update(policy)
    with torch.no_grad():
        right = score_tokens(policy, batch()).logp
    assert torch.equal(reference.score(batch()).logp, right) and not torch.equal(right, first)


def test_a_base_unfrozen_later_is_an_error() -> None:
    policy = moved(get_peft_model(llama(), lora()))
    reference = build_reference(policy, BASE)
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight trains"):
        reference.score(batch())


def test_an_adapter_that_does_not_train_can_be_compared_with_its_base(tmp_path: Path) -> None:
    moved(get_peft_model(llama(), lora())).save_pretrained(tmp_path)
    bare = llama()
    policy = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)  # is_trainable=False is PEFT's default
    assert torch.equal(build_reference(policy, BASE).score(batch()).logp, score_tokens(bare, batch()).logp)


def test_the_cache_is_that_of_the_base(tmp_path: Path) -> None:
    """What was scored with the bare model answers for it under an adapter, and the other way round."""
    base = llama()
    bare = copy.deepcopy(base)
    policy = moved(get_peft_model(base, lora()))
    first = build_reference(policy, ReferenceConfig(source="base", cache=str(tmp_path)))
    right = first.score(batch()).logp
    first.cache.write()
    moved(policy, seed=2)
    for other in (
        build_reference(policy, ReferenceConfig(source="base", cache=str(tmp_path))),
        build_reference(bare, ReferenceConfig(strategy="clone", cache=str(tmp_path))),
    ):
        assert torch.equal(other.score(batch()).logp, right)
        assert (other.cache.stats.hits, other.cache.stats.misses) == (3, 0)


def test_check_notes_a_trained_adapter_and_finds_a_fresh_one_at_0() -> None:
    policy = get_peft_model(llama(), lora())
    for trained in (False, True):
        findings = check_reference(policy, build_reference(policy, BASE), batch())
        assert not [f for f in findings if f.verdict == "fault"], findings
        zero = next(f for f in findings if f.check == "the KL is 0 before the first step")
        assert zero.verdict == ("note" if trained else "ok")
        assert ("reference.source is 'base'" in zero.advice) == trained
        moved(policy)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
@pytest.mark.parametrize(
    ("peft", "found"),
    [
        ({"peft_type": "LORA", "r": 2}, "exactly 0.0"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "learned prompt"),
    ],
    ids=["LoRA", "prompt tuning"],
)
def test_refkl_check(
    peft: dict[str, object], found: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, method, peft={"task_type": "CAUSAL_LM", **peft}, reference={"source": "base"})
    assert main(["check", str(config), "--trainer.use_cpu", "true"]) == 0
    out = capsys.readouterr().out
    assert "nothing wrong was found" in out and "from the policy's bare base, without its adapter" in out
    assert found in " ".join(out.split())
