"""Prompts that rows share run once: scores and gradients are those of the batch as it is, in each model that can."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.families import classes, tiny
from support.models import SHARED as ROWS
from support.models import gpt2, llama, shared_batch
from support.packed import USUAL, assert_alike, scored, variants
from torch import nn

from refkl import TokenBatch, build_reference, score_pair, score_tokens
from refkl.scoring import prepare
from refkl.scoring.packing import exact_models, pack, worthwhile
from refkl.scoring.packing.packed_batch import pack_tokens
from refkl.scoring.packing.prefix_mask import Seen, SharedMask, UnknownAttention


def assert_equal(model: nn.Module, **options: Any) -> None:
    """In one row and as it is: values to 1e-5, gradients to 1e-4 of the largest."""
    plain = shared_batch(prefix="off", **options)
    one = shared_batch(**options)
    assert prepare(model, plain).packed is None and prepare(model, one).packed is not None
    assert_alike(scored(model, one), scored(model, plain))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one row whatever it costs."""
    monkeypatch.setattr(worthwhile, "GAIN", 100.0)


def differs(name: str) -> str | None:
    """How a model's scores or gradients in one row are not the plain ones; None if they are."""
    windowed = 0
    for variant, model in variants(name).items():
        try:
            if prepare(model, shared_batch()).packed is None:
                continue
            assert_equal(model)
        except (AssertionError, UnknownAttention, RuntimeError, KeyError, AttributeError, ValueError) as error:
            return f"{variant}: {error}"
        windowed += variant != ""
    return None


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", USUAL)
def test_scores_and_gradients_are_the_plain_ones(name: str) -> None:
    model = tiny(name)
    for left in (True, False):
        assert_equal(model, left=left)
    if name in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):  # layers that see four tokens back, and layers that see all
        kinds = ["sliding_attention", "full_attention"]
        assert_equal(tiny(name, sliding_window=4, layer_types=kinds))
    assert differs(name) is None


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_the_list_of_models_is_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of transformers': those on the list are exact, and the others on it would not be, or cannot be."""
    wrong = {name: why for name in sorted(exact_models.EXACT) if (why := differs(name)) is not None}
    assert wrong == {}
    assert classes().keys() >= exact_models.EXACT


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("what", ["lora", "checkpointing", "reentrant", "mixed", "bf16", "train", "eager"])
def test_ways_to_train(what: str) -> None:
    model: nn.Module = llama(attn_implementation="eager") if what == "eager" else llama()
    context: Any = nullcontext()
    if what == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    if what in ("checkpointing", "reentrant"):
        model.train().gradient_checkpointing_enable({"use_reentrant": what == "reentrant"})
        model.enable_input_require_grads()
    if what == "train":
        model.train()
    if what == "mixed":
        context = torch.autocast("cpu", torch.bfloat16)
    if what == "bf16":
        model.to(torch.bfloat16)
    with context:
        if what in ("mixed", "bf16"):
            right, found = (score_tokens(model, shared_batch(prefix=p)).logp for p in ("off", "auto"))
            exact = score_tokens(model.float(), shared_batch(prefix="off")).logp if what == "bf16" else right
            assert float((found - right).abs().max()) < 0.2
            if what == "bf16":  # no further from the truth than the batch as it is
                assert float((found - exact).abs().mean()) < 1.3 * float((right - exact).abs().mean()) + 1e-3
        else:
            assert_equal(model)


def test_a_row_is_what_it_is_alone() -> None:
    """Against each row by itself, without padding: nothing of another row is seen."""
    model, batch = llama(), shared_batch()
    assert prepare(model, batch).packed is not None  # by the costs, too
    found = score_tokens(model, batch).logp.detach()
    for row in range(len(batch)):
        real = batch.attention_mask[row].bool()
        ids = batch.input_ids[row, real][None]
        logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        of_row = logp.gather(1, ids[0, 1:, None])[:, 0]
        wanted = batch.completion_mask[row, real][1:]
        torch.testing.assert_close(found[row, batch.completion_mask[row]].double(), of_row[wanted], rtol=0, atol=1e-5)


def test_every_token_once_and_no_padding() -> None:
    batch = shared_batch()
    packed = pack_tokens(batch)
    assert packed is not None
    # Prompts of 7, 4 and 1; of each completion all but its last token, which predicts nothing.
    assert packed.tokens == 7 + 4 + 1 + sum(count - 1 for _, count in ROWS)
    assert sorted(p.length for p in packed.prompts) == [1, 4, 7]
    assert packed.longest() == 7 + 4 or packed.longest() == max(n + c - 1 for n, c in ((7, 5), (4, 6), (1, 4)))


def test_completions_of_one_length_are_not_copied() -> None:
    """In attention they and their prompt are views of the one row, and so is what comes out of it."""
    batch = shared_batch([(0, 5)] * 4, (7,))
    packed = pack_tokens(batch)
    assert packed is not None
    seen = Seen(packed, 192)
    rows = torch.arange(packed.tokens)[:, None, None]
    prompt, completions = seen.blocks
    first, rest = prompt.queries.take(rows), completions.queries.take(rows)
    assert first.flatten().tolist() == list(range(7)) and rest.flatten().tolist() == list(range(7, 7 + 4 * 4))
    assert first.data_ptr() == rows.data_ptr() and rest.data_ptr() == rows[7:].data_ptr() and seen.place is None
    assert completions.keys.take(rows)[1].flatten().tolist() == [*range(7), *range(11, 15)]


@pytest.mark.usefixtures("always")
def test_what_is_scored_may_have_holes_and_rows_may_have_nothing() -> None:
    """A tool's answer inside a completion is seen and not scored; a row without a scored token is not run."""
    model = llama()
    results = []
    for prefix in ("off", "auto"):
        batch = shared_batch(prefix=prefix)
        mask = batch.completion_mask.clone()
        mask[0, 10:12] = False
        mask[2] = False
        results.append(scored(model, TokenBatch(batch.input_ids, batch.attention_mask, mask, prefix=prefix)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-4)
    nothing = TokenBatch(batch.input_ids, batch.attention_mask, torch.zeros_like(mask))
    assert prepare(model, nothing).packed is None and not score_tokens(model, nothing).logp.any()


@pytest.mark.usefixtures("always")
def test_positions_that_are_given_are_kept_and_equal_tokens_at_others_are_not_shared() -> None:
    model = gpt2()
    plain = shared_batch(prefix="off")
    positions = (plain.attention_mask.cumsum(1) - 1).clamp(min=0)
    positions[2] += 3
    results = []
    for prefix in ("off", "auto"):
        batch = TokenBatch(plain.input_ids, plain.attention_mask, plain.completion_mask, positions, prefix=prefix)
        results.append(score_tokens(model, batch).logp)
    packed = prepare(model, batch).packed
    assert packed is not None and sorted(p.length for p in packed.prompts) == [1, 4, 7, 7]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("width", [32, 512])
def test_what_cannot_gain_is_not_laid_out(count: int, length: int, width: int) -> None:
    """The quick look before it never keeps back a batch that the costs would take."""
    model = llama(hidden_size=width)
    for left in (True, False):
        for prompts in ((2, 2), (9, 2), (30, 30)):
            batch = shared_batch([(row % 2, length) for row in range(count)], prompts, left=left)
            tight = batch.attention_mask.any(0).nonzero()[:, 0]
            cut = TokenBatch(*(x[:, tight] for x in (batch.input_ids, batch.attention_mask, batch.completion_mask)))
            for tokens in (batch, cut):
                packed = pack_tokens(tokens)
                assert packed is not None
                seen = Seen(packed, worthwhile.pairs_per_token(model))
                taken = worthwhile.saves(model, packed, seen, tokens, dense=False)
                assert worthwhile.may_gain(model, tokens) or not taken
    alone = shared_batch(((0, 100),))
    one = alone.attention_mask[0].nonzero()[:, 0]
    assert not worthwhile.may_gain(
        model, TokenBatch(*(x[:, one] for x in (alone.input_ids, alone.attention_mask, alone.completion_mask)))
    )


def test_a_mask_in_full_costs_more() -> None:
    """Models that form their attention by hand get every pair of the one row, and long completions not in one row."""
    batch = shared_batch([(0, 60)] * 6, (40,))
    assert prepare(llama(), batch).packed is not None
    assert prepare(llama(attn_implementation="eager"), batch).packed is None
    short = shared_batch([(0, 3)] * 6, (60,))
    assert prepare(llama(attn_implementation="eager"), short).packed is not None


def test_where_it_is_not_done() -> None:
    batch = shared_batch()
    assert prepare(llama(), shared_batch(prefix="off")).packed is None
    holes = batch.attention_mask.clone()
    holes[0, 5] = 0
    assert prepare(llama(), TokenBatch(batch.input_ids, holes, batch.completion_mask)).packed is None
    image = {"pixel_values": torch.zeros(1)}
    assert (
        prepare(llama(), TokenBatch(batch.input_ids, batch.attention_mask, batch.completion_mask, None, image)).packed
        is None
    )
    prompted = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert prepare(prompted, batch).packed is None
    compiled = torch.compile(llama(), backend="eager")
    assert prepare(compiled, batch).packed is None
    alone = shared_batch(((0, 4),))
    unpadded = TokenBatch(*(x[:, 2:13] for x in (alone.input_ids, alone.attention_mask, alone.completion_mask)))
    assert prepare(llama(), unpadded).packed is None  # nothing to gain


@pytest.mark.parametrize("name", ["BloomForCausalLM", "JambaForCausalLM", "Llama4ForCausalLM", "DeepseekV4ForCausalLM"])
def test_models_for_which_it_would_be_wrong_are_run_plainly(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """ALiBi, a state, chunks, sparse attention. It is said once."""
    model = tiny(name)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "refkl.scoring"):
        assert prepare(model, shared_batch(prefix="off")).packed is None
        assert not [r for r in caplog.records if r.name.startswith("refkl")]
        for _ in range(2):
            assert prepare(model, shared_batch()).packed is None
    (record,) = (r for r in caplog.records if r.name.startswith("refkl"))
    assert "the model computes all of it, because " in record.message and "prefix='off'" in record.message


@pytest.mark.parametrize(
    "name, settings",
    [
        ("FalconForCausalLM", {"alibi": True}),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("MixtralForCausalLM", {"output_router_logits": True}),
    ],
)
def test_settings_with_which_it_would_be_wrong(name: str, settings: dict[str, Any]) -> None:
    assert prepare(tiny(name), shared_batch()).packed is not None
    assert prepare(tiny(name, **settings), shared_batch()).packed is None


@pytest.mark.parametrize("strategy", ["clone", "adapter", "swap"])
def test_the_kl_starts_at_zero(strategy: str) -> None:
    """Policy and reference take the same way: their difference is no rounding."""
    policy: Any = llama()
    if strategy == "adapter":
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    reference = build_reference(policy, strategy)
    batch = shared_batch()
    assert prepare(policy, batch).packed is not None
    pair = score_pair(policy, reference, batch, divergence="reverse_kl")
    assert torch.equal(pair.policy.logp, pair.reference.logp) and not pair.divergence.any()


def test_a_model_that_does_something_else_with_its_mask_is_told() -> None:
    batch = shared_batch()
    packed = pack_tokens(batch)
    mask = prepare(llama(), batch).inputs["attention_mask"]
    assert isinstance(mask, SharedMask) and mask.shape == (1, 1, packed.tokens, packed.tokens)
    assert mask[:, :, :, : packed.tokens] is mask
    with pytest.raises(UnknownAttention, match="prefix='off'"):
        mask + 1.0
    with pytest.raises(UnknownAttention):
        mask[:, :, 1:]


def test_masks_are_equal_where_the_same_tokens_are_seen() -> None:
    """A trunk's states are used again only under an equal mask; all of these are as large and hold the same numbers."""
    one, again, other = ([(0, 5), (0, 3)], [(0, 5), (0, 3)], [(0, 4), (0, 4)])
    masks = [prepare(llama(), shared_batch(rows, (7,))).inputs["attention_mask"] for rows in (one, again, other)]
    assert all(isinstance(mask, SharedMask) and mask.shape == masks[0].shape for mask in masks)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    narrow = SharedMask.of(masks[0].seen, 4)
    assert not torch.equal(masks[0], narrow) and torch.equal(narrow, SharedMask.of(masks[1].seen, 4))
    assert not torch.equal(masks[0], torch.ones(masks[0].shape, dtype=torch.bool))


@pytest.mark.parametrize("divergence", [None, "reverse_kl"])
@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_a_batch_is_packed_once_a_pair(monkeypatch: pytest.MonkeyPatch, strategy: str, divergence: str | None) -> None:
    policy = llama()
    reference = build_reference(policy, strategy)
    plain, packed = shared_batch(prefix="off"), shared_batch()
    expected = score_pair(policy, reference, plain, divergence=divergence)
    score_pair(policy, reference, packed, divergence=divergence)  # the first of all tries a packed row
    found: list[TokenBatch] = []

    def count(batch: TokenBatch) -> Any:
        found.append(batch)
        return pack_tokens(batch)

    monkeypatch.setattr(pack, "pack_tokens", count)
    for times in (1, 2):  # the second time anew: its tensors may have changed
        pair = score_pair(policy, reference, packed, divergence=divergence)
        assert found == [packed] * times
    torch.testing.assert_close(pair.policy.logp, expected.policy.logp)
    torch.testing.assert_close(pair.reference.logp, expected.reference.logp)
    packed.input_ids[:, -1] = (packed.input_ids[:, -1] + 1) % 50
    changed = score_pair(policy, reference, packed, divergence=divergence).policy.logp
    plain.input_ids[:, -1] = (plain.input_ids[:, -1] + 1) % 50
    torch.testing.assert_close(changed, score_tokens(policy, plain).logp)


def test_a_small_pair_takes_few_calls() -> None:
    """Calls of refkl's functions are time that a small model waits for."""
    policy, tokens = llama(), shared_batch()
    reference = build_reference(policy, "clone")
    for _ in range(2):
        score_pair(policy, reference, tokens)
    calls: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("refkl."):
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        score_pair(policy, reference, tokens)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 750, (len(calls), Counter(calls).most_common(10))


PREFIXES: tuple[Literal["auto", "off"], ...] = ("auto", "off")


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("place", range(6))
def test_prompts_that_differ_in_one_token_are_two_prompts(place: int, left: bool) -> None:
    prompt = torch.arange(2, 8)
    other = prompt.clone()
    other[place] = 20
    ids, mask, scored_at = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12).bool(), torch.zeros(4, 12).bool()
    for row, tokens in enumerate((prompt, other, prompt, other)):
        at = 2 if left else 0
        ids[row, at : at + 6], ids[row, at + 6 : at + 9] = tokens, torch.tensor([9 + row, 3, 5])
        mask[row, at : at + 9], scored_at[row, at + 6 : at + 9] = True, True
    packed = pack_tokens(TokenBatch(ids, mask, scored_at))
    assert packed is not None and [segment.length for segment in packed.prompts] == [6, 6]
    parents = [segment.parent for segment in packed.completions]
    assert len(set(parents)) == 2 and packed.tokens == 2 * 6 + 4 * 2  # nothing follows a last token
    model = llama()
    found = [score_tokens(model, TokenBatch(ids, mask, scored_at, prefix=prefix)).logp for prefix in PREFIXES]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
