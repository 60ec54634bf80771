"""The KL penalty: joins an estimator, an aggregation or a form of reward, and a controller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refkl.config import KLConfig
from refkl.kl import Histogram, aggregate, aggregation_count, estimate, place_rewards
from refkl.kl.estimators import masked_log_ratio
from refkl.kl.statistics import (
    MEASURED,
    counted,
    exact_statistics,
    histogram_of,
    merged,
    metrics_of,
    statistics,
    with_nan,
)
from refkl.origins import ScoreOrigins, check_sides
from refkl.types import KLOutput, TokenScores, require_shape

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refkl.reference import Reference


class KLPenalty:
    """coef · KL(policy ‖ reference), for the loss or for the reward.

    Call it once per micro-batch and `step` once per optimizer step.

    In the loss, coef · aggregate(KL) with the gradient of the KL per token, which leaves out what a token does to those
    after it. In the reward, -coef · KL of each token, for a trainer that multiplies it with ∇logp of the tokens: with
    k1, return-to-go and gamma 1 that is the whole gradient of the sequence's KL, in expectation over sequences that the
    policy sampled. k2, k3 and abs are biased there: k3's gradient is that of KL(p ‖ q) - KL(q ‖ p).

    Several references q_i with weights w_i are one, their geometric mixture log q = Σ w_i log q_i per token. It is not
    normalised, and need not be: KL(p ‖ q / Z) = Σ w_i KL(p ‖ q_i) + log Z with Z = Σ_x Π q_i^w_i <= 1, which the policy
    does not change, so the gradient of this penalty is that of the KL to the normalised mixture: in the loss of each
    token's mixture, in the reward of the mixture of whole sequences. Values differ by that constant: k1 and exact
    divergences report Σ w_i KL(p ‖ q_i), and k3 reports Z - 1 more, which is nearer to the KL to the mixture.

    Scores of a reference carry its fingerprint, and a penalty refuses what they show to be wrong: the policy's scores
    as the reference's, swapped arguments, two references within one optimizer step, and scores from before an update
    of the reference.

    Args:
        config: the penalty; None for KLConfig().
        reference: the reference that the scores are of, or the list of them. Stale scores are then refused from the
            update on; without it, once scores of the updated reference were seen in a step.
    """

    def __init__(
        self, config: KLConfig | None = None, reference: Reference | Sequence[Reference] | None = None
    ) -> None:
        self.config = config or KLConfig()
        self.settled = self.config.settled()
        """The estimator and the form of reward, also where the config leaves them open."""
        self.controller = self.config.make_controller()
        self.histogram: Histogram | None = None
        """The log-ratios of all tokens of the last step, over micro-batches and ranks; None if nothing was scored."""
        given = () if reference is None else reference if isinstance(reference, Sequence) else (reference,)
        self._origins = ScoreOrigins(given)
        self._window: list[Tensor] = []
        self._steps = 0
        self._exact_given = False

    @property
    def coef(self) -> float:
        """The present coefficient."""
        return self.controller.coef

    @property
    def exact_due(self) -> bool:
        """True if `config.exact_every` asks for an exact measurement in the current step, and none was made yet."""
        every = self.config.exact_every
        return every is not None and (self._steps + 1) % every == 0 and not self._exact_given

    def add_exact(self, divergence: Tensor | Sequence[Tensor], mask: Tensor) -> None:
        """Measure "kl/exact" of the step in hand on these tokens, beside the estimate; penalises nothing.

        Args:
            divergence: [B, T], nats: from score_pair(..., divergence="reverse_kl"); one for each reference, if there
                are several.
            mask: [B, T], True = counts.

        Raises:
            ValueError: shapes that differ; weights that are not one per reference.
        """
        divergences = [divergence] if isinstance(divergence, Tensor) else list(divergence)
        for one in divergences:
            require_shape("divergence", one, mask.shape, "mask")
        self._window.append(exact_statistics(self._mixture(divergences, "divergence"), mask))
        self._exact_given = True

    def __call__(
        self,
        policy_scores: TokenScores,
        ref_scores: TokenScores | Sequence[TokenScores],
        mask: Tensor,
        *,
        old_logp: Tensor | None = None,
        divergence: Tensor | Sequence[Tensor] | None = None,
        normalizer: float | Tensor | None = None,
        count: bool | None = None,
    ) -> KLOutput:
        """Return the penalty of one micro-batch.

        Args:
            policy_scores: in the loss, of the policy that is trained, with grad. In the reward, of the policy that
                sampled, with grad or without: a reward is of what was done, and never differentiated.
            ref_scores: no grad ever flows to these. A list for several references, weighed by
                `config.reference_weights`.
            mask: [B, T], True = counts; usually `batch.completion_mask`.
            old_logp: [B, T], nats, in the loss: the log-probabilities under the policy that sampled, if it was another.
            divergence: [B, T], nats, with grad, in the loss: exact divergence to use instead of the estimator; one for
                each reference, if there are several. Estimator "exact" takes nothing else.
            normalizer: in the loss: what the aggregation divides by, where the batch is a part of a greater one (see
                `global_normalizer`).
            count: whether the next `step` counts this call. By default what carries grad is counted in the loss, so
                that an evaluation is not, and every call in the reward. What is not counted may be of another
                reference, unless the penalty was given its own.

        Returns:
            `loss`, a scalar with grad to the policy, or `reward`, [B, T], detached, to be *added* to the rewards: it is
            -coef · KL, credited as `settled.reward` says. `per_token` is the KL in nats, and `metrics` are as from
            `step`, over this call alone.

        Raises:
            ValueError: shapes or temperatures that differ, weights that are not one per reference, a divergence that is
                missing or carries no grad, or an argument that has no use where the penalty goes; scores of the same
                model on both sides, swapped, of another reference than earlier in this step, or stale.
        """
        mask = mask.bool()
        references = [ref_scores] if isinstance(ref_scores, TokenScores) else list(ref_scores)
        for reference in references:
            _check_comparable(policy_scores, reference, mask)
        in_loss = self.config.placement == "loss"
        check_sides(policy_scores, references, in_loss=in_loss, measured_only=count is False)
        if count is None:
            count = policy_scores.logp.requires_grad or not in_loss
        self._origins.check(references, counted=count)
        ref_logp = self._mixture([reference.logp.detach() for reference in references], "reference")
        logp = policy_scores.logp
        if divergence is None:
            per_token = self._estimate(logp, ref_logp, mask, old_logp)
        elif old_logp is not None:
            raise ValueError("old_logp corrects an estimate from samples; an exact divergence takes none.")
        else:
            divergences = [divergence] if isinstance(divergence, Tensor) else list(divergence)
            per_token = self._exact(divergences, logp, mask, len(references))
        loss = reward = None
        if in_loss:
            loss = self._loss(per_token, mask, normalizer)
        elif normalizer is not None:
            raise ValueError("normalizer has no use with placement 'reward': rewards per token are not aggregated.")
        else:
            reward = self._reward(per_token, mask)

        clamp = self.config.max_log_ratio if divergence is None else None
        stats = statistics(
            per_token.detach(),
            masked_log_ratio(logp.detach(), ref_logp, mask),
            mask,
            estimates=self._measured(per_token.detach(), logp, ref_logp, mask, old_logp, divergence is not None),
            exact=divergence is not None,
            max_log_ratio=clamp,
        )
        if count:
            self._origins.note(references)
            self._window.append(stats)
            self._exact_given |= divergence is not None
        return KLOutput(loss, reward, per_token, metrics_of(stats, self.coef, self.controller.target))

    def step(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Close an optimizer step: the KL since the last one, over all ranks, updates the coefficient.

        The controller gets the mean over all tokens or all sequences of the step, whichever its unit is. Where nothing
        was scored a schedule still counts the step.

        Args:
            accelerator: reduces over its processes; every rank must call. None for a single process.

        Returns:
            Metrics over the step, none but "kl/exact" if nothing was scored (docs/metrics.md): "kl" nats per token,
            "kl/sequence" nats per sequence; "kl/k1", "kl/k2" and "kl/k3", nats per token, of the same log-ratios, not
            clamped; "kl/exact", nats per token, where a divergence or `add_exact` gave it; "kl/max" the largest
            |log-ratio| of a token and "kl/p99" their 99th percentile; "kl/log_ratio/p01", "/p50" and "/p99", of signed
            log-ratios; "kl/saturated" the share of tokens whose exp is capped, "kl/clipped" the share whose log-ratio
            `max_log_ratio` clamps; "kl/coef" the coefficient that applied, "kl/target" what its controller steers to,
            if it has one. `histogram` has all log-ratios.

        Raises:
            ValueError: from a controller that follows the KL: it is not finite, or the step too large for its horizon;
                `config.exact_every` asks for an exact KL in this step, and none was given.
        """
        if self.exact_due and self._window:
            raise ValueError(
                f"kl.exact_every {self.config.exact_every} asks for the exact KL of a micro-batch of this step, and "
                "none was given. Where penalty.exact_due, call penalty.add_exact with score_pair(..., "
                "divergence='reverse_kl').divergence, as refkl's trainers do; or leave kl.exact_every out."
            )
        stats = merged(self._window)
        self._window, self._exact_given = [], False
        self._origins.close_step()
        self._steps += 1
        if accelerator is not None and accelerator.num_processes > 1:
            on_device = stats.to(accelerator.device)  # fp64: in fp32 counts end at 2^24
            sums = accelerator.reduce(on_device[:-1], reduction="sum")
            peak = accelerator.reduce(on_device[-1:], reduction="max")
            stats = with_nan(torch.cat([sums, peak]).to(stats))
        metrics = metrics_of(stats, self.coef, self.controller.target)
        tokens, sequences = counted(stats)
        self.histogram = histogram_of(stats) if tokens else None
        if self.controller.unit == "sequence":
            self.controller.update(metrics["kl/sequence"], sequences)
        else:
            self.controller.update(metrics["kl"], tokens)
        if not tokens:  # as between two rollouts, where the KL is in the reward
            return {name: metrics[name] for name in ("kl/exact",) if name in metrics}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold between two optimizer steps: plain numbers and strings, exact in JSON."""
        counted = {} if self.config.exact_every is None else {"steps": self._steps}
        return {"controller": self.controller.state_dict(), **counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: it is no state of a KLPenalty, or of one with another controller.
        """
        if "controller" not in state:
            raise ValueError(f"This is no state of a KLPenalty: it holds {sorted(state)} and no 'controller'.")
        self.controller.load_state_dict(state["controller"])
        self._origins.forget()
        self._steps = int(state.get("steps", 0))  # of a run without kl.exact_every there are none

    def _measured(
        self, per_token: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, old_logp: Tensor | None, exact: bool
    ) -> list[Tensor]:
        """[B, T] each: the values of MEASURED, weighed as the penalty's own and not clamped."""
        config = self.config
        own = None if exact or config.max_log_ratio is not None else self.settled.estimator
        options: dict[str, Any] = {"gradient": "none", "mask": mask}
        if old_logp is not None:
            options |= {"old_logp": old_logp, "ratio": config.ratio}
        return [per_token if name == own else estimate(logp, ref_logp, name, **options) for name in MEASURED]

    def _estimate(self, logp: Tensor, ref_logp: Tensor, mask: Tensor, old_logp: Tensor | None) -> Tensor:
        """[B, T], nats: the KL from samples."""
        config = self.config
        in_reward = config.placement == "reward"
        if self.settled.estimator == "exact":
            raise ValueError(
                "kl.estimator 'exact' takes the divergence over the vocabulary, and none was passed. Pass divergence=, "
                "from score_pair(…, divergence='reverse_kl'), or use another estimator."
            )
        if in_reward and old_logp is not None:
            raise ValueError(
                "old_logp has no use with placement 'reward': the trainer's own ratio weighs a reward. Leave it out, "
                "and pass the scores of the policy that sampled as policy_scores."
            )
        return estimate(
            logp,
            ref_logp,
            self.settled.estimator,
            gradient="none" if in_reward else config.gradient,
            old_logp=old_logp,
            mask=mask,
            ratio=config.ratio,
            max_log_ratio=config.max_log_ratio,
        )

    def _exact(self, divergences: list[Tensor], logp: Tensor, mask: Tensor, references: int) -> Tensor:
        """[B, T], nats: the KL that the caller computed."""
        if self.config.placement == "reward":
            raise ValueError(
                "An exact divergence does not go into the reward: it is the same whichever token is sampled, and "
                "teaches that token nothing. Pass none, or use placement 'loss'."
            )
        if len(divergences) != references:
            raise ValueError(f"Pass one divergence per reference: got {len(divergences)} for {references} references.")
        for one in divergences:
            require_shape("divergence", one, mask.shape, "mask")
        exact = self._mixture(divergences, "divergence")
        if self.coef and logp.requires_grad and not exact.requires_grad:
            raise ValueError(
                "divergence carries no grad, so this penalty would train nothing. Take it from score_pair."
            )
        return exact.masked_fill(~mask, 0.0)

    def _mixture(self, parts: list[Tensor], what: str) -> Tensor:
        """Σ w_i part_i; a part of weight 0 is left out, so that its inf or NaN is too."""
        weights = self.config.reference_weights
        if not parts:
            raise ValueError(f"KLPenalty was passed an empty list for its {what}s; it needs one at least.")
        if weights is None:
            weights = [1.0 / len(parts)] * len(parts)
        if len(weights) != len(parts):
            raise ValueError(
                f"kl.reference_weights {weights} are for {len(weights)} references, and {len(parts)} were passed. Give "
                "one weight per reference, or none."
            )
        if len(parts) == 1:
            return parts[0]
        return torch.stack([w * part for w, part in zip(weights, parts, strict=True) if w > 0]).sum(0)

    def _loss(self, per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None) -> Tensor:
        # With coef 0 an infinite divergence must not make the loss NaN: only the graph is kept.
        penalised = mask if self.coef else torch.zeros_like(mask)
        mode, length = self.config.aggregation, self.config.length
        return self.coef * aggregate(per_token, penalised, mode, normalizer=normalizer, length=length)

    def _reward(self, per_token: Tensor, mask: Tensor) -> Tensor:
        assert self.settled.reward is not None, "settled by the placement"
        return place_rewards(-self.coef * per_token, mask, self.settled.reward, gamma=self.settled.gamma)


def global_normalizer(
    mask: Tensor | Iterable[Tensor], mode: str = "token-mean", accelerator: Accelerator | None = None
) -> Tensor:
    """Return the divisor of each micro-batch's aggregation, so that micro-batches and ranks add up to the whole batch.

    Args:
        mask: [B, T], True = counts: this rank's mask; or one mask per micro-batch of the optimizer step, as many as it
            has: the last window of an epoch may have fewer.
        mode: as in `kl.aggregate`.
        accelerator: counts over its processes (every rank must call), and undoes their averaging of gradients.

    Returns:
        Scalar fp32: the count over all micro-batches and ranks, divided by the number of ranks (gradients are averaged
        over ranks). For "token-sum" the count is 1, however many there are. Sum the losses of the micro-batches: a loop
        whose backward divides by the number of accumulation steps must divide this by that number too, which for
        `accelerator.backward` is `accelerator.gradient_accumulation_steps`, in a short last window as well.
    """
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    if not masks:
        raise ValueError("global_normalizer got no mask: pass this rank's mask, or one per micro-batch.")
    count = torch.stack([aggregation_count(m, mode) for m in masks]).sum().to(torch.float32)
    if mode == "token-sum":
        count = torch.ones_like(count)
    if accelerator is None or accelerator.num_processes == 1:
        return count.clamp(min=1.0)
    if mode != "token-sum":
        count = accelerator.reduce(count, reduction="sum")
    return count.clamp(min=1.0) / accelerator.num_processes


def _check_comparable(policy_scores: TokenScores, ref_scores: TokenScores, mask: Tensor) -> None:
    """Raise ValueError for scores whose difference would not be a log-ratio of policy and reference."""
    require_shape("mask", mask, policy_scores.logp.shape, "policy_scores.logp")
    require_shape("ref_logp", ref_scores.logp, policy_scores.logp.shape, "logp")
    if policy_scores.temperature != ref_scores.temperature:
        raise ValueError(
            f"The policy was scored at temperature {policy_scores.temperature} and the reference at "
            f"{ref_scores.temperature}: their KL would compare two different distributions. Score both alike."
        )
