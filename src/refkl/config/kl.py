"""The KL penalty."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from math import isclose
from typing import Literal

from refkl.config.options import check_offered
from refkl.kl import CONTROLLERS, Controller
from refkl.kl.aggregation import check_aggregation
from refkl.kl.rewards import check_rewards

Estimator = Literal["k1", "k2", "k3", "abs", "exact"]
RewardForm = Literal["return_to_go", "token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class SettledKL:
    """The values of a KLConfig, those that it leaves open included."""

    estimator: Estimator
    """The value of the penalty."""
    reward: RewardForm | None
    """What a token is credited with; None in the loss."""
    gamma: float
    """The discount of reward "return_to_go"; 1 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL that is added, and its weight.

    A field that the others leave without a use is refused when it is set, and so is one that is missing. A config is
    frozen and keeps what it was given: a field that is left open stays None, so that `dataclasses.replace` settles it
    anew. `settled` says what such a field means.
    """

    coef: float = 0.05
    """What the KL is multiplied by; under a controller, what it starts from. 0 measures it and penalises nothing."""
    estimator: Estimator | None = None
    """The value; see refkl.kl.estimate. None: "k3" in the loss, "k1" in the reward, where it alone is unbiased, and
    "exact" on text that no policy sampled (supervised fine-tuning). "exact": the divergence over the whole vocabulary,
    which the caller passes; for the loss."""
    gradient: Literal["reverse_kl", "autograd", "none"] = "reverse_kl"
    """"reverse_kl" is the gradient of KL(policy ‖ reference), for every estimator. "autograd" differentiates the
    estimator as it stands (k3 as in TRL's GRPO; k1 then has a gradient of mean zero). Both are for the loss: a reward
    is never differentiated, which "none" says too."""
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """In the loss, from tokens to one number; see refkl.kl.aggregate."""
    length: int | None = None
    """For aggregation "seq-mean-token-sum-norm", in tokens: the constant that each sequence's sum is divided by, such
    as the longest completion that is allowed."""
    placement: Literal["loss", "reward"] = "loss"
    """Where the penalty goes: added to the loss, or -coef · KL added to the reward of each token."""
    reward: RewardForm | None = None
    """For placement "reward", what a token is credited with: "return_to_go" (the default there), its KL and that of
    the tokens after it; "token", its own alone, for trainers that make returns of their own; "sequence", the sum, at
    the last token. See refkl.kl.place_rewards for which is unbiased."""
    gamma: float | None = None
    """For reward "return_to_go": the discount from one token to the next. None is 1, the exact gradient."""
    controller: Literal["fixed", "linear", "cosine", "adaptive", "dual"] = "fixed"
    """How coef changes over a run, once per optimizer step. "fixed": it stays. "linear", "cosine": to `end_coef` over
    `steps`. "adaptive": steers the KL to `target` within `horizon` (Ziegler et al., arXiv:1909.08593). "dual": keeps
    the KL within the budget `target`."""
    end_coef: float | None = None
    """For "linear" and "cosine": the last coefficient."""
    steps: int | None = None
    """For "linear" and "cosine": optimizer steps from `coef` to `end_coef`."""
    target: float | None = None
    """For "adaptive" and "dual": the KL to hold, in nats per `unit`."""
    unit: Literal["token", "sequence"] | None = None
    """For "adaptive" and "dual": what the target is per. None is "sequence": the mean of the KL summed over each."""
    horizon: float | None = None
    """For "adaptive": over how many sequences (tokens, if that is the unit) the coefficient changes by its most."""
    learning_rate: float | None = None
    """For "dual": the most that log coef changes in a step. None is 0.1."""
    min_coef: float | None = None
    """For "dual": the coefficient goes no lower. None is 1e-6."""
    max_coef: float | None = None
    """For "dual": the coefficient goes no higher. None is 100."""
    ratio: Literal["token", "prefix"] = "token"
    """In the loss, where another policy sampled the tokens (old_logp): each token's own ratio, or the product of the
    ratios up to it, which alone is unbiased for the sequence and has a variance that grows with its length."""
    max_log_ratio: float | None = None
    """Clamp the log-ratio to ± this in the estimate's value; the reverse-KL gradient is never clamped."""
    reference_weights: list[float] | None = None
    """For several references: the weight of each in their geometric mixture; they sum to 1. None weighs all alike."""
    exact_every: int | None = None
    """Optimizer steps between two measurements of the exact KL beside an estimate, logged as kl/exact: over the whole
    vocabulary, on one micro-batch of that step, with dropout off. Each costs a forward of policy and reference more."""

    def __post_init__(self) -> None:
        check_offered("kl", self)
        controller, settled = self.make_controller(), self.settled()
        if self.placement == "reward":
            self._check_reward(settled)
        else:
            self._check_loss(settled, penalises=controller.coef > 0 or self.controller != "fixed")
        if self.max_log_ratio is not None and not self.max_log_ratio > 0:
            raise ValueError(f"kl.max_log_ratio must be positive, got {self.max_log_ratio}.")
        if self.max_log_ratio is not None and self.estimator == "exact":
            raise ValueError(
                "kl.max_log_ratio has no use with estimator 'exact', which is of no log-ratio. Leave it out."
            )
        if self.reference_weights is not None:
            _check_weights(self.reference_weights)
        if self.exact_every is not None:
            self._check_exact_every(self.exact_every)

    def _check_exact_every(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"kl.exact_every counts optimizer steps and must be at least 1, got {every}.")
        if self.estimator == "exact":
            raise ValueError(
                "kl.exact_every has no use with estimator 'exact', whose value is the exact KL at each step. Leave it "
                "out."
            )

    def settled(self) -> SettledKL:
        """The fields that may be left open, as the placement settles them."""
        in_reward = self.placement == "reward"
        return SettledKL(
            estimator=self.estimator or ("k1" if in_reward else "k3"),
            reward=self.reward or ("return_to_go" if in_reward else None),
            gamma=1.0 if self.gamma is None else self.gamma,
        )

    def on_given_text(self) -> KLConfig:
        """The same, for tokens that no policy sampled: "exact", if no estimator was asked for.

        Raises:
            ValueError: another one was.
        """
        config = self if self.estimator is not None else replace(self, estimator="exact")
        if config.estimator != "exact":
            raise ValueError(
                f"kl.estimator {config.estimator!r} estimates the KL from tokens that the policy sampled. Here the "
                "tokens are given, and of these it is no estimate of KL(policy ‖ reference). Use 'exact', or leave "
                "kl.estimator out."
            )
        return config

    def make_controller(self) -> Controller:
        """The controller that these fields describe, at its start.

        Raises:
            ValueError: a field that the controller lacks or has no use for, or one that makes no sense.
        """
        takes = dict(signature(CONTROLLERS[self.controller]).parameters)
        given = {name: getattr(self, name) for name in _controller_fields() if getattr(self, name) is not None}
        for name in given:
            if name not in takes:
                users = [repr(c) for c, cls in CONTROLLERS.items() if name in signature(cls).parameters]
                raise ValueError(
                    f"kl.{name} has no use with controller {self.controller!r}: it is for {' and '.join(users)}. Set "
                    f"kl.controller, or leave kl.{name} out."
                )
        for name, parameter in takes.items():
            if parameter.default is Parameter.empty and name not in ("coef", *given):
                raise ValueError(f"kl.controller {self.controller!r} needs kl.{name}, which is not set.")
        return CONTROLLERS[self.controller](self.coef, **given)

    def _check_loss(self, settled: SettledKL, penalises: bool) -> None:
        for name in ("reward", "gamma"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"kl.{name} has no use with placement 'loss'. Set kl.placement 'reward', or leave it out."
                )
        check_aggregation(self.aggregation, self.length)
        if settled.estimator == "exact" and self.gradient != "reverse_kl":
            raise ValueError(
                f"kl.gradient {self.gradient!r} has no use with estimator 'exact': the divergence that is passed has a "
                "gradient of its own. Leave kl.gradient out."
            )
        if settled.estimator == "exact" and self.ratio != "token":
            raise ValueError("kl.ratio has no use with estimator 'exact', which is not made of samples. Leave it out.")
        if not penalises:
            return
        if self.gradient == "none":
            raise ValueError(
                "kl.gradient 'none' penalises nothing in the loss. Use 'reverse_kl', or placement 'reward', or coef 0 "
                "to measure the KL alone."
            )
        if self.gradient == "autograd" and settled.estimator == "k1":
            raise ValueError(
                "kl.estimator 'k1' with gradient 'autograd' penalises nothing: the gradient of k1 has mean zero. "
                "Use gradient 'reverse_kl', or estimator 'k2' or 'k3'."
            )

    def _check_reward(self, settled: SettledKL) -> None:
        if settled.estimator == "exact":
            raise ValueError(
                "kl.estimator 'exact' does not go into the reward: a token's exact divergence is the same whichever "
                "token is sampled, so as a reward it teaches that token nothing. Use 'k1', or placement 'loss'."
            )
        if self.ratio != "token":
            raise ValueError(
                "kl.ratio has no use with placement 'reward': the trainer's own ratio weighs a reward. Leave it out."
            )
        if settled.estimator != "k1" and self.coef > 0:
            warnings.warn(
                f"kl.estimator {settled.estimator!r} in the reward is biased: it is not the gradient of KL(policy ‖ "
                "reference), and training can end with tokens given up altogether (docs/estimators.md). 'k1' is right "
                "there.",
                stacklevel=4,
            )
        if self.gradient == "autograd":
            raise ValueError(
                "kl.gradient 'autograd' has no use with placement 'reward', which is never differentiated."
            )
        if self.aggregation != "token-mean" or self.length is not None:
            raise ValueError(
                "kl.aggregation and kl.length have no use with placement 'reward': rewards stay per token, and the "
                "trainer's loss sums them up. Leave them out."
            )
        if self.gamma is not None:
            if settled.reward != "return_to_go":
                raise ValueError(f"kl.gamma has no use with reward {settled.reward!r}. Leave it out.")
            check_rewards(settled.reward, self.gamma)


def _controller_fields() -> list[str]:
    """The settings of any controller, but for coef."""
    return sorted({name for cls in CONTROLLERS.values() for name in signature(cls).parameters} - {"coef"})


def _check_weights(weights: list[float]) -> None:
    """Raise ValueError unless these are weights of a mixture."""
    if not weights or not all(0.0 <= w <= 1.0 for w in weights) or not isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"kl.reference_weights must not be negative and must sum to 1, got {weights} with sum {sum(weights):g}."
        )
