"""OpenRLHF's names for what refkl computes."""

from __future__ import annotations

import math

from torch import Tensor

import refkl

# OpenRLHF caps the importance weight at 10; refkl does not.
KL_IS_WEIGHT_CLIP = math.inf


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    return refkl.kl.estimate(
        log_probs,
        log_probs_base,
        kl_estimator,
        gradient="reverse_kl" if unbiased_gradient else "autograd",
        old_logp=log_probs_old if unbiased_gradient else None,
    )
