"""score_tokens: against a slow implementation that scores each sequence alone, without padding, in fp64."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.families import tiny
from support.models import MODELS, VOCABULARY, batch, gpt2, llama, scored
from torch import nn

from refkl import TokenBatch, score_tokens
from refkl.scoring import completion_logits, scores_from

PADDINGS = ["left", "right"]


def plain(model, tokens, temperature=1.0):
    """[N] log-probabilities and entropies of the scored tokens, row after row."""
    logp, entropy = [], []
    for ids, real, mask in zip(tokens.input_ids, tokens.attention_mask.bool(), tokens.completion_mask, strict=True):
        row, wanted = ids[real], mask[real]
        if not wanted.any():
            continue
        log_p = (model(input_ids=row[None]).logits[0].double() / temperature).log_softmax(-1)
        for t in wanted.nonzero()[:, 0].tolist():
            logp.append(log_p[t - 1, row[t]])
            entropy.append(-(log_p[t - 1].exp() * log_p[t - 1]).sum())
    return torch.stack(logp), torch.stack(entropy)


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(found, expected, tolerance=1e-4):
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: n + m
        )


# what is scored


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_those_of_each_sequence_alone(name, padding, temperature):
    model, tokens = MODELS[name](), batch((11, 7, 5, 2), (4, 3, 5, 1), padding=padding, width=13)
    result = score_tokens(model, tokens, temperature=temperature, entropy=True)
    logp, entropy = plain(model, tokens, temperature)
    torch.testing.assert_close(scored(result.logp, tokens).double(), logp, rtol=0, atol=2e-5)
    torch.testing.assert_close(scored(result.entropy, tokens).double(), entropy, rtol=0, atol=2e-5)
    assert logp.std() > 0.5  # far from uniform: a wrong shift or position would show
    assert result.temperature == temperature and result.logp.dtype == torch.float32
    for values in (result.logp, result.entropy):
        assert torch.equal(values[~tokens.completion_mask], torch.zeros(4 * 13 - 12))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_each_sequence_alone(name, padding):
    model, tokens = MODELS[name](), batch((9, 6, 4), padding=padding)
    weight = torch.randn(2, 9)

    def weighted(logp, entropy):
        return (weight[0] * logp).sum() + (weight[1] * entropy).sum()

    result = score_tokens(model, tokens, temperature=0.8, entropy=True)
    found = gradients(model, weighted(scored(result.logp, tokens), scored(result.entropy, tokens)))
    assert_same_gradients(found, gradients(model, weighted(*plain(model, tokens, 0.8))))


class Bigram(nn.Module):
    """The smallest language model: it takes neither positions, use_cache nor logits_to_keep."""

    def __init__(self, extra=0):
        super().__init__()
        self.table, self.extra = nn.Parameter(torch.randn(5, 5)), extra

    def forward(self, input_ids, attention_mask):
        logits = self.table[input_ids]
        return SimpleNamespace(logits=torch.cat([logits[:, : self.extra], logits], 1))


def test_a_token_is_predicted_by_the_one_before_it():
    model = Bigram()
    tokens = TokenBatch(torch.tensor([[3, 1, 4, 2]]), torch.ones(1, 4), torch.tensor([[0, 1, 0, 1]]))
    log_p = model.table.log_softmax(-1)
    expected = torch.stack([torch.zeros(()), log_p[3, 1], torch.zeros(()), log_p[4, 2]])
    torch.testing.assert_close(score_tokens(model, tokens).logp[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_score_depends_on_the_tokens_before_it_alone(name):
    model, tokens = MODELS[name](), batch((8,), 7)
    changed = tokens.input_ids.clone()
    changed[0, 4] = (changed[0, 4] + 1 - 2) % (VOCABULARY - 2) + 2
    before = score_tokens(model, tokens).logp[0]
    after = score_tokens(model, TokenBatch(changed, tokens.attention_mask, tokens.completion_mask)).logp[0]
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()


@pytest.mark.parametrize("name", MODELS)
def test_padding_side_and_width_change_nothing(name):
    model = MODELS[name]()
    results = []
    for padding, width in (("right", 9), ("left", 9), ("right", 17), ("left", 17)):
        tokens = batch((9, 6, 4), padding=padding, width=width)
        values = scored(score_tokens(model, tokens).logp, tokens)
        results.append((values.detach(), gradients(model, values.sum())))
    for values, slopes in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=2e-5)
        assert_same_gradients(slopes, results[0][1])


@pytest.mark.parametrize("padding", PADDINGS)
def test_micro_batches_change_nothing(padding):
    model, tokens = llama(), batch((9, 6, 4, 7), (3, 1, 2, 6), padding=padding)
    whole = score_tokens(model, tokens).logp
    slopes = gradients(model, whole.sum())
    parts = [
        score_tokens(model, TokenBatch(tokens.input_ids[s], tokens.attention_mask[s], tokens.completion_mask[s])).logp
        for s in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, sum(part.sum() for part in parts)), slopes)


# where there is little or nothing to score


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [1, 6])
def test_nothing_scored_gives_zeros_that_hold_on_to_the_graph(name, width):
    """Every rank must run forward and backward alike, scored tokens or none."""
    model, tokens = MODELS[name](), batch((width, 1), 0)
    result = score_tokens(model, tokens, entropy=True)
    assert torch.equal(result.logp, torch.zeros(2, width)) and torch.equal(result.entropy, torch.zeros(2, width))
    slopes = gradients(model, result.logp.sum() + result.entropy.sum())
    assert all(torch.equal(slope, torch.zeros_like(slope)) for slope in slopes.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_rows_of_nothing_but_prompt_or_padding_do_no_harm(name, padding):
    model, tokens = MODELS[name](), batch((7, 0, 5), (3, 0, 0), padding=padding)
    alone = batch((7,), 3)
    values = score_tokens(model, tokens).logp
    expected = score_tokens(model, alone).logp
    torch.testing.assert_close(scored(values, tokens), scored(expected, alone), rtol=0, atol=2e-5)
    assert torch.equal(values[1:], torch.zeros(2, 7))
    assert_same_gradients(gradients(model, values.sum()), gradients(model, expected.sum()))


def test_unscored_columns_in_the_middle_are_zero():
    tokens = batch((8, 8), 0)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [2, 7]] = mask[1, 4] = True
    tokens = TokenBatch(tokens.input_ids, tokens.attention_mask, mask)
    model = llama()
    values = score_tokens(model, tokens).logp
    torch.testing.assert_close(scored(values, tokens).double(), plain(model, tokens)[0], rtol=0, atol=2e-5)
    assert torch.equal(values != 0, mask)


# what the model is given, and what it gives


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_hidden_times_the_head_is_the_logits(padding, tied):
    model, tokens = llama(tie_word_embeddings=tied), batch(padding=padding)
    found = completion_logits(model, tokens, hidden=True)
    torch.testing.assert_close(found.hidden @ model.lm_head.weight.T, found.logits)
    result = scores_from(found)
    log_p = (scored(result.hidden, tokens) @ model.lm_head.weight.T).log_softmax(-1)
    logp = log_p.gather(-1, scored(tokens.input_ids, tokens)[:, None])[:, 0]
    torch.testing.assert_close(logp, scored(result.logp, tokens))
    assert torch.equal(result.hidden[~tokens.completion_mask], torch.zeros(27 - 9, 32))
    assert not model.lm_head._forward_pre_hooks  # nothing is left on the model


def test_no_hook_is_left_when_the_model_raises():
    model, tokens = llama(), batch()
    with pytest.raises(IndexError):
        completion_logits(
            model,
            TokenBatch(tokens.input_ids + VOCABULARY, tokens.attention_mask, tokens.completion_mask),
            hidden=True,
        )
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("padding", ["left", "right"])
def test_model_inputs_reach_the_model_untouched(padding):
    """GPT-2 adds the embeddings of token_type_ids to those of the tokens."""
    model, tokens = gpt2(), batch((9, 6), padding=padding)
    types = tokens.input_ids.flip(1) * tokens.attention_mask
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with_types = TokenBatch(
        tokens.input_ids, tokens.attention_mask, tokens.completion_mask, model_inputs={"token_type_ids": types}
    )
    values = score_tokens(model, with_types).logp
    hook.remove()
    assert len(seen) == 1 and seen[0]["token_type_ids"] is types
    expected = []
    for ids, real, kind, mask in zip(
        tokens.input_ids, tokens.attention_mask.bool(), types, tokens.completion_mask, strict=True
    ):
        log_p = model(input_ids=ids[real][None], token_type_ids=kind[real][None]).logits[0].log_softmax(-1)
        expected += [log_p[t - 1, ids[real][t]] for t in mask[real].nonzero()[:, 0].tolist()]
    torch.testing.assert_close(scored(values, tokens), torch.stack(expected), rtol=0, atol=2e-5)


def test_position_ids_of_the_batch_are_used():
    model, tokens = gpt2(), batch((8, 8))
    positions = torch.arange(8).expand(2, -1) + 5
    shifted = TokenBatch(tokens.input_ids, tokens.attention_mask, tokens.completion_mask, positions)
    log_p = model(input_ids=tokens.input_ids, position_ids=positions).logits.log_softmax(-1)
    expected = log_p[:, :-1].gather(-1, tokens.input_ids[:, 1:, None])[..., 0][tokens.completion_mask[:, 1:]]
    found = scored(score_tokens(model, shifted).logp, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - scored(score_tokens(model, tokens).logp, tokens)).abs().max() > 0.1


def test_packed_sequences_with_restarting_positions_keep_their_own():
    """Two sequences in one row: positions are the caller's, and are not counted anew."""
    model, tokens = gpt2(), batch((8,), 3)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    packed = TokenBatch(tokens.input_ids, tokens.attention_mask, tokens.completion_mask, positions)
    log_p = model(input_ids=tokens.input_ids, position_ids=positions).logits[0].log_softmax(-1)
    expected = torch.stack([log_p[t - 1, tokens.input_ids[0, t]] for t in (5, 6, 7)])
    torch.testing.assert_close(scored(score_tokens(model, packed).logp, tokens), expected, rtol=0, atol=1e-5)


def test_positions_that_the_model_does_not_take_are_refused():
    tokens = batch((4,), 2, position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match=r"has position_ids, but Bigram takes none"):
        score_tokens(Bigram(), tokens)


def test_an_output_of_another_length_is_refused():
    ids = torch.tensor([[3, 1, 4, 2]])
    with pytest.raises(ValueError, match=r"gave \d+ positions for \d+ tokens"):
        score_tokens(Bigram(extra=2), TokenBatch(ids, torch.ones(1, 4), torch.tensor([[0, 1, 0, 1]])))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        score_tokens(llama(), batch(), temperature=temperature)


def test_the_model_stays_in_its_mode():
    model, tokens = gpt2(resid_pdrop=0.5).train(), batch()
    first, second = (score_tokens(model, tokens).logp for _ in range(2))
    assert model.training and not torch.equal(first, second)  # dropout is on
    model.eval()
    first, second = (score_tokens(model, tokens).logp for _ in range(2))
    assert not model.training and torch.equal(first, second)


def test_bf16_models_are_scored_in_fp32():
    """From the bf16 states on: the model's own logits are rounded to bf16, which is off by hundredths."""
    model, tokens = llama().to(torch.bfloat16), batch()
    found = completion_logits(model, tokens, hidden=True)
    mask = found.call.mask
    log_p = (found.hidden[mask].double() @ model.lm_head.weight.double().T).log_softmax(-1)
    expected = log_p.gather(-1, found.call.targets[mask][:, None])[:, 0]
    result = score_tokens(model, tokens).logp
    assert result.dtype == torch.float32
    torch.testing.assert_close(scored(result, tokens).double(), expected, rtol=0, atol=2e-6)
    assert found.logits.dtype == torch.bfloat16
    rounded = found.logits[mask].double().log_softmax(-1).gather(-1, found.call.targets[mask][:, None])[:, 0]
    assert (rounded - expected).abs().max() > 1e-4


def test_int32_ids():
    model, tokens = llama(), batch()
    narrow = TokenBatch(tokens.input_ids.int(), tokens.attention_mask.int(), tokens.completion_mask)
    assert torch.equal(score_tokens(model, narrow).logp, score_tokens(model, tokens).logp)


# PEFT


def test_lora_is_scored_as_its_merged_model_is():
    model, tokens = llama(), batch(padding="left")
    base = score_tokens(copy.deepcopy(model), tokens).logp
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    found = score_tokens(adapted, tokens).logp
    assert (found - base).abs().max() > 0.05
    torch.testing.assert_close(found, score_tokens(adapted.merge_and_unload(), tokens).logp, rtol=0, atol=2e-5)


# what the fused head cannot do is scored through the logits


def through_logits(model, tokens):
    return scores_from(completion_logits(model, tokens)).logp


def test_inference_mode():
    model, tokens = llama(), batch()
    expected = score_tokens(model, tokens).logp
    with torch.inference_mode():
        assert torch.equal(score_tokens(model, tokens).logp, expected)


def test_a_model_that_needs_more_than_tokens():
    """The head cannot be found by running such a model on two tokens alone."""

    class NeedsTask(type(llama())):
        def forward(self, input_ids, attention_mask, task, **options):
            embeds = self.model.embed_tokens(input_ids) + task[:, None]
            return super().forward(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    plain, tokens = llama(), batch()
    model = NeedsTask(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    task = torch.randn(len(tokens), plain.config.hidden_size)
    with_task = replace(tokens, model_inputs={"task": task})
    found = score_tokens(model, with_task).logp
    torch.testing.assert_close(found, through_logits(model, with_task))
    assert (found - score_tokens(plain, tokens).logp).abs().max() > 1e-2


def test_a_hook_on_the_model_that_changes_its_logits():
    model, tokens = llama(), batch()

    def halve(module, args, outputs):
        outputs.logits = outputs.logits * 0.5
        return outputs

    plain = score_tokens(model, tokens).logp
    hook = model.register_forward_hook(halve)
    for _ in range(3):
        found = score_tokens(model, tokens).logp
        torch.testing.assert_close(found, through_logits(model, tokens))
        assert (found - plain).abs().max() > 1e-2
    hook.remove()
    assert torch.equal(score_tokens(model, tokens).logp, plain)


def test_a_cap_that_is_set_after_the_first_score():
    model, tokens = tiny("Gemma2ForCausalLM").eval(), batch()
    for cap in (2.0, 0.5, 1.0):
        model.config.final_logit_softcapping = cap
        torch.testing.assert_close(score_tokens(model, tokens).logp, through_logits(model, tokens))


def test_detached_entropies_have_no_gradient() -> None:
    logits = completion_logits(llama(), batch())
    detached, attached = scores_from(logits, entropy="detached").entropy, scores_from(logits, entropy=True).entropy
    assert detached is not None and attached is not None and torch.equal(detached, attached)
    assert attached.requires_grad and not detached.requires_grad
    assert scores_from(logits).entropy is None
