"""With the settings that are TRL's own, TRL's losses and gradients, step by step, from refkl's scorer.

Each step starts from the weights that TRL's trainer had there, on the same completions: what is compared is one step's
rounding, not its growth along a run. The policy is in fp64, so that what is left of rounding is the fp32 that TRL sums
and scores its reference in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from support.trl_runs import Steps, dpo, grpo, kto, logged, rloo, saved, train
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from refkl import KLConfig
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer


@pytest.fixture
def scored_by_trl(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever TRL's own scorer computes log-probabilities."""
    calls: list[int] = []
    original = trl.trainer.utils._ChunkedLogProbFunction.forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "forward", staticmethod(counted))
    return calls


def same(theirs: tuple[Any, Steps], ours: tuple[Any, Steps], *keys: str, rounding: float = 1e-6) -> None:
    assert logged(ours[0], "loss") == pytest.approx(logged(theirs[0], "loss"), abs=rounding, rel=1e-6)
    for key in keys:  # KTO's "kl" is a difference of sums of 40 nats
        assert logged(ours[0], key) == pytest.approx(logged(theirs[0], key), abs=1e-6, rel=5e-6), key
    assert len(theirs[1].gradients) == len(ours[1].gradients) == 3
    for found, right in zip(ours[1].gradients, theirs[1].gradients, strict=True):
        largest = float(right.abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(found, right, rtol=0, atol=rounding * max(1.0, largest))


GRPO = {
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "bnpo": {"aggregation": "token-mean"},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm", "length": 8},
    "dapo": {"aggregation": "token-mean"},
    "cispo": {"aggregation": "token-mean"},
    "vespo": {"aggregation": "token-mean"},
    "luspo": {"aggregation": "seq-mean-token-sum"},
    "sapo": {"aggregation": "seq-mean-token-mean"},
}


@pytest.mark.parametrize("loss_type", GRPO)
def test_grpo(loss_type: str, tmp_path: Path, scored_by_trl: list[int]) -> None:
    folder = saved(tmp_path)
    # TRL's bnpo is a mean over each micro-batch's own tokens: only then the step's too where the step is one.
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 1 if loss_type == "bnpo" else 2}
    options |= {"per_device_train_batch_size": 4, "importance_sampling_level": "token"}
    theirs = train(grpo, GRPOTrainer, folder, tmp_path, {**options, "beta": 0.3})
    assert scored_by_trl
    scored_by_trl.clear()
    kl = KLConfig(coef=0.3, estimator="k3", gradient="autograd", **GRPO[loss_type])
    ours = train(grpo, KLGRPOTrainer, folder, tmp_path, options, theirs, kl=kl)
    assert not scored_by_trl
    assert logged(ours[0], "kl")[2] > 1e-4
    same(theirs, ours, "kl", "entropy", "reward")


def test_grpo_over_several_iterations_with_the_ratio_of_each_sequence(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    options = {"num_iterations": 2, "importance_sampling_level": "sequence", "use_bias_correction_kl": False}
    theirs = train(grpo, GRPOTrainer, folder, tmp_path, {**options, "beta": 0.3, "loss_type": "grpo"})
    kl = KLConfig(coef=0.3, gradient="autograd", aggregation="seq-mean-token-mean")
    ours = train(grpo, KLGRPOTrainer, folder, tmp_path, {**options, "loss_type": "grpo"}, theirs, kl=kl)
    same(theirs, ours, "kl")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("iterations", [1, 2])
def test_rloo(iterations: int, normalize: bool, tmp_path: Path, scored_by_trl: list[int]) -> None:
    """beta alone: k1 summed over each completion and taken off its reward."""
    folder = saved(tmp_path)
    options = {"beta": 0.1, "num_iterations": iterations, "normalize_advantages": normalize}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    theirs = train(rloo, RLOOTrainer, folder, tmp_path, options)
    scored_by_trl.clear()
    ours = train(rloo, KLRLOOTrainer, folder, tmp_path, options, theirs)
    assert not scored_by_trl and ours[0].penalty.settled.estimator == "k1"
    kl = logged(ours[0], "kl")
    assert abs(kl[-1]) > 1e-4
    # TRL logs it when it samples; here it is of each step.
    assert kl[::iterations] == pytest.approx(logged(theirs[0], "kl"), abs=1e-6)
    # Off-policy the ratio is of two sequences, which TRL sums in fp32: 8 tokens' 40 nats are rounded by up to 4e-6.
    same(theirs, ours, "reward", "entropy", rounding=1e-6 if iterations == 1 else 1e-5)


DPO = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


@pytest.mark.parametrize("loss_type", DPO)
def test_dpo(loss_type: str, tmp_path: Path, scored_by_trl: list[int]) -> None:
    folder = saved(tmp_path)
    options: dict[str, Any] = {"loss_type": [loss_type], "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2}
    if loss_type == "exo_pair":
        options["label_smoothing"] = 1e-3
    theirs = train(dpo, DPOTrainer, folder, tmp_path, options)
    scored_by_trl.clear()
    ours = train(dpo, KLDPOTrainer, folder, tmp_path, options, theirs)
    assert not scored_by_trl
    same(theirs, ours, "rewards/margins", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str, tmp_path: Path, scored_by_trl: list[int]) -> None:
    folder = saved(tmp_path)
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    theirs = train(kto, KTOTrainer, folder, tmp_path, options)
    scored_by_trl.clear()
    ours = train(kto, KLKTOTrainer, folder, tmp_path, options, theirs)
    assert not scored_by_trl
    assert logged(ours[0], "kl/token")[0] == 0.0 and logged(ours[0], "kl/token")[2] != 0.0
    same(theirs, ours, "kl", "entropy", "rewards/chosen", "logits/chosen")
