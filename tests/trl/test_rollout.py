"""The reference's scores of a rollout belong to the policy's on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import dynamic_rope, longrope
from support.trl_runs import grpo, logged, rloo

from refkl import KLConfig, ReferenceConfig
from refkl.trl import KLGRPOTrainer, KLRLOOTrainer


@pytest.mark.parametrize("max_tokens", [pytest.param(None, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("model", [longrope, dynamic_rope])
@pytest.mark.parametrize("make, cls", [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer)])
def test_rows_that_depend_on_their_batch_are_scored_with_it(
    make: Any, cls: type, model: Callable[..., Any], max_tokens: int | None, tmp_path: Path
) -> None:
    """A rollout is trained in other batches than it is sampled in. While nothing has trained, the KL is 0 in each."""
    # Rows of 11 and of 12 tokens: only the latter are long.
    options = {"gradient_accumulation_steps": 4, "max_steps": 1, "per_device_train_batch_size": 2}
    kl = KLConfig(coef=0.1)
    reference = ReferenceConfig(strategy="clone", max_tokens=max_tokens)
    trainer = make(cls, model(11), tmp_path, options, kl=kl, reference=reference)
    trainer.train()
    assert logged(trainer, "kl/max") == [pytest.approx(0.0, abs=1e-6)]
