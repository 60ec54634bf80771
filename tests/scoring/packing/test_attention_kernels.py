"""Prompts that rows share, in policies that were loaded with flash or flex attention: in one row the mask attends.

Flex attention's own kernel runs here (forward alone, on a CPU). Flash attention's does not, and nothing in one row
should get as far as it: models are given its name after they were loaded, which would refuse it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import tiny
from support.models import llama, shared_batch
from support.packed import USUAL, assert_alike, scored, variants
from torch import nn
from transformers.integrations import flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refkl import build_reference, score_tokens
from refkl.backend import base_model
from refkl.scoring import forward, prepare
from refkl.scoring.packing import exact_models, worthwhile
from refkl.scoring.packing.prefix_mask import Seen, UnknownAttention
from refkl.scoring.row_proof import RowProof

NOT = {
    "FalconForCausalLM": "calls 'flash_attention_2' itself",
    "GPTJForCausalLM": "calls 'flash_attention_2' itself",
    "Gemma2ForCausalLM": "caps its logits",
    "VaultGemmaForCausalLM": "caps its logits",
    "GptOssForCausalLM": "has sinks",
}


def loaded_with(model: nn.Module, attention: str) -> nn.Module:
    """The model as if it had been loaded with attn_implementation=…"""
    base_model(model).config._attn_implementation_internal = attention  # type: ignore[union-attr]
    return model


def assert_equal(model: nn.Module, attention: str) -> None:
    """Torch's attention on the batch as it is, and in one row with another kernel."""
    right = scored(model, shared_batch(prefix="off"))
    loaded_with(model, attention)
    assert prepare(model, shared_batch()).packed is not None
    assert_alike(scored(model, shared_batch()), right)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """These kernels do not run on a CPU, so that no batch can be compared with its packed row under their names."""
    monkeypatch.setattr(forward, "row_proof", lambda model, batch: RowProof())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one row whatever it costs."""
    monkeypatch.setattr(worthwhile, "GAIN", 100.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
@pytest.mark.parametrize("name", [name for name in USUAL if name not in NOT])
def test_scores_and_gradients_are_those_of_torchs_attention(name: str, attention: str) -> None:
    assert_equal(tiny(name), attention)


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_every_model_on_the_list() -> None:
    """Taken and right, or left as it is for a reason; never an error in the middle of a run."""
    wrong, taken = {}, 0
    for name in sorted(exact_models.EXACT):
        for variant, model in variants(name).items():
            if not model._supports_flash_attn or prepare(model, shared_batch()).packed is None:
                continue
            try:
                if exact_models.why_not(loaded_with(model, "flash_attention_2"), model) is None:
                    assert_equal(loaded_with(model, "eager"), "flash_attention_2")
                    taken += 1
            except Exception as error:
                wrong[name, variant] = repr(error)
    assert wrong == {} and taken > 100


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("what", ["lora", "checkpointing", "reentrant"])
def test_ways_to_train(what: str) -> None:
    model: nn.Module = llama()
    if what == "lora":
        adapted = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapted)
    else:  # the second forward is not within `score_tokens`
        model.train().gradient_checkpointing_enable({"use_reentrant": what == "reentrant"})
        model.enable_input_require_grads()
    assert_equal(model, "flash_attention_2")


@pytest.mark.usefixtures("always")
def test_norms_in_float32_are_no_other_dtype_for_attention() -> None:
    """Queries and keys in float32, values in bfloat16: flash attention takes them, torch's would not."""
    model: Any = tiny("Qwen3ForCausalLM").bfloat16()
    with torch.no_grad():
        right = score_tokens(model, shared_batch()).logp
        for layer in model.model.layers:
            layer.self_attn.q_norm.float(), layer.self_attn.k_norm.float()
        found = score_tokens(loaded_with(model, "flash_attention_2"), shared_batch()).logp
    torch.testing.assert_close(found, right, rtol=0, atol=0.03)


@pytest.mark.usefixtures("always")
@pytest.mark.slow
def test_flex_attention_gives_the_scores_and_attends_to_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    kernel = flex_attention.compile_friendly_flex_attention

    def count(*args: Any, **kwargs: Any) -> Any:
        called.append(args[0].shape[0])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", count)
    model = llama(attn_implementation="flex_attention")
    plain, one = shared_batch(prefix="off"), shared_batch()
    with torch.no_grad():
        score_tokens(model, one)  # the first looks for the output head
        called.clear()
        found = score_tokens(model, one).logp
        assert called == []
        right = score_tokens(model, plain).logp
    assert called == [len(plain)] * model.config.num_hidden_layers
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    # What was registered is behind one function, however often a batch was scored.
    wrapped = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    assert wrapped.__wrapped__ is flex_attention.flex_attention_forward


@pytest.mark.usefixtures("always")
def test_keys_and_values_are_not_copied_for_each_head_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []
    attend = Seen.attend

    def count(self: Seen, query: Any, key: Any, *rest: Any, **options: Any) -> Any:
        heads.append((query.shape[1], key.shape[1]))
        return attend(self, query, key, *rest, **options)

    monkeypatch.setattr(Seen, "attend", count)
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    score_tokens(model, shared_batch())
    assert heads == [(4, 2)] * model.config.num_hidden_layers


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_dropout_reaches_attention(attention: str) -> None:
    """Of all of it nothing is left, which is not random."""
    model = llama(attention_dropout=1.0).train()
    right = score_tokens(model, shared_batch(prefix="off")).logp
    found = score_tokens(loaded_with(model, attention), shared_batch()).logp
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, score_tokens(model.eval(), shared_batch()).logp, atol=1e-3)


@pytest.mark.usefixtures("always")
def test_what_attention_is_given_beside_its_mask_is_not_lost() -> None:
    model = loaded_with(tiny("Gemma2ForCausalLM"), "sdpa")  # which takes no soft cap either
    with pytest.raises(UnknownAttention, match=r"softcap.*prefix='off'"):
        score_tokens(model, shared_batch())


@pytest.mark.usefixtures("always")
def test_the_first_kl_is_zero() -> None:
    """Policy and reference take one way."""
    policy = llama(attn_implementation="flex_attention")
    reference, tokens = build_reference(policy, "clone"), shared_batch()
    assert torch.equal(reference.score(tokens).logp, score_tokens(policy, tokens).logp)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", NOT)
def test_what_torchs_attention_would_not_compute_is_left_as_it_is(name: str) -> None:
    model = tiny(name)
    assert prepare(model, shared_batch()).packed is not None
    why = exact_models.why_not(loaded_with(model, "flash_attention_2"), model)
    assert why is not None and NOT[name] in why
    assert prepare(model, shared_batch()).packed is None


def test_attention_of_the_users_own_is_left_as_it_is() -> None:
    def own(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    ALL_ATTENTION_FUNCTIONS.register("own", own)
    try:
        model = loaded_with(llama(), "own")
        assert "'own'" in str(exact_models.why_not(model, model)) and prepare(model, shared_batch()).packed is None
        assert ALL_ATTENTION_FUNCTIONS["own"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["own"]
