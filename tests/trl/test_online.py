"""GRPO and RLOO with refkl's penalty, against plain computations on the same micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import byte_tokenizer, llama
from support.trl_runs import COMMON, PROMPTS, grpo, logged, rloo
from torch import Tensor
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from refkl import KLConfig, ReferenceConfig, SyncConfig
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLRLOOTrainer, with_reference

COEF = 0.3
SMALL = {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2}
SMALL |= {"num_iterations": 2, "gradient_accumulation_steps": 2}


def other(tmp_path: Path) -> str:
    """A model folder that is not the policy's."""
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path / "reference")
    torch.manual_seed(0)
    return str(tmp_path / "reference")


def distributions(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, C, V] log-probabilities at the completions' places, from the logits in full."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].log_softmax(-1)


def taken(logs: Tensor, inputs: dict[str, Any]) -> Tensor:
    return logs.gather(-1, inputs["completion_ids"][..., None])[..., 0]


def close(loss: Tensor, expected: Tensor, model: Any) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=2e-6)
    parameters = list(model.parameters())
    right = torch.autograd.grad(expected, parameters)
    for found, wanted in zip(torch.autograd.grad(loss, parameters, retain_graph=True), right, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def policy_loss(trainer: Any, logp: Tensor, inputs: dict[str, Any], advantages: Tensor) -> Tensor:
    """TRL's loss of the policy alone."""
    mask = inputs["completion_mask"]
    if isinstance(trainer, KLRLOOTrainer):
        ratio = ((logp * mask).sum(1) - inputs["old_logps"]).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    ratio = (logp - inputs.get("old_per_token_logps", logp).detach()).exp()
    gain = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(gain * mask).sum() / trainer._normalizer(inputs)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make, cls", [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer)])
def test_exact_kl_in_the_loss(make: Any, cls: type, offload: bool, tmp_path: Path) -> None:
    """Over the whole vocabulary, with its gradient; a reference that streams is swept once a rollout, not a step."""
    source = other(tmp_path)
    kl = KLConfig(coef=COEF, estimator="exact", aggregation="token-mean")
    reference = ReferenceConfig(strategy="clone", source=source, offload=offload)
    trainer = make(cls, llama(), tmp_path, SMALL, kl=kl, reference=reference)
    plain = LlamaForCausalLM.from_pretrained(source)
    compute, score = trainer._compute_loss, trainer.reference.score
    sweeps, losses = [], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        sweeps.append(1)
        return score(*args, **kwargs)

    def checked(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(model, inputs)
        logs = distributions(model, inputs)
        with torch.no_grad():
            ref = distributions(plain, inputs)
        mask = inputs["completion_mask"]
        exact = ((logs.exp() * (logs - ref)).sum(-1) * mask).sum() / trainer._normalizer(inputs)
        own = policy_loss(trainer, taken(logs, inputs), inputs, inputs["advantages"])
        close(loss, own + COEF * exact, model)
        losses.append(1)
        return loss

    trainer._compute_loss, trainer.reference.score = checked, counted
    trainer.train()
    assert len(losses) == 4
    assert len(sweeps) == (1 if offload else 4)
    assert logged(trainer, "kl")[0] > 0.1


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "token-sum"])
def test_rloo_with_the_kl_in_the_loss(aggregation: str, tmp_path: Path) -> None:
    source = other(tmp_path)
    kl = KLConfig(coef=COEF, estimator="k2", gradient="autograd", aggregation=aggregation)
    trainer = rloo(
        KLRLOOTrainer, llama(), tmp_path, {**SMALL, "beta": 0.0}, kl=kl, reference=ReferenceConfig(source=source)
    )
    compute = trainer._compute_loss
    seen: list[float] = []

    def checked(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(model, inputs)
        mask = inputs["completion_mask"]
        logp = taken(distributions(model, inputs), inputs)
        k2 = ((logp - inputs["ref_per_token_logps"]) ** 2 / 2 * mask).sum()
        # The Trainer halves each of the two micro-batches' losses.
        whole = {
            "token-mean": inputs["num_items_in_batch"] / 2,
            "seq-mean-token-sum": len(mask),
            "token-sum": 1 / 2,
        }[aggregation]
        seen.append(float(inputs["num_items_in_batch"]))
        close(loss, policy_loss(trainer, logp, inputs, inputs["advantages"]) + COEF * k2 / whole, model)
        return loss

    trainer._compute_loss = checked
    trainer.train()
    assert len(seen) == 4 and seen[0] == logged(trainer, "num_tokens")[0] - prompts_of(trainer)


def prompts_of(trainer: Any) -> int:
    """How many prompt tokens the first rollout had."""
    part = trainer._buffered_inputs
    return int(sum(p["prompt_mask"].sum() for p in part))


@pytest.mark.parametrize("reward", ["return_to_go", "token"])
def test_rloo_with_the_kl_as_an_advantage_of_each_token(reward: str, tmp_path: Path) -> None:
    """Classic RLHF's reward of a token, beside RLOO's of the completion; over two iterations of the same rollouts."""
    kl = KLConfig(coef=COEF, placement="reward", reward=reward, gamma=0.9 if reward == "return_to_go" else None)
    reference = ReferenceConfig(source=other(tmp_path))
    trainer = rloo(KLRLOOTrainer, llama(), tmp_path, {**SMALL, "beta": 0.0}, kl=kl, reference=reference)
    compute = trainer._compute_loss
    ratios = []

    def checked(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(model, inputs)
        mask = inputs["completion_mask"]
        logp = taken(distributions(model, inputs), inputs)
        d = ((inputs["old_per_token_logps"] - inputs["ref_per_token_logps"]) * mask).tolist()
        credit = torch.zeros_like(logp)
        for b, row in enumerate(d):
            for t in range(len(row)):
                later = [row[t]] if reward == "token" else [0.9**k * x for k, x in enumerate(row[t:])]
                credit[b, t] = -COEF * sum(later)
        ratio = (logp - inputs["old_per_token_logps"]).exp()
        gain = (torch.min(ratio * credit, ratio.clamp(0.8, 1.2) * credit) * mask).sum(-1).mean()
        close(loss, policy_loss(trainer, logp, inputs, inputs["advantages"]) - gain, model)
        ratios.append(float(((ratio - 1).abs() * mask).max()))
        return loss

    trainer._compute_loss = checked
    trainer.train()
    assert len(ratios) == 4 and max(ratios[:2]) < 1e-5 and max(ratios[2:]) > 1e-2


@pytest.mark.filterwarnings("ignore:kl.estimator 'k3' in the reward is biased")
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_rloo_takes_the_kl_of_a_completion_off_its_reward(estimator: str, tmp_path: Path) -> None:
    """Before the leave-one-out baseline, at the coefficient that the controller has come to."""
    kl = KLConfig(
        coef=COEF,
        estimator=estimator,
        placement="reward",
        reward="sequence",
        controller="linear",
        end_coef=0.9,
        steps=2,
    )
    reference = ReferenceConfig(source=other(tmp_path))
    options = {**SMALL, "num_iterations": 1, "beta": 0.0}
    trainer = rloo(KLRLOOTrainer, llama(), tmp_path, options, kl=kl, reference=reference)
    generate, calculate = trainer._generate_and_score_completions, trainer._calculate_rewards
    rewards: list[Tensor] = []
    found, kls = [], []

    def rewarded(*args: Any) -> Tensor:
        rewards.append(calculate(*args))
        return rewards[-1]

    def checked(inputs: Any) -> dict[str, Any]:
        output = generate(inputs)
        d = output["old_per_token_logps"] - output["ref_per_token_logps"]
        per_token = (d if estimator == "k1" else torch.exp(-d) - 1 + d) * output["completion_mask"]
        scores = (rewards[-1][:, 0] - (COEF, 0.6)[len(found)] * per_token.sum(1)).view(-1, 4)
        expected = scores - (scores.sum(1, keepdim=True) - scores) / 3
        torch.testing.assert_close(output["advantages"], expected.flatten(), rtol=1e-5, atol=1e-6)
        found.append(output["advantages"])
        kls.append(float(per_token.sum() / output["completion_mask"].sum()))
        return output

    trainer._generate_and_score_completions, trainer._calculate_rewards = checked, rewarded
    trainer.train()
    assert len(found) == 2 and trainer.beta == 0.0
    assert logged(trainer, "kl") == pytest.approx(kls, rel=1e-4)
    assert logged(trainer, "kl/coef") == pytest.approx([COEF, 0.6])


class Doubled(GRPOTrainer):
    """A user's own: an argument of its own, a loss of its own, a scorer that sees what it is given."""

    def __init__(self, *args: Any, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor
        self.models: list[Any] = []

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self.factor * super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.models.append(model)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


def test_a_subclass_keeps_what_it_overrides(tmp_path: Path) -> None:
    """refkl's penalty goes onto the subclass's loss, unscaled; its scorer is called for policy and reference."""
    KLDoubled = with_reference(Doubled)
    assert KLDoubled.__name__ == "KLDoubled" and issubclass(KLDoubled, Doubled) and issubclass(KLDoubled, KLGRPOTrainer)
    source = other(tmp_path)
    losses = {}
    for cls, factor in ((KLGRPOTrainer, 1.0), (KLDoubled, 3.0)):
        own = {"factor": factor} if cls is KLDoubled else {}
        torch.manual_seed(0)
        kl = KLConfig(coef=COEF)
        trainer = grpo(cls, llama(), tmp_path, {"max_steps": 1}, kl=kl, reference=ReferenceConfig(source=source), **own)
        parts: list[tuple[float, float]] = []
        of_kl = trainer._of_kl

        def kept(*args: Any, of_kl: Any = of_kl, parts: Any = parts) -> Any:
            parts.append(float(of_kl(*args)))
            return of_kl(*args)

        trainer._of_kl = kept
        trainer.train()
        losses[cls] = (logged(trainer, "loss")[0], parts[0])
    alone = losses[KLGRPOTrainer][0] - losses[KLGRPOTrainer][1]
    assert losses[KLDoubled][0] == pytest.approx(3 * alone + losses[KLDoubled][1], abs=2e-6)
    assert losses[KLDoubled][1] == losses[KLGRPOTrainer][1] > 0.01
    assert [type(model).__name__ for model in trainer.models] == ["ScoredModel", "ScoredModel"]


def test_with_reference_finds_the_arguments_however_they_are_passed(tmp_path: Path) -> None:
    config = GRPOConfig(str(tmp_path), **{**COMMON, "beta": 0.4, "num_generations": 4})
    KLDoubled = with_reference(Doubled)
    trainer = KLDoubled(llama(), lambda **columns: [0.0], config, PROMPTS, processing_class=byte_tokenizer())
    assert trainer.penalty.coef == 0.4 and trainer.beta == 0.0 and trainer.factor == 2.0


def test_with_reference_is_for_trls_four(tmp_path: Path) -> None:
    assert with_reference(GRPOTrainer) is KLGRPOTrainer
    assert with_reference(KLDPOTrainer) is KLDPOTrainer
    with pytest.raises(
        ValueError, match=r"GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer of trl .* dict is not one"
    ):
        with_reference(dict)
    with pytest.raises(ValueError, match="takes a trainer's class"):
        with_reference(7)  # type: ignore[type-var]


def test_a_subclass_that_makes_its_configuration_itself(tmp_path: Path) -> None:
    """TRL's default beta is taken over, whoever sets it, and TRL loads no reference for it."""

    class Settled(RLOOTrainer):
        def __init__(self, policy: Any, **kwargs: Any) -> None:
            config = RLOOConfig(str(tmp_path), **{**COMMON, "num_generations": 4, "max_steps": 1})
            zero = lambda **columns: [0.0] * 4  # noqa: E731
            super().__init__(policy, zero, config, PROMPTS, processing_class=byte_tokenizer(), **kwargs)

    trainer = with_reference(Settled)(llama())
    assert trainer.penalty.coef == 0.05 and trainer.penalty.settled.reward == "sequence"
    assert trainer.beta == 0.0
    trainer.train()


def test_a_subclass_that_hands_on_by_position(tmp_path: Path) -> None:
    class Passing(GRPOTrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(model, *args, **kwargs)

    config = GRPOConfig(str(tmp_path), **{**COMMON, "beta": 0.4, "num_generations": 4})
    trainer = with_reference(Passing)(llama(), lambda **c: [0.0], config, PROMPTS, processing_class=byte_tokenizer())
    assert trainer.penalty.coef == 0.4


def test_a_loss_that_goes_around_trls_is_refused(tmp_path: Path) -> None:
    class Around(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Tensor:
            return model(inputs["completion_ids"]).logits.mean()

    trainer = grpo(with_reference(Around), llama(), tmp_path, {"max_steps": 1}, kl=KLConfig())
    with pytest.raises(ValueError, match="no KL was measured: its compute_loss does not call _compute_loss"):
        trainer.train()


class Twice(GRPOTrainer):
    """Scores other tokens after its own, as a loss of corrupted prompts does."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        other = self._get_per_token_logps_and_entropies(model, ids // 2, mask, inputs["completion_ids"].shape[1])[0]
        return loss + 0.0 * other.sum()


def test_the_kl_is_of_the_micro_batch_whatever_else_a_loss_scores(tmp_path: Path) -> None:
    runs = []
    for cls in (KLGRPOTrainer, with_reference(Twice)):
        torch.manual_seed(0)
        trainer = grpo(cls, llama(), tmp_path, {"max_steps": 2, "optim": "sgd"}, kl=KLConfig(coef=COEF))
        trainer.train()
        runs.append((logged(trainer, "kl"), logged(trainer, "grad_norm")))
    assert runs[1][0] == pytest.approx(runs[0][0], abs=1e-6) and runs[0][0][0] == 0.0
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4)
    with pytest.raises(ValueError, match=r"Twice has a loss of its own.*Use kl.placement 'loss'"):
        grpo(with_reference(Twice), llama(), tmp_path, kl=KLConfig(placement="reward"))


def test_rollouts_in_another_order_are_refused(tmp_path: Path) -> None:
    class Sorted(RLOOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            order = output["old_logps"].argsort()
            return {name: value[order] for name, value in output.items()}

    trainer = rloo(with_reference(Sorted), llama(), tmp_path, {"max_steps": 1})
    with pytest.raises(ValueError, match="not of the completions that it has scored, or not in their order"):
        trainer.train()


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_reset_hears_of_each_steps_kl(placement: str, tmp_path: Path) -> None:
    """Also where one rollout is used for several steps and its penalty was settled at the first of them."""
    options = {**SMALL, "num_iterations": 4, "gradient_accumulation_steps": 1, "max_steps": 4, "beta": 0.0}
    options |= {"per_device_train_batch_size": 4}
    sync = SyncConfig(every=None, max_kl=1e-9)
    trainer = rloo(KLRLOOTrainer, llama(), tmp_path, options, kl=KLConfig(coef=0.1, placement=placement), sync=sync)
    trainer.train()
    kl = logged(trainer, "kl")
    assert len(kl) == 4 and [u["step"] for u in trainer.sync.updates] == [at + 1 for at, k in enumerate(kl) if k > 1e-9]
    assert any(kl[1:])
