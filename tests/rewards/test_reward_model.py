"""A reward model gives each text what its model says of that text alone, however texts are put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import EOS, PAD, byte_tokenizer, llama
from support.reward_models import alone, classifier
from tokenizers import processors
from transformers import (
    PreTrainedTokenizerFast,
)

from refkl.cli.inputs import load_reward
from refkl.config import RewardConfig
from refkl.rewards import RewardModel

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
PROMPTS = ["hello", "a much longer prompt than that", "hi", "b" * 40, "ends"]
COMPLETIONS = [" there", "!", " " * 9 + "x", "", " in its own end<eos>"]


def tokenizer(kind: str = "llama") -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    if kind == "bert":  # its classifier reads the first token, which is put there
        made.cls_token = "A"
        first = made.convert_tokens_to_ids("A")
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="A $0 <eos>", special_tokens=[("A", first), ("<eos>", EOS)]
        )
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(
    ("kind", "pad"), [("bert", "own"), *((k, p) for k in ("llama", "gpt2") for p in ("own", "end of text", "none"))]
)
def test_each_text_is_scored_as_alone(kind: str, pad: str, batch_size: int, tmp_path: Path) -> None:
    made = tokenizer(kind)
    classifier(kind, pad_token_id={"own": PAD, "end of text": EOS, "none": None}[pad]).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    # Anew: the reward sets what its model takes for padding.
    plain = type(classifier(kind)).from_pretrained(tmp_path)
    expected = alone(plain, made, [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])[:, 0]
    assert expected.std() > 0.05
    reward = RewardModel.load(str(tmp_path), batch_size=batch_size)
    found = reward(prompts=PROMPTS, completions=COMPLETIONS, trainer_state=None)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_conversations_go_through_the_reward_models_own_template() -> None:
    model, made = classifier(), tokenizer()
    prompts = [[{"role": "user", "content": text}] for text in ("hello", "a longer one")]
    completions = [[{"role": "assistant", "content": text}] for text in ("yes, indeed", "no")]
    reward = RewardModel(model, made)
    with pytest.raises(ValueError, match="no chat template"):
        reward(prompts=prompts, completions=completions)
    made.chat_template = CHAT
    texts = ["<user>hello<eos><assistant>yes, indeed<eos>", "<user>a longer one<eos><assistant>no<eos>"]
    expected = alone(model, made, texts)[:, 0].tolist()
    assert reward(prompts=prompts, completions=completions) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_long_text_loses_the_beginning_of_its_prompt(kind: str) -> None:
    model, made = classifier(kind), tokenizer(kind)
    prompts, completions = ["x" * 30 + "abcdef", "short"], [" the answer", " one"]
    reward = RewardModel(model, made, max_length=20)
    # 20 tokens, of which BERT's first and last are its own.
    kept = {"llama": "xxxabcdef the answer", "bert": "xabcdef the answer"}[kind]
    expected = alone(model, made, [kept, "short one"])[:, 0]
    assert reward(prompts=prompts, completions=completions) == pytest.approx(expected.tolist(), abs=1e-5)
    assert RewardModel(model, made).max_length == 128
    with pytest.raises(ValueError, match=r"reward\.max_length is 129, and the reward model takes 128 tokens at most"):
        RewardModel(model, made, max_length=129)


def test_a_label_by_name_or_number_and_its_probability() -> None:
    names = {"id2label": {0: "bad", 1: "good", 2: "spam"}, "label2id": {"bad": 0, "good": 1, "spam": 2}}
    model, made = classifier(**{**names, "num_labels": 3}), tokenizer()
    logits = alone(model, made, ["hello there", "hi, you"])
    inputs = {"prompts": ["hello", "hi"], "completions": [" there", ", you"]}
    for label in (1, "good"):
        assert RewardModel(model, made, label=label)(**inputs) == pytest.approx(logits[:, 1].tolist(), abs=1e-5)
    found = RewardModel(model, made, label="spam", probability=True)(**inputs)
    assert found == pytest.approx((logits[:, 2].exp() / logits.exp().sum(-1)).tolist(), abs=1e-5)
    model.config.problem_type = "multi_label_classification"  # labels that do not exclude each other
    found = RewardModel(model, made, label="spam", probability=True)(**inputs)
    assert found == pytest.approx((1 / (1 + (-logits[:, 2]).exp())).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match=r"3 labels: 0 'bad', 1 'good', 2 'spam'\. Choose one with reward\.label"):
        RewardModel(model, made)
    with pytest.raises(ValueError, match=r"no label 'godo'\. Did you mean 'good'"):
        RewardModel(model, made, label="godo")
    with pytest.raises(ValueError, match="no label 3"):
        RewardModel(model, made, label=3)
    with pytest.raises(ValueError, match="the model has one logit"):
        RewardModel(classifier(), made, label=0, probability=True)


def test_it_is_frozen_and_its_dropout_off() -> None:
    model = classifier("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    reward = RewardModel(model, tokenizer())
    once, again = (reward(prompts=PROMPTS, completions=COMPLETIONS) for _ in range(2))
    assert once == again and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_a_folder_is_loaded_as_asked(tmp_path: Path) -> None:
    model, made = classifier(), tokenizer()
    folder = tmp_path / "kind"
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    whole = load_reward(RewardConfig(model=str(folder)))
    expected = alone(model, made, ["hello there"])[0, 0].item()
    assert whole.__name__ == "kind"
    assert whole(prompts=["hello"], completions=[" there"]) == pytest.approx([expected], abs=1e-5)
    half = load_reward(RewardConfig(model=str(folder), dtype="bfloat16", name="half"))
    (rounded,) = half(prompts=["hello"], completions=[" there"])
    assert half.__name__ == "half" and 1e-6 < abs(rounded - expected) < 0.1


def test_no_made_up_head(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "causal")
    tokenizer().save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"has no score\.weight: transformers would initialise them at random"):
        RewardModel.load(str(tmp_path / "causal"))
    with pytest.raises(ValueError, match=r"reward\.model 'nowhere' cannot be loaded"):
        RewardModel.load("nowhere")


def test_it_is_whole_in_a_zero3_run(tmp_path: Path) -> None:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    model = classifier()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    run = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    reward = RewardModel.load(str(tmp_path))
    assert is_deepspeed_zero3_enabled() and run.is_zero3()  # the run's own is as it was
    for name, weight in reward.model.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=0)
