"""OpenRLHF's names for refkl's aggregation."""

from __future__ import annotations

from torch import Tensor

import refkl


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: Tensor | None = None,
    global_batch_size: Tensor | None = None,
) -> Tensor:
    mode = "token-mean" if token_level_loss else "seq-mean-token-mean"
    count = batch_num_tokens if token_level_loss else global_batch_size
    normalizer = None if count is None else count / dp_size
    return refkl.kl.aggregate(loss, loss_mask, mode, normalizer=normalizer)


class PolicyLoss:
    """The plain surrogate, -ratio · advantage, and the KL that OpenRLHF reports with it.

    refkl has no policy loss. What the tests ask of it is how it is aggregated and how the KL is measured, which are
    refkl's; their ratios are inside the clip range, so there is no clipping here.
    """

    def __init__(self, clip_eps_low: float = 0.2, clip_eps_high: float = 0.2, token_level_loss: bool = True) -> None:
        self.token_level_loss = token_level_loss

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor, **counts: object
    ) -> tuple[Tensor, None, Tensor, None, None]:
        surrogate = -(log_probs - old_log_probs).exp() * advantages
        loss = aggregate_loss(surrogate, action_mask, self.token_level_loss, **counts)  # type: ignore[arg-type]
        # KL(old ‖ present): the tokens are the old policy's.
        drift = refkl.kl.estimate(old_log_probs, log_probs, "k1", gradient="none", mask=action_mask)
        return loss, None, refkl.kl.aggregate(drift, action_mask), None, None
