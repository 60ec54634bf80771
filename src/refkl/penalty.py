"""The KL penalty: combines an estimator, an aggregation or a form of reward, and a controller."""

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

    Call it once per micro-batch, and call `step` once per optimizer step.

    In the loss, the penalty is coef · aggregate(KL) with the gradient of the KL per token, which leaves out the effect
    of a token on later ones. In the reward, it is -coef · KL of each token, for a trainer that multiplies it with ∇logp
    of the tokens. With k1, return-to-go and gamma 1 this is the whole gradient of the sequence's KL, in expectation
    over sequences that the policy sampled. k2, k3 and abs are biased there: the gradient of k3 is that of KL(p ‖ q) -
    KL(q ‖ p).

    Several references q_i with weights w_i count as one, their geometric mixture log q = Σ w_i log q_i per token. It is
    not normalised, and need not be: KL(p ‖ q / Z) = Σ w_i KL(p ‖ q_i) + log Z with Z = Σ_x Π q_i^w_i <= 1, which the
    policy does not change. The gradient of this penalty is therefore that of the KL to the normalised mixture: in the
    loss, of the mixture of each token; in the reward, of the mixture of whole sequences. Values differ by that
    constant: k1 and exact divergences report Σ w_i KL(p ‖ q_i), and k3 reports Z - 1 more, which is nearer to the KL to
    the mixture.

    Scores of a reference carry its fingerprint. A penalty uses it to refuse wrong scores: the policy's scores as the
    reference's, swapped arguments, two references within one optimizer step, and scores from before an update of the
    reference.

    Args:
        config: the penalty; None for KLConfig().
        reference: the reference that the scores are of, or the list of them. With it, stale scores are refused from the
            update on; without it, only after scores of the updated reference were seen in a step.
    """

    def __init__(
        self, config: KLConfig | None = None, reference: Reference | Sequence[Reference] | None = None
    ) -> None:
        self.config = config or KLConfig()
        self.settled = self.config.settled()
        """The estimator and the form of reward, also if the config leaves them open."""
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
        """The present coefficient of the KL."""
        return self.controller.coef

    @property
    def exact_due(self) -> bool:
        """True if `config.exact_every` asks for an exact measurement in the current step, and none was made yet."""
        every = self.config.exact_every
        return every is not None and (self._steps + 1) % every == 0 and not self._exact_given

    def add_exact(self, divergence: Tensor | Sequence[Tensor], mask: Tensor) -> None:
        """Measure "kl/exact" of the current step on these tokens, beside the estimate. This penalises nothing.

        Args:
            divergence: [B, T], nats: from score_pair(..., divergence="reverse_kl"). A list with one for each reference,
                if there are several.
            mask: [B, T], True = counts.

        Raises:
            ValueError: shapes that differ; weights that are not one per reference.
        """
        divergences = _listed(divergence)
        for one in divergences:
            require_shape("divergence", one, mask.shape, "mask")
        self._window.append(exact_statistics(_mixture(self.config, divergences, "divergence"), mask))
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
            policy_scores: in the loss, scores of the policy that is trained, with grad. In the reward, scores of the
                policy that sampled, with or without grad: a reward is never differentiated.
            ref_scores: scores of the reference; no grad ever flows to these. A list for several references, weighted by
                `config.reference_weights`.
            mask: [B, T], True = counts; usually `batch.completion_mask`.
            old_logp: [B, T], nats, in the loss: the log-probabilities under the policy that sampled, if it was another
                one.
            divergence: [B, T], nats, with grad, in the loss: exact divergence to use instead of the estimator. A list
                with one for each reference, if there are several. Estimator "exact" requires it.
            normalizer: in the loss: divisor of the aggregation if the batch is a part of a larger one (see
                `global_normalizer`).
            count: True if the next `step` counts this call. By default, the loss counts calls whose policy scores carry
                grad, so that an evaluation is not counted, and the reward counts every call. Scores that are not
                counted may be of another reference, unless the penalty was made with its reference.

        Returns:
            `loss`, a scalar with grad to the policy, or `reward`, [B, T], detached, to be *added* to the rewards: it is
            -coef · KL, credited as `settled.reward` says. `per_token` is the KL in nats. `metrics` are as from `step`,
            but over this call only.

        Raises:
            ValueError: shapes or temperatures that differ; weights that are not one per reference; a divergence that is
                missing or carries no grad; an argument that has no use with this placement; scores of the same model on
                both sides, swapped scores, scores of another reference than earlier in this step, or stale scores.
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
        ref_logp = _mixture(self.config, [reference.logp.detach() for reference in references], "reference")
        logp = policy_scores.logp
        if divergence is None:
            per_token = _estimated(self.config, logp, ref_logp, mask, old_logp)
        elif old_logp is not None:
            raise ValueError("old_logp has no use with an exact divergence, which uses no samples. Leave it out.")
        else:
            per_token = self._exact(_listed(divergence), logp, mask, len(references))
        loss = reward = None
        if in_loss:
            loss = self._loss(per_token, mask, normalizer)
        elif normalizer is not None:
            raise ValueError("normalizer has no use with placement 'reward', which does not aggregate. Leave it out.")
        else:
            reward = self._reward(per_token, mask)
        stats = _statistics(self.config, per_token.detach(), logp.detach(), ref_logp, mask, old_logp, divergence)
        if count:
            self._origins.note(references)
            self._window.append(stats)
            self._exact_given |= divergence is not None
        return KLOutput(loss, reward, per_token, metrics_of(stats, self.coef, self.controller.target))

    def step(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Close an optimizer step: the KL since the last step, over all ranks, updates the coefficient.

        The controller gets the mean over all tokens or all sequences of the step, depending on its unit. If nothing was
        scored, a schedule still counts the step.

        Args:
            accelerator: reduces over its processes; every rank must call. None for a single process.

        Returns:
            Metrics over the step (docs/metrics.md); if nothing was scored, only "kl/exact" or none. "kl" in nats per
            token and "kl/sequence" in nats per sequence; "kl/k1", "kl/k2" and "kl/k3", nats per token, of the same
            log-ratios, not clamped; "kl/exact", nats per token, if a divergence or `add_exact` gave it; "kl/max", the
            largest |log-ratio| of a token, and "kl/p99", their 99th percentile; "kl/log_ratio/p01", "/p50" and "/p99",
            percentiles of signed log-ratios; "kl/saturated", the share of tokens whose exp is capped; "kl/clipped", the
            share whose log-ratio `max_log_ratio` clamps; "kl/coef", the coefficient that applied; "kl/target", the
            target of the controller, if it has one. `histogram` has all log-ratios.

        Raises:
            ValueError: the controller follows the KL, and the KL is not finite or the step is too large for its
                horizon; or `config.exact_every` asks for an exact KL in this step, and none was given.
        """
        if self.exact_due and self._window:
            raise ValueError(
                f"kl.exact_every {self.config.exact_every} asks for the exact KL of a micro-batch of this step, and "
                "none was given. If penalty.exact_due is True, call penalty.add_exact with score_pair(..., "
                "divergence='reverse_kl').divergence, as refkl's trainers do; or leave kl.exact_every out."
            )
        stats = merged(self._window)
        self._window, self._exact_given = [], False
        self._origins.close_step()
        self._steps += 1
        if accelerator is not None and accelerator.num_processes > 1:
            stats = _over_ranks(stats, accelerator)
        metrics = metrics_of(stats, self.coef, self.controller.target)
        tokens, sequences = counted(stats)
        self.histogram = histogram_of(stats) if tokens else None
        if self.controller.unit == "sequence":
            self.controller.update(metrics["kl/sequence"], sequences)
        else:
            self.controller.update(metrics["kl"], tokens)
        if not tokens:  # as between two rollouts, if the KL is in the reward
            return {name: metrics[name] for name in ("kl/exact",) if name in metrics}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint between two optimizer steps: plain numbers and strings, which JSON stores
        exactly."""
        counted = {} if self.config.exact_every is None else {"steps": self._steps}
        return {"controller": self.controller.state_dict(), **counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: it is not the state of a KLPenalty, or it is of one with another controller.
        """
        if not isinstance(controller := state.get("controller"), dict):
            raise ValueError(f"This is no state of a KLPenalty: it holds {sorted(state)} and no 'controller'.")
        steps = state.get("steps", 0)  # missing in the state of a run without kl.exact_every
        if type(steps) is not int or steps < 0:
            raise ValueError(f"This state of a KLPenalty is damaged: its steps are {steps!r}, not a whole number.")
        self.controller.load_state_dict(controller)
        self._origins.forget()
        self._steps = steps

    def _exact(self, divergences: list[Tensor], logp: Tensor, mask: Tensor, references: int) -> Tensor:
        """Return the KL that the caller computed, [B, T] in nats."""
        if self.config.placement == "reward":
            raise ValueError(
                "An exact divergence does not go into the reward: it is the same whichever token is sampled, so a "
                "reward made of it prefers no token. Pass none, or use kl.placement 'loss'."
            )
        if len(divergences) != references:
            raise ValueError(f"Pass one divergence per reference: got {len(divergences)} for {references} references.")
        for one in divergences:
            require_shape("divergence", one, mask.shape, "mask")
        exact = _mixture(self.config, divergences, "divergence")
        if self.coef and logp.requires_grad and not exact.requires_grad:
            raise ValueError(
                "divergence carries no grad, so this penalty would train nothing. Take it from score_pair."
            )
        return exact.masked_fill(~mask, 0.0)

    def _loss(self, per_token: Tensor, mask: Tensor, normalizer: float | Tensor | None) -> Tensor:
        # With coef 0, an infinite divergence must not make the loss NaN: mask all tokens and keep only the graph.
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
        mask: [B, T], True = counts: the mask of this rank; or one mask per micro-batch of the optimizer step. The last
            step of an epoch may have fewer micro-batches.
        mode: as in `kl.aggregate`.
        accelerator: counts over its processes (every rank must call), and undoes their averaging of gradients.

    Returns:
        Scalar fp32: the count over all micro-batches and ranks, divided by the number of ranks (gradients are averaged
        over ranks). For "token-sum" the count is 1, however many there are. Sum the losses of the micro-batches. If
        backward divides by the number of accumulation steps, divide this by the same number: for `accelerator.backward`
        it is `accelerator.gradient_accumulation_steps`, even if the last step of an epoch has fewer micro-batches.
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


def _listed(divergence: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [divergence] if isinstance(divergence, Tensor) else list(divergence)


def _mixture(config: KLConfig, parts: list[Tensor], what: str) -> Tensor:
    """Return Σ w_i part_i. A part of weight 0 is left out, including its inf and NaN."""
    weights = config.reference_weights
    if not parts:
        raise ValueError(f"KLPenalty was passed an empty list for its {what}s; it needs at least one.")
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


def _estimated(config: KLConfig, logp: Tensor, ref_logp: Tensor, mask: Tensor, old_logp: Tensor | None) -> Tensor:
    """Return the KL from samples, [B, T] in nats."""
    in_reward, estimator = config.placement == "reward", config.settled().estimator
    if estimator == "exact":
        raise ValueError(
            "kl.estimator 'exact' needs the divergence over the vocabulary, and none was passed. Pass divergence=, "
            "from score_pair(…, divergence='reverse_kl'), or use another estimator."
        )
    if in_reward and old_logp is not None:
        raise ValueError(
            "old_logp has no use with placement 'reward': the trainer weights rewards by its own ratio. Leave it "
            "out, and pass the scores of the policy that sampled as policy_scores."
        )
    return estimate(
        logp,
        ref_logp,
        estimator,
        gradient="none" if in_reward else config.gradient,
        old_logp=old_logp,
        mask=mask,
        ratio=config.ratio,
        max_log_ratio=config.max_log_ratio,
    )


def _statistics(
    config: KLConfig,
    per_token: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    old_logp: Tensor | None,
    divergence: Any,
) -> Tensor:
    """Return the statistics of one micro-batch, all tensors [B, T] and detached.

    The values of MEASURED are weighted as the penalty's own and not clamped.
    """
    exact = divergence is not None
    own = None if exact or config.max_log_ratio is not None else config.settled().estimator
    options: dict[str, Any] = {"gradient": "none", "mask": mask}
    if old_logp is not None:
        options |= {"old_logp": old_logp, "ratio": config.ratio}
    return statistics(
        per_token,
        masked_log_ratio(logp, ref_logp, mask),
        mask,
        estimates=[per_token if name == own else estimate(logp, ref_logp, name, **options) for name in MEASURED],
        exact=exact,
        max_log_ratio=None if exact else config.max_log_ratio,
    )


def _over_ranks(stats: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the statistics of all ranks together; every rank must call this."""
    on_device = stats.to(accelerator.device)  # fp64, since fp32 counts exactly only up to 2^24
    sums = accelerator.reduce(on_device[:-1], reduction="sum")
    peak = accelerator.reduce(on_device[-1:], reduction="max")
    return with_nan(torch.cat([sums, peak]).to(stats))


def _check_comparable(policy_scores: TokenScores, ref_scores: TokenScores, mask: Tensor) -> None:
    """Raise ValueError for scores whose difference would not be a log-ratio of policy and reference."""
    require_shape("mask", mask, policy_scores.logp.shape, "policy_scores.logp")
    if not mask.numel():
        raise ValueError(
            f"The penalty was given scores of shape {list(mask.shape)}, which hold no token, so there is no KL. Leave "
            "this micro-batch out; a micro-batch in which nothing is scored has rows, and a mask that is all False."
        )
    require_shape("ref_logp", ref_scores.logp, policy_scores.logp.shape, "logp")
    if policy_scores.temperature != ref_scores.temperature:
        raise ValueError(
            f"The policy was scored at temperature {policy_scores.temperature} and the reference at "
            f"{ref_scores.temperature}: their KL would compare two different distributions. Score both at the same one."
        )
