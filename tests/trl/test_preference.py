"""DPO and KTO with refkl's penalty, against plain computations on the same micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.models import byte_tokenizer, llama, shared_batch
from support.trl_runs import COMMON, LABELLED, PAIRS, dpo, kto, logged, saved
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental import bema_for_ref_model

from refkl import KLConfig, ReferenceConfig, SyncConfig
from refkl.scoring import prepare
from refkl.trl import KLDPOTrainer, KLKTOTrainer, with_reference

COEF = 0.4
BOTH = [(dpo, KLDPOTrainer), (kto, KLKTOTrainer)]


def distributions(model: Any, inputs: dict[str, Tensor], prefix: str = "") -> Tensor:
    """[B, T - 1, V] log-probabilities of what follows, from the logits in full."""
    logits = model(input_ids=inputs[f"{prefix}input_ids"], attention_mask=inputs[f"{prefix}attention_mask"]).logits
    return logits[:, :-1].log_softmax(-1)


def total(logs: Tensor, inputs: dict[str, Tensor], prefix: str = "") -> Tensor:
    """[B] log-probabilities of the completions."""
    taken = logs.gather(-1, inputs[f"{prefix}input_ids"][:, 1:, None])[..., 0]
    return (taken * inputs[f"{prefix}completion_mask"][:, 1:]).sum(-1)


def plain_kto(policy: Any, reference: Any, inputs: dict[str, Tensor], beta: float) -> Tensor:
    """Ethayarajh et al., arXiv:2402.01306, equation 7, with the means that TRL takes."""
    margin = total(distributions(policy, inputs), inputs) - total(distributions(reference, inputs), inputs)
    with torch.no_grad():
        pairs = [total(distributions(m, inputs, "KL_"), inputs, "KL_") for m in (policy, reference)]
        z0 = (pairs[0] - pairs[1]).mean().clamp(min=0)
    signed = torch.where(inputs["label"].bool(), margin - z0, z0 - margin)
    return (1 - torch.sigmoid(beta * signed)).mean()


def plain_dpo(policy: Any, reference: Any, inputs: dict[str, Tensor], beta: float) -> Tensor:
    margin = total(distributions(policy, inputs), inputs) - total(distributions(reference, inputs), inputs)
    chosen, rejected = margin.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make, cls", BOTH)
def test_exact_kl_in_the_loss(make: Any, cls: type, offload: bool, tmp_path: Path) -> None:
    """TRL's loss and coef · KL(policy ‖ reference) over the vocabulary, a mean over the step's tokens."""
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path / "reference")
    torch.manual_seed(0)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd"}
    source = ReferenceConfig(strategy="clone", source=str(tmp_path / "reference"), offload=offload)
    kl = KLConfig(coef=COEF, estimator="exact")
    trainer = make(cls, llama(), tmp_path, options, kl=kl, reference=source)
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "reference").eval()
    compute, score = trainer._compute_loss, trainer.reference.score
    sweeps, exacts = [], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        sweeps.append(1)
        return score(*args, **kwargs)

    def checked(model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        tokens = sum(float(mask.sum()) for mask in trainer._window) / 2  # the Trainer halves each loss
        loss = compute(model, inputs, return_outputs)
        with torch.no_grad():
            ref = distributions(reference, inputs)
        logs = distributions(model, inputs)
        per_token = (logs.exp() * (logs - ref)).sum(-1) * inputs["completion_mask"][:, 1:]
        plain = (plain_dpo if make is dpo else plain_kto)(model, reference, inputs, trainer.beta)
        expected = plain + COEF * per_token.sum() / tokens
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        parameters = list(model.parameters())
        right = torch.autograd.grad(expected, parameters)
        for found, wanted in zip(torch.autograd.grad(loss, parameters, retain_graph=True), right, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        exacts.append(float(per_token.sum() / tokens / 2))
        return loss

    trainer._compute_loss, trainer.reference.score = checked, counted
    trainer.train()
    assert len(exacts) == 4
    assert len(sweeps) == (2 if offload else 4 if make is dpo else 8)
    assert logged(trainer, trainer.kl_metric) == pytest.approx([sum(exacts[:2]), sum(exacts[2:])], rel=1e-4)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_kto_with_kl_does_not_depend_on_accumulation(aggregation: str, tmp_path: Path) -> None:
    """Lengths differ between micro-batches: a mean of their means would be another loss."""
    folder, runs = saved(tmp_path), []
    for accumulation in (1, 4):
        policy = LlamaForCausalLM.from_pretrained(folder)
        options = {
            "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation,
            "optim": "sgd", "learning_rate": 0.01, "max_steps": 3, "max_grad_norm": 1e9,
            "loss_type": "apo_zero_unpaired",  # whose own loss has no term of the micro-batch
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        trainer = kto(KLKTOTrainer, policy, tmp_path, options, kl=KLConfig(coef=1.0, aggregation=aggregation))
        trainer.train()
        runs.append((logged(trainer, "loss"), [p.detach() for p in policy.parameters()]))
    assert runs[1][0] == pytest.approx(runs[0][0], abs=2e-5)
    for mine, right in zip(runs[1][1], runs[0][1], strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make, cls", BOTH)
def test_the_cache_answers_for_the_reference(make: Any, cls: type, tmp_path: Path) -> None:
    """The second epoch, and the second run, score nothing; the losses are those without a cache."""
    folder, runs, counts = saved(tmp_path), [], []
    for cache in (None, "scores", "scores"):
        config = ReferenceConfig(strategy="clone", cache=None if cache is None else str(tmp_path / cache))
        options = {"max_steps": 12, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
        trainer = make(cls, LlamaForCausalLM.from_pretrained(folder), tmp_path, options, reference=config)
        ran: list[int] = []
        trainer.reference.model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        prepare(trainer.reference.model.eval(), shared_batch())  # rows are tried once
        ran.clear()
        trainer.train()
        runs.append(logged(trainer, "loss"))
        counts.append(len(ran))
    assert runs[1] == runs[2] == pytest.approx(runs[0], abs=1e-6)
    assert len(set(runs[0])) > 6
    # 24 rows in batches of 4; KTO's mismatched pairs are as many again. A forward more finds the head.
    once = 6 if make is dpo else 12
    assert counts[0] >= 2 * once and counts[1] <= once + 1 and counts[2] == 0


@pytest.mark.parametrize("make, cls", BOTH)
def test_a_reference_that_moves_with_lora(make: Any, cls: type, tmp_path: Path) -> None:
    """TR-DPO, and as much for KTO, with PEFT: TRL refuses both."""
    sync = SyncConfig(every=2, alpha=1.0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    trainer = make(cls, llama(), tmp_path, {"max_steps": 3}, sync=sync, peft_config=lora)
    trainer.train()
    assert len(trainer.sync.updates) == 1
    first, second, third = logged(trainer, "kl/sequence")
    assert first == 0.0 and abs(second) > 1e-4 and third == 0.0


@pytest.mark.parametrize("make, cls", BOTH)
def test_a_data_set_without_a_length(make: Any, cls: type, tmp_path: Path) -> None:
    data: Dataset = PAIRS if make is dpo else LABELLED
    losses = []
    for streamed in (False, True):
        torch.manual_seed(0)
        options = {"max_steps": 3, "train_sampling_strategy": "sequential"}
        own = {"train_dataset": data.to_iterable_dataset()} if streamed else {}
        trainer = make(cls, llama(), tmp_path, options, **own)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


@pytest.mark.parametrize("option", ["precompute_ref_log_probs", "sync_ref_model"])
def test_a_subclass_with_names_of_its_own(option: str, tmp_path: Path) -> None:
    """What TRL is given is looked at where TRL gets it, whatever a class of the user's calls it."""

    class Own(DPOTrainer):
        def __init__(self, policy: Any, config: Any, pairs: Any, **kwargs: Any) -> None:
            super().__init__(policy, args=config, train_dataset=pairs, processing_class=byte_tokenizer(), **kwargs)

    config = DPOConfig(str(tmp_path), **COMMON, **{option: True})
    if option == "precompute_ref_log_probs":
        assert with_reference(Own)(llama(), config, PAIRS).reference.cache is not None
        return
    trainer = with_reference(Own)(llama(), config, PAIRS)
    assert trainer.sync is not None and trainer.sync.sync.config.every == config.ref_model_sync_steps


def test_a_loss_that_asks_the_reference_first(tmp_path: Path) -> None:
    """Its scores go to the batch that they are of, in whatever order."""

    class First(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            half = slice(0, len(labels) // 2)
            tokens = {name: inputs[name][half] for name in ("input_ids", "attention_mask")}
            asked = self.ref_model(**tokens, labels=labels[half], fused_lm_head=True).log_probs
            told = model(**tokens, labels=labels[half], fused_lm_head=True).log_probs
            seen.append(float((asked - told).abs().max()))
            return super()._compute_loss(model, inputs, return_outputs)

    seen: list[float] = []
    losses = []
    for cls in (KLDPOTrainer, with_reference(First)):
        torch.manual_seed(0)
        trainer = dpo(cls, llama(), tmp_path, {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1})
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] and seen[0] == 0.0 and seen[1] > 1e-3


def test_trls_moving_of_its_own_reference_is_refused(tmp_path: Path) -> None:
    callback = bema_for_ref_model.BEMACallback(update_ref_model=True)
    with pytest.raises(ValueError, match=r"BEMACallback.update_ref_model=True. updates TRL's reference"):
        dpo(with_reference(bema_for_ref_model.DPOTrainer), llama(), tmp_path, callbacks=[callback])
