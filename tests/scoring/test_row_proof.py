"""Rows are packed, split, padded and cached only where their scores depend on nothing but their own tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import dynamic_rope, gpt2, llama, longrope, qwen2, shared_batch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.neftune import activate_neftune

from refkl import ReferenceConfig, TokenBatch, build_reference, score_pair, score_tokens
from refkl.reference import score as scoring
from refkl.scoring import prepare
from refkl.scoring.row_proof import RowProof, row_proof

FAMILIES: dict[str, Callable[..., Any]] = {"llama": llama, "qwen2": qwen2}


def alone(model: nn.Module, batch: TokenBatch) -> Tensor:
    """[B, T] each row by itself, without padding, through the model's own logits."""
    found = torch.zeros(batch.input_ids.shape)
    for row in range(len(batch)):
        real = batch.attention_mask[row].bool()
        ids = batch.input_ids[row, real][None]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        own = torch.zeros(int(real.sum()))
        own[1:] = logp
        found[row, real] = own
    return found.masked_fill(~batch.completion_mask, 0.0)


def alora(make: Callable[..., Any]) -> PeftModel:
    model = get_peft_model(
        make(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 9], lora_alpha=32)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_alora_rows_are_those_of_each_row_alone(family: str) -> None:
    """aLoRA looks for its invocation tokens row by row; in one row it would find only the last ones."""
    model = alora(FAMILIES[family])
    batch = shared_batch()
    ids = batch.input_ids.clone()
    for row in range(len(batch)):
        first = int(batch.attention_mask[row].argmax())
        if int(batch.completion_mask[row].long().argmax()) - first >= 4:
            ids[row, first + 1 : first + 3] = torch.tensor([7, 9])
    batch = TokenBatch(ids, batch.attention_mask, batch.completion_mask)
    found = score_tokens(model, batch).logp.detach()
    off = score_tokens(model, TokenBatch(ids, batch.attention_mask, batch.completion_mask, prefix="off")).logp.detach()
    torch.testing.assert_close(found, off, atol=1e-5, rtol=0)
    assert prepare(model, batch).packed is None
    with model.disable_adapter():
        torch.testing.assert_close(
            score_tokens(model, batch).logp.detach(),
            alone(model.get_base_model(), batch),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_not_packed(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """NEFTune's noise is scaled by the length of what it is given, so a packed row would have less of it."""
    model = FAMILIES[family]().train()
    batch = shared_batch()
    assert prepare(model, batch).packed is not None
    hook = activate_neftune(model, 5.0)
    assert prepare(model, batch).packed is None
    before = torch.get_rng_state()
    assert row_proof(model, batch).packed is not None and torch.equal(before, torch.get_rng_state())
    hook.remove()
    assert prepare(model, batch).packed is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluated_model_with_noise_in_training_is_packed(family: str) -> None:
    model = FAMILIES[family]().eval()
    activate_neftune(model, 5.0)
    assert prepare(model, shared_batch()).packed is not None


def centred(module: nn.Module, args: Any, output: Any) -> Any:
    """A row's output depends on the other rows."""
    return output - output.mean(dim=(0, 1), keepdim=True)


def over_tokens(module: nn.Module, args: Any, output: Any) -> Any:
    """A token's output depends on the tokens before it, by their places in the forward and not in the row."""
    steps = torch.arange(1, output.shape[1] + 1, dtype=output.dtype)[None, :, None]
    return output.cumsum(1) / steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook", [centred, over_tokens])
def test_a_hook_that_sees_other_rows_is_not_packed(family: str, hook: Any) -> None:
    model = FAMILIES[family]()
    assert prepare(model, shared_batch()).packed is not None
    model.get_decoder().layers[0].mlp.register_forward_hook(hook)
    assert prepare(model, shared_batch()).packed is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proof_is_taken_once_a_state_and_leaves_nothing(family: str) -> None:
    model = FAMILIES[family]()
    model.get_decoder().layers[1].train()
    runs: list[int] = []
    batch = shared_batch()
    prepare(model, batch)
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    prepare(model, batch)
    first = len(runs)
    assert 0 < first <= 8
    for _ in range(3):
        assert prepare(model, batch).packed is not None
    assert len(runs) == first
    assert [layer.training for layer in model.get_decoder().layers] == [False, True]
    model.train()
    prepare(model, batch)
    assert len(runs) > first
    assert all(p.grad is None for p in model.parameters())


def uneven() -> TokenBatch:
    """Rows of 16, 6 and 5 tokens: with the first, the others are scaled too."""
    ids = torch.arange(3 * 16).remainder(250).view(3, 16) + 3
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 5:] = 0, 0
    done = mask.bool().clone()
    done[:, :2] = False
    return TokenBatch(ids, mask, done)


LONG: dict[str, Callable[[], Any]] = {"longrope": longrope, "dynamic": dynamic_rope}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("way", ["max_tokens", "memory", "cache"])
def test_a_model_scaled_by_the_longest_row_is_scored_together(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The policy is its own reference, so each log-ratio is 0."""
    model, batch = LONG[kind](), uneven()
    config = ReferenceConfig(strategy="clone")
    if way == "max_tokens":
        config = ReferenceConfig(strategy="clone", max_tokens=12)
    if way == "cache":
        config = ReferenceConfig(strategy="clone", cache=str(tmp_path / "cache"))
    reference = build_reference(model, config)
    if way == "memory":
        monkeypatch.setattr(scoring, "free_tokens", lambda *_: 12)
    with torch.no_grad():
        short = TokenBatch(*(x[1:, :6] for x in (batch.input_ids, batch.attention_mask, batch.completion_mask)))
        for tokens in (short, batch, short, batch):
            pair = score_pair(model, reference, tokens)
            torch.testing.assert_close(pair.policy.logp, pair.reference.logp, atol=1e-6, rtol=0)
    if way == "cache":
        with pytest.raises(ValueError, match="longest row"):
            reference.fill([batch], free=True)
        reference.fill([short], free=True)
        torch.testing.assert_close(reference.score(short).logp, score_tokens(model, short).logp.detach())
        with pytest.raises(ValueError, match="not in the cache"):
            reference.score(batch)


@pytest.mark.parametrize("kind", LONG)
def test_rows_seen_before_change_no_score(kind: str) -> None:
    """transformers keeps the scale of the longest row ever seen; a policy has generated, its reference has not."""
    model, batch = LONG[kind](), uneven()
    reference = build_reference(model, "clone")
    middle = TokenBatch(*(x[:1, :14] for x in (batch.input_ids, batch.attention_mask, batch.completion_mask)))
    with torch.no_grad():
        first = score_tokens(model, middle).logp
        model(input_ids=torch.arange(3, 63)[None])
        assert torch.equal(score_tokens(model, middle).logp, first)
        assert torch.equal(reference.score(middle).logp, first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["max_tokens", "cache"])
def test_rows_that_see_one_another_are_scored_together(family: str, way: str, tmp_path: Path) -> None:
    model, batch = FAMILIES[family](), uneven()
    model.get_decoder().layers[0].mlp.act_fn = Centred()
    config = ReferenceConfig(strategy="clone", max_tokens=12)
    if way == "cache":
        config = ReferenceConfig(strategy="clone", cache=str(tmp_path))
    reference = build_reference(model, config)
    for _ in range(2):
        pair = score_pair(model, reference, batch)
        torch.testing.assert_close(pair.policy.logp.detach(), pair.reference.logp, atol=1e-6, rtol=0)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
NOT_CAUSAL: dict[str, Callable[[], Any]] = {
    "masked": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "fsmt": lambda: FSMTForConditionalGeneration(
        FSMTConfig(
            langs=["a", "b"], src_vocab_size=64, tgt_vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_a_model_that_looks_ahead_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not a causal language model"):
        build_reference(NOT_CAUSAL[kind]().eval())


def test_a_decoder_of_bert_is_a_causal_language_model() -> None:
    model = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).eval()
    batch = uneven()
    ids = batch.input_ids % 60 + 2
    tokens = TokenBatch(ids, batch.attention_mask, batch.completion_mask)
    torch.testing.assert_close(build_reference(model).score(tokens).logp, alone(model, tokens), atol=1e-5, rtol=0)


def test_padding_that_a_model_reads_is_refused() -> None:
    config = RwkvConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    model = RwkvForCausalLM(config).eval()
    right = uneven()
    reference = build_reference(model)
    torch.testing.assert_close(reference.score(right).logp, alone(model, right), atol=1e-5, rtol=0)
    left = TokenBatch(*(x.flip(1) for x in (right.input_ids, right.attention_mask, right.completion_mask)))
    for score in (reference.score, lambda tokens: score_tokens(model, tokens)):
        with pytest.raises(ValueError, match="Pad on the right"):
            score(left)


def test_a_state_space_model_takes_padding_on_both_sides() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    right = uneven()
    left = TokenBatch(*(x.flip(1) for x in (right.input_ids, right.attention_mask, right.completion_mask)))
    for tokens in (right, left):
        torch.testing.assert_close(build_reference(model).score(tokens).logp, alone(model, tokens), atol=1e-4, rtol=0)


def test_the_listed_models_prove_what_the_list_says(caplog: pytest.LogCaptureFixture) -> None:
    for model in (llama(), qwen2(), gpt2()):
        assert row_proof(model, shared_batch()) == RowProof()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_quantised_layers_are_in_training_mode_during_a_trial() -> None:
    """In eval mode without gradients, on some processors, they rewrite their weight in a form that cannot train."""
    modules = pytest.importorskip("bitsandbytes").nn
    model = llama()
    layer = modules.Linear4bit(8, 8)
    model.quantised = layer.eval()
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda *args: modes.append(layer.training))
    row_proof(model, shared_batch())
    assert modes and all(modes) and not layer.training and not model.training
