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
    """The values of a KLConfig, with its open fields filled in."""

    estimator: Estimator
    """The value of the penalty."""
    reward: RewardForm | None
    """Credit of a token (see KLConfig.reward); None if the penalty is in the loss."""
    gamma: float
    """Discount of reward "return_to_go"; 1 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Settings of the KL penalty.

    A field that the other fields leave without effect is refused if it is set, and so is a field that they need and
    that is missing. A config is frozen and keeps the given values: an open field stays None, so `dataclasses.replace`
    fills it in again. `settled` returns the values that open fields stand for.
    """

    coef: float = 0.05
    """Coefficient of the KL; under a controller, its initial value. 0 measures the KL and penalises nothing."""
    estimator: Estimator | None = None
    """Estimator that gives the value of the KL; see refkl.kl.estimate. None means "k3" in the loss, "k1" in the reward
    (no other is unbiased there), and "exact" on text that no policy sampled (supervised fine-tuning). "exact" is the
    divergence over the whole vocabulary, which the caller passes; it is for the loss."""
    gradient: Literal["reverse_kl", "autograd", "none"] = "reverse_kl"
    """"reverse_kl" is the gradient of KL(policy ‖ reference), for every estimator. "autograd" differentiates the
    formula of the estimator (k3 as in TRL's GRPO; k1 then has a gradient of mean zero). Both are for the loss. A reward
    is never differentiated; there, "none" has the same effect as the default."""
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """Aggregation of the KL per token to one number, in the loss; see refkl.kl.aggregate."""
    length: int | None = None
    """Constant that divides the sum of each sequence, in tokens, such as the longest allowed completion; for
    aggregation "seq-mean-token-sum-norm" only."""
    placement: Literal["loss", "reward"] = "loss"
    """Place of the penalty: "loss" adds it to the loss, "reward" adds -coef · KL to the reward of each token."""
    reward: RewardForm | None = None
    """Credit of a token, for placement "reward". "return_to_go" (the default) credits it with its own KL and that of
    the tokens after it. "token" credits it with its own KL only, for trainers that compute returns themselves.
    "sequence" puts the sum at the last token. See refkl.kl.place_rewards for which is unbiased."""
    gamma: float | None = None
    """Discount from one token to the next, for reward "return_to_go". None means 1, which gives the exact gradient."""
    controller: Literal["fixed", "linear", "cosine", "adaptive", "dual"] = "fixed"
    """Change of coef over a run, once per optimizer step. "fixed" keeps it constant. "linear" and "cosine" change it to
    `end_coef` over `steps`. "adaptive" steers the KL to `target` within `horizon` (Ziegler et al., arXiv:1909.08593).
    "dual" keeps the KL within the budget `target`."""
    end_coef: float | None = None
    """Final coefficient, for "linear" and "cosine"."""
    steps: int | None = None
    """Number of optimizer steps from `coef` to `end_coef`, for "linear" and "cosine"."""
    target: float | None = None
    """The KL to hold, in nats per `unit`, for "adaptive" and "dual"."""
    unit: Literal["token", "sequence"] | None = None
    """Unit of the target, for "adaptive" and "dual". None means "sequence": the mean over sequences of the KL summed
    over the tokens of each."""
    horizon: float | None = None
    """Number of sequences (of tokens, if that is the unit) over which the coefficient changes by its greatest factor,
    for "adaptive"."""
    learning_rate: float | None = None
    """Largest change of log coef in one step, for "dual". None means 0.1."""
    min_coef: float | None = None
    """Lower bound of the coefficient, for "dual". None means 1e-6."""
    max_coef: float | None = None
    """Upper bound of the coefficient, for "dual". None means 100."""
    ratio: Literal["token", "prefix"] = "token"
    """Importance ratio of a token that another policy sampled (old_logp), in the loss. "token" is the ratio of the
    token itself. "prefix" is the product of the ratios up to and including it: only this is unbiased for the sequence,
    and its variance grows with the length."""
    max_log_ratio: float | None = None
    """Limit of the log-ratio in the value of the estimate: it is clamped to ± this. The reverse-KL gradient is never
    clamped."""
    reference_weights: list[float] | None = None
    """Weight of each reference in the geometric mixture of several references; they sum to 1. None means equal
    weights."""
    exact_every: int | None = None
    """Optimizer steps between two measurements of the exact KL beside an estimate, logged as kl/exact. A measurement
    covers the whole vocabulary, on one micro-batch of that step, with dropout off. It costs one more forward pass of
    policy and reference."""

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
                "kl.max_log_ratio has no use with estimator 'exact', which uses no log-ratio. Leave it out."
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
        """Return the values of the fields that may be left open; they depend on the placement."""
        in_reward = self.placement == "reward"
        return SettledKL(
            estimator=self.estimator or ("k1" if in_reward else "k3"),
            reward=self.reward or ("return_to_go" if in_reward else None),
            gamma=1.0 if self.gamma is None else self.gamma,
        )

    def on_given_text(self) -> KLConfig:
        """Return the config for tokens that no policy sampled: the same, with estimator "exact" if none was set.

        Raises:
            ValueError: another estimator was set.
        """
        config = self if self.estimator is not None else replace(self, estimator="exact")
        if config.estimator != "exact":
            raise ValueError(
                f"kl.estimator {config.estimator!r} estimates the KL from tokens that the policy sampled. Here the "
                "tokens are given, and from these it does not estimate KL(policy ‖ reference). Use 'exact', or leave "
                "kl.estimator out."
            )
        return config

    def make_controller(self) -> Controller:
        """Return the controller that these fields describe, in its initial state.

        Raises:
            ValueError: a field that the controller needs is missing, one without use is set, or one is invalid.
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
                f"kl.gradient {self.gradient!r} has no use with estimator 'exact': the gradient is that of the exact "
                "divergence. Leave kl.gradient out."
            )
        if settled.estimator == "exact" and self.ratio != "token":
            raise ValueError("kl.ratio has no use with estimator 'exact', which uses no samples. Leave it out.")
        if not penalises:
            return
        if self.gradient == "none":
            raise ValueError(
                "kl.gradient 'none' penalises nothing in the loss. Use 'reverse_kl', or kl.placement 'reward'. To only "
                "measure the KL, set kl.coef 0."
            )
        if self.gradient == "autograd" and settled.estimator == "k1":
            raise ValueError(
                "kl.estimator 'k1' with gradient 'autograd' penalises nothing: the gradient of k1 has mean zero. "
                "Use gradient 'reverse_kl', or estimator 'k2' or 'k3'."
            )

    def _check_reward(self, settled: SettledKL) -> None:
        if settled.estimator == "exact":
            raise ValueError(
                "kl.estimator 'exact' does not go into the reward: the exact divergence is the same whichever token is "
                "sampled, so a reward made of it prefers no token. Use 'k1', or kl.placement 'loss'."
            )
        if self.ratio != "token":
            raise ValueError(
                "kl.ratio has no use with placement 'reward': the trainer weights rewards by its own ratio. Leave it "
                "out."
            )
        if settled.estimator != "k1" and self.coef > 0:
            warnings.warn(
                f"kl.estimator {settled.estimator!r} in the reward is biased: it is not the gradient of KL(policy ‖ "
                "reference), and training can drive the probability of tokens to 0 (docs/estimators.md). Use 'k1' "
                "there.",
                stacklevel=4,
            )
        if self.gradient == "autograd":
            raise ValueError(
                "kl.gradient 'autograd' has no use with placement 'reward': rewards are never differentiated. Leave it "
                "out."
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
    """Return the names of the settings of any controller, except coef."""
    return sorted({name for cls in CONTROLLERS.values() for name in signature(cls).parameters} - {"coef"})


def _check_weights(weights: list[float]) -> None:
    """Raise ValueError unless these are the weights of a mixture."""
    if not weights or not all(0.0 <= w <= 1.0 for w in weights) or not isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"kl.reference_weights must not be negative and must sum to 1, got {weights} with sum {sum(weights):g}."
        )
