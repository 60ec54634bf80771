"""refkl.compare, held against dense logits of one sequence at a time; intervals by hand, and by their coverage."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from support import plain
from support.comparisons import SIZES, dense, frozen, random_texts
from support.models import EOS, VOCABULARY, byte_tokenizer, gpt2, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from refkl.compare import Comparison, Text, compare_models, hold, positions, ratio_mean, read_texts, sample_texts
from refkl.compare.intervals import student
from refkl.kl import DIVERGENCES

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def adapted(seed: int, model: nn.Module | None = None) -> PeftModel:
    """With an adapter that was trained."""
    torch.manual_seed(0)
    policy = get_peft_model(model or llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


ORDER = {"order": 0.7}
OPTIONS = {"jsd": {"jsd_weight": 0.3}, "amari": ORDER, "alpha": ORDER, "renyi": ORDER}


def test_values_are_those_of_dense_logits() -> None:
    torch.manual_seed(1)
    policy, other = llama(), frozen(gpt2(n_layer=1))
    texts = random_texts(SIZES)
    options = {"temperature": 1.7, "order": 0.7, "jsd_weight": 0.3, "batch_size": 2}
    found = compare_models(policy, hold(other), texts, kinds=DIVERGENCES, sampled=True, **options)
    assert found.kinds == DIVERGENCES and found.tokens == 26
    for at, text in enumerate(texts):
        z, ref_z = dense(policy, text, 1.7), dense(other, text, 1.7)
        for kind in DIVERGENCES:
            own = {key.removeprefix("jsd_"): value for key, value in OPTIONS.get(kind, {}).items()}
            exact = plain.divergence(z, ref_z, "amari" if kind == "alpha" else kind, **own)
            np.testing.assert_allclose(found.values[kind][at], exact.numpy(), rtol=1e-4, atol=1e-6)
        targets = torch.tensor(text.completion_ids)
        ratio = plain.logp(z, targets) - plain.logp(ref_z, targets)
        np.testing.assert_allclose(found.log_ratio[at], ratio.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.values["k1"][at], ratio.numpy(), rtol=1e-4, atol=1e-5)
        k3 = torch.exp(-ratio) - 1 + ratio
        np.testing.assert_allclose(found.values["k3"][at], k3.numpy(), rtol=1e-3, atol=1e-5)


def test_the_same_model_twice_is_exactly_zero() -> None:
    texts = random_texts(SIZES)
    for one, two in ((llama, llama), (gpt2, gpt2)):
        torch.manual_seed(3)
        policy = frozen(one())
        torch.manual_seed(3)
        reference = hold(frozen(two()))
        found = compare_models(policy, reference, texts, kinds=DIVERGENCES, sampled=True, order=0.5, batch_size=3)
        assert all((row == 0.0).all() for rows in (*found.values.values(), found.log_ratio) for row in rows)
    policy, reference = adapted(1), hold(adapted(1))
    found = compare_models(policy.train(), reference, texts)  # its dropout is off all the same
    assert all((row == 0.0).all() for row in found.values["reverse_kl"]) and policy.training
    assert found.per_token("reverse_kl").high == found.per_sequence("reverse_kl").mean == 0.0


def test_an_adapter_is_compared_with_its_base_and_with_another() -> None:
    texts, policy = random_texts(SIZES), adapted(1)
    with policy.disable_adapter():
        base = [dense(policy, text) for text in texts]
    torch.manual_seed(0)
    of_base = compare_models(policy, hold(frozen(llama())), texts).values["reverse_kl"]
    of_other = compare_models(policy, hold(adapted(2)), texts).values["reverse_kl"]
    for at, text in enumerate(texts):
        z = dense(policy, text)
        exact, apart = (plain.divergence(z, q, "reverse_kl") for q in (base[at], dense(adapted(2), text)))
        np.testing.assert_allclose(of_base[at], exact.numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(of_other[at], apart.numpy(), rtol=1e-4, atol=1e-6)


def test_holding_a_model_takes_memory_for_an_adapter_alone() -> None:
    model, policy = frozen(llama()), adapted(1)
    assert hold(model).memory().total == sum(b.nbytes for b in model.buffers()) < 100
    tuned = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert hold(policy).memory().total == tuned + sum(b.nbytes for b in policy.buffers())


# --- means and intervals


def test_students_quantile_is_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 100: 1.9840, 199: 1.9720, 1000: 1.9623}
    for freedom, value in table.items():
        assert student(freedom) == pytest.approx(value, abs=6e-5)
    assert student(10**9) == pytest.approx(1.959964, abs=1e-6)
    assert student(199) > student(200) > student(201)  # where the closed form ends


def test_an_interval_by_hand() -> None:
    alone = np.arange(4)
    found = ratio_mean(np.array([1.0, 2.0, 4.0, 5.0]), np.ones(4), alone)
    half = 3.182446 * math.sqrt(10 / 3 / 4)  # Student's: s² = 10/3, n = 4
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-6)
    # Two prompts with two sequences each: sums 3 and 9 over 3 and 6 tokens; residuals 3 - 3·4/3 = -1 and +1.
    found = ratio_mean(np.array([1.0, 2.0, 4.0, 5.0]), np.array([1.0, 2.0, 3.0, 3.0]), np.array([7, 7, 2, 2]))
    half = 12.706205 * math.sqrt(2 / 1 * 2) / 9
    assert (found.mean, found.low, found.high) == pytest.approx((12 / 9, 12 / 9 - half, 12 / 9 + half), abs=1e-6)
    assert ratio_mean(np.array([1.0, 2.0]), np.ones(2), np.arange(2), floor=0.0).low == 0.0
    single = ratio_mean(np.array([1.0, 2.0]), np.ones(2), np.zeros(2, dtype=np.int64))
    assert (single.mean, single.low, single.high) == (1.5, None, None)


def test_intervals_cover_the_truth_and_those_that_forget_prompts_do_not() -> None:
    """20 prompts with 4 answers each, of random length; half of the variance is the prompt's own, and longer answers
    have larger values, so that the mean is one of a ratio: E[Σ] / E[n] = (8·1 + var(n)·0.05) / 8."""
    generator, prompts, answers, trials = np.random.default_rng(0), 20, 4, 2000
    prompt_of = np.repeat(np.arange(prompts), answers)
    truth = 1 + 0.05 * 2.0 * 2.0 / 8.0  # lengths 6 or 10: mean 8, variance 4
    covered = forgetful = 0
    for _ in range(trials):
        lengths = generator.choice([6.0, 10.0], prompts * answers)
        level = 1 + 0.3 * generator.normal(size=prompts)[prompt_of] + 0.3 * generator.normal(size=len(lengths))
        sums = lengths * (level + 0.05 * (lengths - 8))
        found = ratio_mean(sums, lengths, prompt_of)
        naive = ratio_mean(sums, lengths, np.arange(len(lengths)))
        assert found.low is not None and found.high is not None and naive.low is not None and naive.high is not None
        covered += found.low <= truth <= found.high
        forgetful += naive.low <= truth <= naive.high
    assert 0.935 < covered / trials < 0.965
    assert forgetful / trials < 0.85


def test_means_by_token_and_by_position_are_those_of_a_plain_count() -> None:
    def with_fives(text: Text) -> Text:
        ids = [5 if at % 3 == 0 else token for at, token in enumerate(text.completion_ids)]
        return Text(text.row, text.prompt, text.prompt_ids, ids)

    texts = [with_fives(text) for text in random_texts(SIZES, prompts=["a", "b", "a", "c", ""])]
    generator = np.random.default_rng(1)
    values = [generator.exponential(size=len(t.completion_ids)) for t in texts]
    ratios = [generator.normal(size=len(t.completion_ids)) for t in texts]
    found = Comparison(texts, ("reverse_kl",), (), {"reverse_kl": values}, ratios)
    assert found.units.tolist() == [0, 1, 0, 3, 4] and found.unit == "prompt"
    everything = [
        (token, values[row][at], ratios[row][at], at)
        for row, text in enumerate(texts)
        for at, token in enumerate(text.completion_ids)
    ]
    assert found.per_token("reverse_kl").mean == pytest.approx(np.mean([v for _, v, _, _ in everything]))
    assert found.per_sequence("reverse_kl").mean == pytest.approx(sum(v.sum() for v in values) / 5)

    fives = [(v, r) for token, v, r, _ in everything if token == 5]
    (only,) = found.by_token("reverse_kl", least=len(fives))
    assert (only.token, only.count) == (5, 11)
    assert (only.mean, only.log_ratio) == pytest.approx(tuple(np.mean(fives, axis=0)))
    table = found.by_token("reverse_kl")
    assert [m.mean for m in table] == sorted((m.mean for m in table), reverse=True)
    assert sum(m.count for m in table) == found.tokens and found.by_token("reverse_kl", top=3) == table[:3]

    parts = found.by_position("reverse_kl", bins=4)  # 9 places: 3 wide
    assert [(p.first, p.last, p.tokens, p.sequences) for p in parts] == [(1, 3, 13, 5), (4, 6, 9, 4), (7, 9, 4, 2)]
    for part in parts:
        inside = [v for _, v, _, at in everything if part.first <= at + 1 <= part.last]
        assert part.mean.mean == pytest.approx(np.mean(inside))


def test_sequences_of_one_prompt_alone_are_units_of_their_own() -> None:
    texts = random_texts([(2, 3)] * 4, prompts=["a"] * 4)
    values = [np.full(3, float(at)) for at in range(4)]
    found = Comparison(texts, ("reverse_kl",), (), {"reverse_kl": values}, values)
    assert found.unit == "sequence" and found.per_token("reverse_kl").low is not None


# --- texts


def merging_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, and "ab" as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = CHAT if chat else None
    return made


def test_given_text_is_split_where_the_completion_begins() -> None:
    tokenizer = merging_tokenizer()

    def parts(text: Text) -> tuple[str, str]:
        return tokenizer.decode(text.prompt_ids), tokenizer.decode(text.completion_ids)

    rows = [{"prompt": "xy", "completion": "ba"}, {"prompt": "xa", "chosen": "bc"}, {"text": "abcd"}]
    found = read_texts(tokenizer, rows)
    assert [parts(t) for t in found.texts] == [("xy", "ba"), ("x", "abc"), ("ab", "cd")]
    assert (found.moved, found.truncated, found.left_out) == (1, 0, 0) and found.texts[2].prompt is None
    found = read_texts(tokenizer, [{"prompt": "xy", "completion": "cde"}, {"prompt": "xyzv", "completion": "c"},
                                   {"prompt": "x", "completion": ""}], limit=4)  # fmt: skip
    assert [parts(t) for t in found.texts] == [("xy", "cd")]
    assert (found.truncated, found.left_out) == (2, 2) and [t.row for t in found.texts] == [0]
    assert found.notes() == [
        "2 rows were cut to 4 tokens, the largest length",
        "2 rows were left out: there is no token to score",
    ]


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = merging_tokenizer(chat=True)
    asked = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": asked, "completion": [{"role": "assistant", "content": "yo"}]},
        {"prompt": asked, "completion": "yo"},
        {"prompt": [*asked, {"role": "assistant", "content": "ye"}], "completion": "s"},
    ]
    found = read_texts(tokenizer, rows[:2])
    # "<a" of <answer> is "<a" of <assistant> too: the completion begins where the two part.
    for text in found.texts:
        assert tokenizer.decode(text.prompt_ids) == "<user>hi<a"
        assert tokenizer.decode(text.completion_ids) == "ssistant>yo"
    assert found.moved == 2
    policy = llama(vocab_size=VOCABULARY + 1)
    drawn = sample_texts(policy, tokenizer, rows, max_new_tokens=2)
    assert [tokenizer.decode(t.prompt_ids) for t in drawn.texts] == ["<user>hi<answer>"] * 2 + ["<user>hi<assistant>ye"]
    with pytest.raises(ValueError, match="no chat template"):
        read_texts(merging_tokenizer(), rows)
    for wrong in ({"prompt": ["hi"], "completion": "x"}, {"prompt": "hi", "completion": [*asked]}, {"text": asked}):
        with pytest.raises(ValueError, match="Row 0 of the data"):
            read_texts(tokenizer, [wrong])


# --- samples


def test_samples_are_drawn_from_the_whole_distribution() -> None:
    """One prompt's first tokens, at temperature 0.8, though the model's own settings would take the likeliest alone."""
    torch.manual_seed(2)
    policy, tokenizer = llama(), byte_tokenizer()
    policy.generation_config.top_k, policy.generation_config.do_sample = 1, True
    policy.generation_config.min_p = 0.9
    before, state = policy.generation_config, torch.random.get_rng_state()
    draw = {"samples": 600, "max_new_tokens": 1, "temperature": 0.8, "batch_size": 200}
    found = sample_texts(policy, tokenizer, [{"prompt": "hello"}], **draw)
    assert policy.generation_config is before and torch.equal(torch.random.get_rng_state(), state)
    assert [t.sample for t in found.texts] == list(range(600))
    log_p = dense(policy, found.texts[0], 0.8)[0].log_softmax(-1)
    drawn = log_p[[t.completion_ids[0] for t in found.texts]]
    assert abs(drawn.mean() + plain.entropy(log_p[None])[0]) < 4 * drawn.std() / math.sqrt(600)
    again, other = (sample_texts(policy, tokenizer, [{"prompt": "hello"}], **draw, seed=seed) for seed in (0, 1))
    assert again.texts == found.texts != other.texts


@pytest.mark.parametrize("make", [llama, lambda: adapted(1)], ids=["plain", "adapter"])
def test_the_sampled_estimate_agrees_with_the_exact_divergence(make: Callable[[], nn.Module]) -> None:
    policy, tokenizer = make(), byte_tokenizer()
    torch.manual_seed(5)
    reference = hold(frozen(llama()))
    rows = [{"prompt": f"{letter} and"} for letter in "abcdefghijklmnop"]
    texts = sample_texts(policy, tokenizer, rows, samples=4, max_new_tokens=8, temperature=1.2, batch_size=32).texts
    found = compare_models(policy, reference, texts, sampled=True, temperature=1.2, batch_size=32)
    for mean in (found.per_token, found.per_sequence):
        exact, k1 = mean("reverse_kl"), mean("k1")
        assert k1.low is not None and k1.high is not None and exact.low is not None and exact.high is not None
        assert k1.low < exact.mean < k1.high
        assert exact.high - exact.low < k1.high - k1.low  # no noise of which token was drawn
    assert found.unit == "prompt" and len(set(found.units.tolist())) == 16


def test_samples_end_with_the_first_token_that_ends_them() -> None:
    policy, tokenizer = llama(), byte_tokenizer()
    ends = list(range(2, 100))
    policy.generation_config.eos_token_id = ends
    found = sample_texts(policy, tokenizer, [{"prompt": "a"}, {"prompt": "longer"}], samples=20, max_new_tokens=6)
    lengths = {len(t.completion_ids) for t in found.texts}
    assert len(lengths) > 2 and max(lengths) <= 6
    for text in found.texts:
        assert not set(text.completion_ids[:-1]) & set(ends)
        assert text.completion_ids[-1] in ends or len(text.completion_ids) == 6
    policy.generation_config.eos_token_id = None
    found = sample_texts(policy, tokenizer, [{"prompt": "a"}], samples=8, max_new_tokens=40)
    assert any(EOS in t.completion_ids for t in found.texts) or all(len(t.completion_ids) == 40 for t in found.texts)


def test_prompts_that_leave_no_room_keep_their_last_tokens() -> None:
    found = sample_texts(llama(), byte_tokenizer(), [{"prompt": "abcdef"}, {"prompt": "ab"}], max_new_tokens=5, limit=8)
    assert [byte_tokenizer().decode(t.prompt_ids) for t in found.texts] == ["def", "ab"] and found.truncated == 1
    with pytest.raises(ValueError, match="leaves no room for a prompt: the models take 8"):
        sample_texts(llama(), byte_tokenizer(), [{"prompt": "a"}], max_new_tokens=8, limit=8)
    with pytest.raises(ValueError, match="at 0 there is no distribution"):
        sample_texts(llama(), byte_tokenizer(), [{"prompt": "a"}], temperature=0.0)
    with pytest.raises(ValueError, match="no beginning-of-text token"):
        sample_texts(llama(), byte_tokenizer(), [{"prompt": ""}])


def test_a_learned_prompt_can_be_the_policy_and_not_the_reference() -> None:
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    policy, other, tokenizer = get_peft_model(llama(), config).eval(), frozen(gpt2()), byte_tokenizer()
    rows = [{"prompt": "abc"}, {"prompt": "d"}]
    texts = sample_texts(policy, tokenizer, rows, samples=8, max_new_tokens=4).texts
    assert [t.prompt_ids for t in texts[::8]] == [tokenizer(p)["input_ids"] for p in ("abc", "d")]
    found = compare_models(policy, hold(other), texts)
    assert positions(policy, other) == 125
    for text, values in zip(texts, found.values["reverse_kl"], strict=True):
        ids = torch.tensor([text.prompt_ids + text.completion_ids])
        with torch.no_grad():
            z = policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 2 + len(text.prompt_ids) : -1]
        exact = plain.divergence(z.double(), dense(other, text), "reverse_kl")
        np.testing.assert_allclose(values, exact.numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"learns a prompt \(PROMPT_TUNING\)"):
        hold(policy)


def test_a_token_without_a_logit_and_numbers_that_are_none() -> None:
    policy = frozen(llama())
    with pytest.raises(ValueError, match="Row 0 of the data has the token 258, and the models have 258 logits"):
        compare_models(policy, hold(policy), [Text(0, "a", [2], [3, 258])])
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="is NaN in row 4 of the data"):
        compare_models(policy, hold(frozen(broken)), [Text(4, "a", [2], [3])])
