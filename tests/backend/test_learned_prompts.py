"""Learned prompts: scored as PEFT runs each sequence alone, whatever the padding; their reference is the bare base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from support.models import MODELS, VOCABULARY, batch, llama, scored
from torch import Tensor, nn

from refkl import ReferenceConfig, TokenBatch, build_reference, check_reference, score_pair, score_tokens
from refkl import trainable_parameters as trained_of
from refkl.scoring import completion_logits, score_model, scores_from

VIRTUAL = 3
KINDS: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "P_TUNING": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
    "MULTITASK_PROMPT_TUNING": lambda: MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_tasks=2
    ),
    "CPT": lambda: CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "CARTRIDGE": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}


def prompted(kind: str, base: nn.Module) -> PeftModel:
    """With a prompt that is no small thing, as if trained."""
    policy = get_peft_model(base, KINDS[kind]()).eval()
    with torch.no_grad():
        for parameter in trained_of(policy):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return policy


def tokens_for(kind: str, **options: Any) -> TokenBatch:
    tasks = {"model_inputs": {"task_ids": torch.tensor([0, 1, 1])}} if kind.startswith("MULTITASK") else {}
    return batch((9, 6, 4), **options, **tasks)


def plain(policy: PeftModel, tokens: TokenBatch) -> Tensor:
    """[N] log-probabilities of the scored tokens: each sequence alone, without padding, through PEFT's own forward."""
    found = []
    for row in range(len(tokens)):
        real = tokens.attention_mask[row].bool()
        ids, mask = tokens.input_ids[row][real], tokens.completion_mask[row][real]
        task = {name: value[row : row + 1] for name, value in tokens.model_inputs.items()}
        logits = policy(input_ids=ids[None], **task).logits[0, -len(ids) :]
        log_p = logits.double().log_softmax(-1)
        found += [log_p[t - 1, ids[t]] for t in mask.nonzero()[:, 0].tolist()]
    return torch.stack(found)


# scoring the policy


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_each_sequence_alone(kind: str, family: str, padding: str) -> None:
    base = MODELS[family]()
    tokens = tokens_for(kind, padding=padding, width=12)
    without = score_tokens(base, tokens_for("", padding=padding, width=12)).logp
    policy = prompted(kind, base)
    expected, result = plain(policy, tokens), score_tokens(policy, tokens).logp
    torch.testing.assert_close(scored(result, tokens).double(), expected, rtol=0, atol=2e-5)
    assert (result - without).abs().max() > 1e-2  # the prompt says something
    weight = torch.randn(len(expected))
    slopes = [
        torch.autograd.grad((weight * value).sum(), trained_of(policy)) for value in (expected, scored(result, tokens))
    ]
    for right, found in zip(*slopes, strict=True):
        scale = right.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_never_made_and_would_say_the_same(kind: str) -> None:
    policy, tokens = prompted(kind, llama()), tokens_for(kind, padding="left")
    result = score_model(policy, tokens)
    assert result.outputs.logits.shape[-1] < VOCABULARY
    in_full = completion_logits(policy, tokens)
    assert in_full.logits.shape == (3, 3, VOCABULARY)
    torch.testing.assert_close(result.scores.logp, scores_from(in_full).logp)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_model_that_gives_all_positions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every family can be told which logits to keep."""

    class GivesAll(type(llama())):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, **others):
            others.pop("logits_to_keep", None)
            given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
            return super().forward(**given, position_ids=position_ids, **others)

    policy, tokens = prompted(kind, GivesAll(llama().config).eval()), batch(padding="left")
    torch.testing.assert_close(
        scored(score_tokens(policy, tokens).logp, tokens).double(), plain(policy, tokens), rtol=0, atol=2e-5
    )


def test_positions_that_the_batch_gives_begin_after_the_prompt() -> None:
    policy, tokens = prompted("PROMPT_TUNING", llama()), batch((6,), 4)
    positions = torch.tensor([[0, 1, 2, 9, 10, 11]])
    tokens = TokenBatch(tokens.input_ids, tokens.attention_mask, tokens.completion_mask, positions)
    base = policy.get_base_model()
    embeds = torch.cat([policy.get_prompt(1), base.model.embed_tokens(tokens.input_ids)], 1)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 12, 13, 14]])
    log_p = base(inputs_embeds=embeds, position_ids=ids).logits[0, VIRTUAL:].log_softmax(-1)
    expected = torch.stack([log_p[t - 1, tokens.input_ids[0, t]] for t in range(2, 6)])
    found = scored(score_tokens(policy, tokens).logp, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    counted = scored(score_tokens(policy, batch((6,), 4)).logp, tokens)
    assert (found - counted).abs().max() > 1e-3
    assert not base._forward_pre_hooks


def test_what_peft_would_drop_without_a_word_is_refused() -> None:
    tokens = batch(model_inputs={"token_type_ids": torch.zeros(3, 9, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"token_type_ids'\] has a value for each token, but none for the 3 virtual"):
        score_tokens(prompted("PROMPT_TUNING", llama()), tokens)


def test_checkpointing_that_would_drop_the_prompt_is_refused() -> None:
    policy = prompted("PREFIX_TUNING", llama())
    right = score_tokens(policy, batch()).logp
    policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(score_tokens(policy, batch()).logp, right)  # in eval mode nothing is dropped
    policy.train()
    with pytest.raises(ValueError, match="PREFIX_TUNING puts its prompt into the model's cache"):
        score_tokens(policy, batch())
    assert torch.isfinite(build_reference(policy).score(batch()).logp).all()


# the reference


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_bare_base(kind: str, family: str, tmp_path: Path) -> None:
    base = MODELS[family]()
    bare = copy.deepcopy(base)
    policy = prompted(kind, base).train()
    tokens = tokens_for(kind, padding="left")
    right = score_tokens(bare, tokens_for("", padding="left"), entropy=True)
    flags = [p.requires_grad for p in policy.parameters()]
    attributes = set(vars(policy))
    reference = build_reference(policy)
    assert reference.strategy == "adapter" and reference.memory().total == 0
    assert f"learned prompt ({kind})" in reference.reason
    assert reference.source == "the policy's bare base, without its adapter"
    twin = copy.deepcopy(policy)
    for _ in range(2):
        found = reference.score(tokens, entropy=True)
        assert torch.equal(found.logp, right.logp) and torch.equal(found.entropy, right.entropy)
        with torch.no_grad():
            for model in (policy, twin):
                torch.manual_seed(1)
                for parameter in trained_of(model):
                    parameter.add_(torch.randn_like(parameter))
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert set(vars(policy)) == attributes
    assert reference.fingerprint() == build_reference(bare, "clone").fingerprint()
    with torch.no_grad():
        assert torch.equal(score_tokens(policy.eval(), tokens).logp, score_tokens(twin.eval(), tokens).logp)
    for name, model in (("scored", policy), ("twin", twin)):
        model.save_pretrained(tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "scored" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()


def test_asked_for_by_name_it_is_the_same() -> None:
    policy = prompted("PREFIX_TUNING", llama())
    auto = build_reference(policy).score(batch()).logp
    for config in ("adapter", ReferenceConfig(source="base")):
        assert torch.equal(build_reference(policy, config).score(batch()).logp, auto)


@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_a_copy_with_the_prompt_in_it_is_refused(strategy: str) -> None:
    policy = prompted("P_TUNING", llama())
    with pytest.raises(ValueError, match=r"learned prompt \(P_TUNING\) is not part of the reference.*Use 'adapter'"):
        build_reference(policy, strategy)


def test_a_base_that_trains_beside_the_prompt_is_refused() -> None:
    policy = prompted("PROMPT_TUNING", llama())
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight trains .*'pretrained'"):
        build_reference(policy)


def test_a_score_that_raises_leaves_the_prompt_on() -> None:
    policy = prompted("PROMPT_TUNING", llama())
    reference, right = build_reference(policy), score_tokens(policy, batch()).logp

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    hook = policy.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        reference.score(batch())
    hook.remove()
    assert "forward" not in vars(policy)
    assert torch.equal(score_tokens(policy, batch()).logp, right)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_the_exact_divergence_is_from_the_bare_base(kind: str) -> None:
    base = llama()
    bare = copy.deepcopy(base)
    policy, tokens = prompted(kind, base), batch((7,), 4, padding="left")
    pair = score_pair(policy, build_reference(policy), tokens, divergence="reverse_kl")
    log_p, log_q = (m(input_ids=tokens.input_ids).logits[0, -7:].double().log_softmax(-1) for m in (policy, bare))
    right = (log_p.exp() * (log_p - log_q)).sum(-1)[2:6]
    torch.testing.assert_close(scored(pair.divergence, tokens).double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_check_notes_that_the_kl_does_not_begin_at_0(kind: str) -> None:
    policy = get_peft_model(llama(), KINDS[kind]()).train()
    optimizer = torch.optim.SGD(trained_of(policy), lr=0.1)
    findings = check_reference(policy, build_reference(policy), tokens_for(kind), optimizer=optimizer, vocabulary=258)
    assert not [f for f in findings if f.verdict == "fault"], findings
    zero = next(f for f in findings if f.check == "the KL is 0 before the first step")
    assert zero.verdict == "note" and f"learned prompt ({kind})" in zero.advice
