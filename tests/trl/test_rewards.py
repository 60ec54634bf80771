"""Rewards of a script's own functions, which TRL takes as they come: a rollout that nothing scores ends the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import llama
from support.trl_runs import grpo, logged, rloo

from refkl import KLConfig
from refkl.trl import KLGRPOTrainer, KLRLOOTrainer

ONLINE = [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer)]


def trainer_with(reward: Any, make: Any, cls: type, folder: Path, **options: Any) -> Any:
    reward.__name__ = "judge"
    return make(cls, llama(), folder, {"max_steps": 2, **options}, kl=KLConfig(coef=0.1), reward_funcs=reward)


WRONG = {
    "None": (lambda n: [None] * n, "None of the 4 completions of this rollout has a reward: judge returned None"),
    "NaN": (lambda n: [float("nan")] * n, "None of the 4 completions of this rollout has a reward: judge returned"),
    "infinity": (lambda n: [0.0] * (n - 1) + [float("inf")], "judge returned inf for completion 3 of this rollout"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize(("make", "cls"), ONLINE)
def test_a_rollout_that_cannot_train_is_refused(make: Any, cls: type, case: str, tmp_path: Path) -> None:
    values, message = WRONG[case]

    async def later(completions: list[str], **columns: Any) -> list[float | None]:
        return values(len(completions))

    for reward in (lambda completions, **columns: values(len(completions)), later):
        trainer = trainer_with(reward, make, cls, tmp_path)
        before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize(("make", "cls"), ONLINE)
def test_a_completion_without_a_reward_does_not_move_the_policy(make: Any, cls: type, tmp_path: Path) -> None:
    """The others are compared with their own mean: of rewards None, 0, 1 and 2 the advantages are 0, -, 0 and +."""
    found: list[torch.Tensor] = []

    class Kept(cls):  # type: ignore[misc,valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            rollout = super()._generate_and_score_completions(inputs)
            found.append(rollout["advantages"])
            return rollout

    trainer = trainer_with(lambda completions, **columns: [None, 0.0, 1.0, 2.0], make, Kept, tmp_path)
    trainer.train()
    # GRPO divides by the standard deviation, 1; RLOO compares with the mean of the other two.
    right = torch.tensor([0.0, -1.0, 0.0, 1.0] if make is grpo else [0.0, -1.5, 0.0, 1.5])
    assert len(found) == 2
    for advantages in found:
        torch.testing.assert_close(advantages, right, rtol=1e-3, atol=0.0)
    assert logged(trainer, "reward") == [1.0, 1.0]


@pytest.mark.parametrize(("make", "cls"), ONLINE)
def test_an_evaluation_goes_on_without_rewards(
    make: Any, cls: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It trains nothing, and TRL's warning names the completion."""
    trainer = trainer_with(lambda completions, **columns: [None] * len(completions), make, cls, tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.evaluate(trainer.train_dataset.select(range(1)))
    assert trainer.state.global_step == 0
