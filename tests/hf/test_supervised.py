"""Supervised fine-tuning on a leash: transformers' and TRL's own loss, plus the KL of a plain dense computation."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.models import byte_tokenizer, gpt2, llama, shared_batch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import refkl.hf.supervised
from refkl import KLConfig, ReferenceConfig, SyncConfig, build_reference
from refkl.hf import KLTrainer, with_reference
from refkl.scoring import prepare
from refkl.trl import KLSFTTrainer
from refkl.trl import with_reference as of_trl

TEXTS = [
    ("hello", " there, you"),
    ("a", "bc"),
    ("what is", " it?"),
    ("hi", " good morning to all"),
    ("x", "yz"),
    ("so", "o"),
]
COMMON: dict[str, Any] = {
    "report_to": [], "bf16": False, "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
    "lr_scheduler_type": "constant", "learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_steps": 3,
    "optim": "sgd", "max_grad_norm": 1e9, "train_sampling_strategy": "sequential",
}  # fmt: skip


def rows() -> Dataset:
    """Texts with the prompts' labels masked."""
    tokenizer, found = byte_tokenizer(), []
    for prompt, completion in TEXTS * 4:
        ahead, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + completion)["input_ids"]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * ahead + ids[ahead:]})
    return Dataset.from_list(found)


def hf(
    cls: type, model: Any, folder: Path, options: dict[str, Any] | None = None, side: str = "right", **more: Any
) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    args = TrainingArguments(str(folder / "run"), **{**COMMON, **(options or {})})
    more = {"data_collator": DataCollatorForSeq2Seq(tokenizer), "train_dataset": rows(), **more}
    return cls(model, args=args, processing_class=tokenizer, **more)


def sft(cls: type, model: Any, folder: Path, options: dict[str, Any] | None = None, **more: Any) -> Any:
    args = SFTConfig(str(folder / "run"), **{**COMMON, "gradient_checkpointing": False, **(options or {})})
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in TEXTS * 4])
    return cls(model, args=args, train_dataset=data, processing_class=byte_tokenizer(), **more)


MAKERS = {"hf": (hf, Trainer, KLTrainer), "sft": (sft, SFTTrainer, KLSFTTrainer)}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if entry.get(key) is not None]


def apart(model: Any) -> Any:
    """The same model with other weights: the KL to it is not 0."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    return other


def dense(policy: Any, reference: Any, inputs: dict[str, Tensor], everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """Sums over the tokens: cross-entropy of the labels, and KL(policy ‖ reference)."""
    ids, attention, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
    logp, ref = (
        F.log_softmax(m(input_ids=ids, attention_mask=attention).logits, -1)[:, :-1] for m in (policy, reference)
    )
    target = labels[:, 1:]
    loss = F.nll_loss(logp.transpose(1, 2), target, ignore_index=-100, reduction="sum")
    where = attention[:, 1:].bool() if everywhere else target != -100
    return loss, (logp.exp() * (logp - ref)).sum(-1)[where].sum()


def counted(inputs: dict[str, Tensor], everywhere: bool = False) -> tuple[int, int]:
    labels, attention = inputs["labels"][:, 1:], inputs["attention_mask"][:, 1:]
    own = int((labels != -100).sum())
    return own, int(attention.sum()) if everywhere else own


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kl_on", ["labels", "all"])
def test_a_step_is_that_of_a_dense_computation(maker: str, accumulation: int, kl_on: str, tmp_path: Path) -> None:
    """One SGD step on six texts, padded, prompts masked: loss, KL and weights, whatever the micro-batches."""
    make, _, cls = MAKERS[maker]
    policy = llama()
    other, plain = apart(policy), copy.deepcopy(policy)
    options = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    reference = build_reference(other, "clone")
    trainer = make(
        cls, policy, tmp_path, {**options, "max_steps": 1}, reference=reference, kl=KLConfig(coef=0.5), kl_on=kl_on
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.train()
    everywhere = kl_on == "all"
    task, kl = dense(plain, other, inputs, everywhere)
    labels, tokens = counted(inputs, everywhere)
    loss = task / labels + 0.5 * kl / tokens
    loss.backward()
    assert float(kl / tokens) > 0.05
    assert logged(trainer, "loss") == pytest.approx([loss.item()], rel=1e-5)
    assert logged(trainer, "kl") == pytest.approx([float(kl / tokens)], rel=1e-5)
    assert logged(trainer, "kl/coef") == [0.5]
    for mine, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 1e-2 * theirs.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("maker", MAKERS)
def test_without_a_coefficient_the_losses_are_the_trainers_own(maker: str, tmp_path: Path) -> None:
    make, plain, cls = MAKERS[maker]
    options = {
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    start = llama()
    runs = []
    for kind, more in ((plain, {}), (cls, {"kl": KLConfig(coef=0.0)})):
        trainer = make(kind, copy.deepcopy(start), tmp_path, options, eval_dataset=evaluated(maker), **more)
        trainer.train()
        runs.append(trainer)
    theirs, ours = runs
    for key in ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "eval_entropy"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), abs=1e-6, rel=1e-6), key
    assert logged(ours, "loss")[-1] < logged(ours, "loss")[0] and len(logged(ours, "eval_loss")) == 2
    kl = logged(ours, "kl")
    assert kl[0] == 0.0 and kl[-1] > 1e-4 and logged(ours, "eval_kl")[-1] > 1e-4


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "packing_strategy": "wrapped", "max_length": 16}, {"loss_type": "dft", "learning_rate": 3.0}],
)
def test_settings_of_trl(options: dict[str, Any], tmp_path: Path) -> None:
    start = llama()
    theirs, ours = (
        sft(cls, copy.deepcopy(start), tmp_path, options, **more)
        for cls, more in ((SFTTrainer, {}), (KLSFTTrainer, {"kl": KLConfig(coef=0.0)}))
    )
    theirs.train()
    ours.train()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-6, abs=1e-6), key
    assert logged(ours, "kl")[-1] > 1e-4


def evaluated(maker: str) -> Dataset:
    if maker == "hf":
        return rows().select(range(4))
    return Dataset.from_list([{"prompt": p, "completion": c} for p, c in TEXTS[:4]])


@pytest.mark.parametrize("maker", MAKERS)
def test_the_first_step_has_no_kl_and_the_leash_holds(maker: str, tmp_path: Path) -> None:
    make, _, cls = MAKERS[maker]
    start, runs = llama(), {}
    for coef in (0.0, 5.0):
        options = {"max_steps": 8, "learning_rate": 0.01, "per_device_train_batch_size": 24}
        trainer = make(cls, copy.deepcopy(start), tmp_path, options, kl=KLConfig(coef=coef))
        assert trainer.reference.strategy == "clone" and trainer.penalty.settled.estimator == "exact"
        trainer.train()
        runs[coef] = logged(trainer, "kl")
        assert runs[coef][0] == 0.0 and logged(trainer, "kl/max")[0] == 0.0
    assert runs[5.0][-1] < 0.5 * runs[0.0][-1]


@pytest.mark.parametrize("maker", MAKERS)
def test_the_policy_runs_once_a_micro_batch(maker: str, tmp_path: Path) -> None:
    make, _, cls = MAKERS[maker]
    policy, calls = llama(), []
    trainer = make(cls, policy, tmp_path, {"gradient_accumulation_steps": 2}, reference=build_reference(apart(policy)))
    policy.lm_head.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    prepare(policy.train(), shared_batch())  # a packed row is tried once
    calls.clear()
    trainer.train()
    looks = [shape for shape in calls if shape[0] == 1]  # what its head is, and its own loss
    assert len(calls) - len(looks) == 6 and len(looks) <= 2
    assert all(shape[-1] != policy.config.vocab_size for shape in calls if shape[0] != 1)  # no logits


class Weighted(Trainer):
    """A loss of a user's own, with a column of its own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return 3.0 * outputs.logits.float().logsumexp(-1).mean()


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logp = F.log_softmax(outputs.logits[:, :-1], -1).transpose(1, 2)
    return 2.0 * F.nll_loss(logp, labels[:, 1:], ignore_index=-100, reduction="sum") / num_items_in_batch


LOSSES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "a loss function": (Trainer, {}, {"compute_loss_func": doubled}),
    "a subclass": (Weighted, {}, {}),
    "label smoothing, sft": (SFTTrainer, {"label_smoothing_factor": 0.1}, {}),
    "a loss function, sft": (SFTTrainer, {}, {"compute_loss_func": doubled}),
    "dft, sft": (SFTTrainer, {"loss_type": "dft"}, {}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", LOSSES)
def test_other_losses_are_what_they_are_without_the_leash(case: str, tmp_path: Path) -> None:
    """Loss less coef · KL is the trainer's own, and both go into the gradient."""
    plain, options, more = LOSSES[case]
    make = sft if plain is SFTTrainer else hf
    start = llama()
    options = {**options, "max_steps": 1, "gradient_accumulation_steps": 3}
    theirs = make(plain, copy.deepcopy(start), tmp_path, options, **more)
    theirs.train()
    reference = build_reference(other := apart(start), "clone")
    ours = make(
        of_trl(plain), copy.deepcopy(start), tmp_path, options, reference=reference, kl=KLConfig(coef=0.5), **more
    )
    ours.train()
    batch = ours.data_collator([ours.train_dataset[i] for i in range(6)])
    _, kl = dense(policy := copy.deepcopy(start), other, dict(batch))
    kl = kl / counted(batch)[1]
    (0.5 * kl).backward()
    assert logged(ours, "kl") == pytest.approx([kl.item()], rel=1e-5)
    assert logged(ours, "loss")[0] - 0.5 * kl.item() == pytest.approx(logged(theirs, "loss")[0], rel=1e-5)
    for mine, own, of_kl in zip(ours.model.parameters(), theirs.model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(mine, own - 1e-2 * of_kl.grad, rtol=0, atol=2e-6)


def test_a_loss_that_is_no_cross_entropy_alone_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mixtral adds what balances its experts: the Trainer's loss has it, with the leash and without."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=258,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        **sizes,
    )
    start = MixtralForCausalLM(config)
    theirs = hf(Trainer, copy.deepcopy(start), tmp_path)
    theirs.train()
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        ours = hf(KLTrainer, start, tmp_path, kl=KLConfig(coef=0.0))
        ours.train()
    transformers.utils.logging.disable_propagation()
    assert len([r for r in caplog.records if "not only the model's cross-entropy" in r.getMessage()]) == 1
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-6)
    assert logged(ours, "kl")[0] == 0.0 and logged(ours, "kl")[-1] > 1e-6


def test_padding_on_the_left(tmp_path: Path) -> None:
    """Positions are counted from the mask for both; a full text's first token has a label after padding."""
    model, runs = gpt2(), []
    for side in ("left", "right"):
        trainer = hf(KLTrainer, copy.deepcopy(model), tmp_path, side=side)
        trainer.train()
        runs.append([logged(trainer, "kl"), logged(trainer, "loss")])
    assert runs[0][0][0] == 0.0
    assert runs[0] == [pytest.approx(values, abs=1e-5) for values in runs[1]]
    # The Trainer's loss has a text's first token too, which only padding comes before; no KL is taken there.
    whole, start = rows().map(lambda row: {"labels": row["input_ids"]}), llama()
    theirs, ours = (
        hf(cls, copy.deepcopy(start), tmp_path, {"max_steps": 1}, side="left", train_dataset=whole)
        for cls in (Trainer, KLTrainer)
    )
    theirs.train()
    ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-6)
    assert logged(ours, "kl") == [0.0]


@pytest.mark.parametrize("maker", MAKERS)
def test_lora_takes_the_adapter_off(maker: str, tmp_path: Path) -> None:
    make, _, cls = MAKERS[maker]
    base = llama()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(copy.deepcopy(base), lora)
    trainer = make(cls, policy, tmp_path, {"learning_rate": 0.5, "optim": "adamw_torch"}, kl=KLConfig(coef=1.0))
    assert trainer.reference.strategy == "adapter" and trainer.reference.memory().total == 0
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (4, 5)])
    with torch.no_grad():
        trainer.model.eval()
        _, kl = dense(policy, base, dict(batch))
        pair = refkl.score_pair(policy, trainer.reference, trainer._batch_of(dict(batch)), divergence="reverse_kl")
    assert logged(trainer, "kl")[0] == 0.0 and logged(trainer, "kl")[-1] > 0.01
    assert float(pair.divergence.sum()) == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_resumed_run_is_the_same_to_the_bit(maker: str, tmp_path: Path) -> None:
    make, _, cls = MAKERS[maker]
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "optim": "adamw_torch",
        "gradient_accumulation_steps": 2,
    }
    kl = KLConfig(coef=0.5, controller="adaptive", target=0.5, horizon=20)

    def run(folder: Path) -> Any:
        torch.manual_seed(0)
        return make(cls, llama(), folder, options, sync=SyncConfig(every=2, alpha=0.5), kl=kl)

    whole = run(tmp_path)
    whole.train()
    again = run(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for key in ("loss", "kl", "kl/coef", "kl/sequence", "grad_norm"):
        assert logged(again, key) == logged(whole, key), key
    assert whole.reference.updates == 2 == again.reference.updates
    assert again.reference.fingerprint() == whole.reference.fingerprint()
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_reference_in_host_memory_is_swept_once_a_step(maker: str, tmp_path: Path) -> None:
    make, _, cls = MAKERS[maker]
    start, runs = llama(num_hidden_layers=3), []
    for offload in (False, True):
        reference = build_reference(apart(start), ReferenceConfig(strategy="clone", offload=offload))
        scores, score = [], reference.score
        reference.score = lambda batch, score=score, scores=scores, **o: scores.append(len(batch)) or score(batch, **o)  # type: ignore[method-assign]
        trainer = make(
            cls, copy.deepcopy(start), tmp_path, {"gradient_accumulation_steps": 3, "max_steps": 2}, reference=reference
        )
        trainer.train()
        runs.append([logged(trainer, key) for key in ("loss", "kl")])
        assert scores == ([6, 6] if offload else [2] * 6)
    assert runs[0] == [pytest.approx(values, rel=1e-5) for values in runs[1]]


def test_outputs_are_the_models_own_where_they_are_looked_at(tmp_path: Path) -> None:
    """With compute_metrics the Trainer gathers logits; alone, the loss is asked for with outputs that are dropped."""
    seen: list[Any] = []
    options = {"max_steps": 1, "per_device_eval_batch_size": 4}
    start = llama()
    trainer = hf(
        KLTrainer, start, tmp_path, options, eval_dataset=rows().select(range(4)),
        compute_metrics=lambda p: seen.append(p.predictions) or {},
    )  # fmt: skip
    own = Trainer(start, args=trainer.args, data_collator=trainer.data_collator, eval_dataset=rows().select(range(4)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], abs=1e-6)
    batch = trainer.data_collator([rows()[i] for i in range(4)])
    expected = start(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.tensor(seen[0]), expected.detach())


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "an estimate": ("hf", {}, {"kl": KLConfig(estimator="k3")}, "tokens that the policy sampled.*Use 'exact'"),
    "an estimate, sft": ("sft", {}, {"kl": KLConfig(estimator="k1")}, "'k1' estimates the KL from tokens"),
    "in the reward": ("hf", {}, {"kl": KLConfig(placement="reward")}, "does not go into the reward"),
    "other tokens": ("hf", {}, {"kl_on": "label"}, "Did you mean 'labels'"),
    "a cache": ("hf", {}, {"reference": ReferenceConfig(cache="scores")}, "exact divergence needs"),
    "a policy made later": ("hf", {}, {"model_init": lambda trial: llama()}, "model_init makes another policy"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, options, more, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    make, _, cls = MAKERS[maker]
    with pytest.raises(ValueError, match=message):
        make(cls, None if "model_init" in more else llama(), tmp_path, options, **more)


def test_models_and_batches_that_cannot_be_scored(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="causal language models, and BertForMaskedLM is not one"):
        hf(KLTrainer, BertForMaskedLM(BertConfig(vocab_size=258, **sizes)), tmp_path)
    trainer = hf(KLTrainer, llama(), tmp_path)
    ids = torch.tensor([[2, 3, 4]])
    with pytest.raises(ValueError, match=r"needs input_ids and labels of one shape.*\['input_ids'\]"):
        trainer.compute_loss(trainer.model, {"input_ids": ids})
    with pytest.raises(ValueError, match="has position_ids and no attention_mask: its sequences are packed"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids, "position_ids": ids})

    class Elsewhere(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return model(input_ids=inputs["input_ids"] + 1).logits.mean()

    class Nowhere(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return next(model.parameters()).sum()

    for trainer_class, message in ((Elsewhere, "is not on the micro-batch's input_ids"), (Nowhere, "was not called")):
        with pytest.raises(ValueError, match=message):
            hf(with_reference(trainer_class), llama(), tmp_path).train()


def test_with_reference_of_trainers() -> None:
    class Mine(Trainer): ...

    assert with_reference(Trainer) is KLTrainer is of_trl(Trainer) and of_trl(SFTTrainer) is KLSFTTrainer
    made = with_reference(Mine)
    assert made.__name__ == "KLMine" and issubclass(made, (KLTrainer, Mine)) and with_reference(made) is made
    assert issubclass(of_trl(Mine), KLTrainer)
    with pytest.raises(ValueError, match=r"SFTTrainer is one of TRL's trainers: use refkl\.trl\.with_reference"):
        with_reference(SFTTrainer)
    with pytest.raises(ValueError, match=r"takes transformers\.Trainer or a subclass"):
        with_reference(int)
