"""Controllers of the KL coefficient over a run.

    fixed      a constant coefficient
    linear     from one coefficient to another over a number of steps, in a straight line
    cosine     from one coefficient to another along half a cosine: slow, fast, slow
    adaptive   steers the KL to a target, in proportion to the error (Ziegler et al., arXiv:1909.08593)
    dual       a Lagrange multiplier: finds the coefficient at which the KL stays within a budget

Each is updated once per optimizer step, with the KL over all micro-batches and ranks, in the controller's own `unit`:
nats per "token" or per "sequence". The two units differ by the length of a completion, and so do their targets.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from refkl.messages import unknown

UNITS = ("token", "sequence")


class Controller:
    """Base class of the controllers.

    Raises:
        ValueError: a coefficient that is negative or not finite.
    """

    name: ClassVar[str]
    """The controller's key in CONTROLLERS. Only a controller of the same name can load its state."""
    unit: str = "token"
    """The unit that `update` expects: "token", nats per token; "sequence", nats per sequence, summed over its
    tokens."""
    target: float | None = None
    """The KL that the controller steers to, in nats per `unit`; None if it has no target."""

    def __init__(self, coef: float) -> None:
        self.coef = _coefficient("The KL coefficient", coef)
        """The present coefficient of the KL."""

    def update(self, kl: float, n: int) -> None:
        """Update the coefficient; called once per optimizer step.

        Args:
            kl: nats per `unit`, the mean over the step, over all ranks.
            n: number of tokens or sequences (the `unit`) in that mean. If it is 0, nothing was scored: schedules count
                the step, and controllers that follow the KL ignore it.

        Raises:
            ValueError: the controller follows the KL, and it is not finite.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain numbers and strings, which JSON stores exactly."""
        return {"controller": self.name, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. This controller keeps its settings (targets, bounds, lengths).

        Raises:
            ValueError: the state belongs to another controller, or to none.
        """
        if state.get("controller") != self.name:
            raise ValueError(
                f"This state is of the KL controller {state.get('controller')!r} and cannot be loaded by "
                f"{self.name!r}. Use the controller that the state was saved from, or start without a state."
            )
        for key in self._state().keys() - {"unit"}:
            if type(state.get(key)) not in (int, float) or (key == "step" and not _is_count(state[key])):
                raise ValueError(
                    f"This state of the KL controller {self.name!r} is damaged: its {key} is {state.get(key)!r}. Load "
                    "another copy of it, or start without a state."
                )
        self._restore(state)

    def _state(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def _restore(self, state: dict[str, Any]) -> None:
        self.coef = _coefficient("The KL coefficient of this state", state["coef"])


class FixedKL(Controller):
    """A constant coefficient. With 0.0 the KL is measured but not penalised."""

    name = "fixed"

    def update(self, kl: float, n: int) -> None:
        """Do nothing: the coefficient is constant."""


class LinearKL(Controller):
    """A straight line from `coef` to `end_coef` over `steps` optimizer steps, then constant at `end_coef`.

    The first step uses `coef`. Steps in which nothing was scored count too.

    Raises:
        ValueError: a coefficient that is negative or not finite, or less than one step.
    """

    name = "linear"

    def __init__(self, coef: float, end_coef: float, steps: int) -> None:
        super().__init__(coef)
        if not 1 <= steps < math.inf or steps != int(steps):
            raise ValueError(
                f"A schedule's steps count optimizer steps and must be a whole number of at least 1, got {steps}."
            )
        self.start_coef = self.coef
        self.end_coef = _coefficient("end_coef", end_coef)
        self.steps = int(steps)
        self.step = 0

    def update(self, kl: float, n: int) -> None:
        """Advance the schedule by one step; the KL is ignored."""
        self._go_to(self.step + 1)

    def _go_to(self, step: int) -> None:
        self.step = step
        share = self._share(step / self.steps) if step < self.steps else 1.0
        self.coef = self.start_coef + (self.end_coef - self.start_coef) * share if share < 1.0 else self.end_coef

    def _share(self, progress: float) -> float:
        return progress

    def _state(self) -> dict[str, Any]:
        return {"step": self.step}

    def _restore(self, state: dict[str, Any]) -> None:
        self._go_to(int(state["step"]))


class CosineKL(LinearKL):
    """LinearKL along half a cosine: coef = end + (start - end) · (1 + cos(π · step / steps)) / 2."""

    name = "cosine"

    def _share(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


class _FollowsKL(Controller):
    """Base class of controllers that multiply the coefficient at each step, so it can never leave 0."""

    target: float

    def __init__(self, coef: float, target: float, unit: str) -> None:
        super().__init__(coef)
        if self.coef == 0.0:
            raise ValueError(
                f"The {self.name} controller multiplies its coefficient, which can never leave 0.0. Set a small "
                "positive coef, or use the fixed controller to only measure the KL."
            )
        if unit not in UNITS:
            raise unknown("unit", str(unit), UNITS)
        self.target = _positive("target", target)
        self.unit = unit

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "unit": self.unit}

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("unit", self.unit) != self.unit:
            raise ValueError(
                f"The KL of this state was per {state['unit']}, and this {self.name} controller's target is per "
                f"{self.unit}: the saved coefficient does not fit. Set the unit of the state, or load no state."
            )
        super()._restore(state)

    def _error(self, kl: float, n: int) -> float:
        """Return the relative error of the KL: kl / target - 1."""
        if not math.isfinite(kl):
            raise ValueError(
                f"The {self.name} controller was given a KL of {kl}. Look for log-probabilities that are not finite in "
                "the scores of the policy or the reference."
            )
        if n < 0:
            raise ValueError(f"n counts {self.unit}s and cannot be negative, got {n}.")
        return kl / self.target - 1.0


class AdaptiveKL(_FollowsKL):
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) · n / horizon (Ziegler et al. 2019, arXiv:1909.08593).

    Args:
        coef: the initial coefficient.
        target: the KL to steer to, in nats per `unit`.
        horizon: number of samples over which the coefficient changes by its greatest factor: sequences (the paper's
            episodes), or tokens if the unit is "token".
        unit: "sequence", as in the paper: the mean over sequences of the sum over tokens. A target found with one unit
            does not carry over to the other.

    Raises:
        ValueError: a coefficient of 0 (multiplying it leaves it at 0), a target or horizon that is not positive and
            finite, an unknown unit. From `update`: a KL that is not finite, or so many samples in one step (5 ·
            horizon) that the factor 1 - 0.2 · n / horizon would not be positive.
    """

    name = "adaptive"

    def __init__(self, coef: float, target: float, horizon: float, unit: str = "sequence") -> None:
        super().__init__(coef, target, unit)
        self.horizon = _positive("horizon", horizon)

    def update(self, kl: float, n: int) -> None:
        """Update the coefficient with `n` sequences, or `n` tokens if the unit is "token"."""
        error = min(max(self._error(kl, n), -0.2), 0.2)
        if n >= 5 * self.horizon:
            raise ValueError(
                f"A step of n = {n} {self.unit}s is too much for a horizon of {self.horizon:g}: the factor "
                f"1 - 0.2 · n / horizon would multiply the coefficient by {1.0 - 0.2 * n / self.horizon:g}. "
                f"Set a horizon of many steps: {20 * n} would be 20 steps of this size."
            )
        self.coef *= 1.0 + error * n / self.horizon


class DualKL(_FollowsKL):
    """A Lagrange multiplier for "maximise the reward subject to KL <= target": dual ascent on log coef.

    log coef += learning_rate · clip(kl / target - 1, -1, 1), then kept within [min_coef, max_coef].

    The coefficient grows while the KL is over its budget and shrinks while it is under. It settles where the KL equals
    the budget, or at a bound: at `min_coef` if the reward by itself keeps the policy within the budget, at `max_coef`
    if no coefficient can. In log space a step is a factor of at most exp(learning_rate), so the same learning rate
    suits coefficients of 0.001 and of 10 (as SAC does for its temperature, Haarnoja et al., arXiv:1812.05905). Unlike
    AdaptiveKL it does not depend on the batch size. The policy must follow the coefficient faster than the coefficient
    changes: if the KL swings around the target, lower the learning rate.

    Args:
        coef: the initial coefficient, within the bounds.
        target: the budget, in nats per `unit`.
        learning_rate: step size of log coef, per optimizer step.
        unit: "sequence" or "token".
        min_coef: lower bound of the coefficient; positive.
        max_coef: upper bound.

    Raises:
        ValueError: a coefficient that is 0 or outside its bounds, bounds that are not positive, a target or learning
            rate that is not positive and finite, an unknown unit. From `update`: a KL that is not finite.
    """

    name = "dual"

    def __init__(
        self,
        coef: float,
        target: float,
        learning_rate: float = 0.1,
        unit: str = "sequence",
        min_coef: float = 1e-6,
        max_coef: float = 100.0,
    ) -> None:
        super().__init__(coef, target, unit)
        self.learning_rate = _positive("learning_rate", learning_rate)
        self.min_coef, self.max_coef = _positive("min_coef", min_coef), _positive("max_coef", max_coef)
        if not self.min_coef <= self.coef <= self.max_coef:
            raise ValueError(
                f"The coefficient {self.coef:g} is not within its bounds, min_coef {self.min_coef:g} and max_coef "
                f"{self.max_coef:g}. Set a coefficient between them, or widen the bounds."
            )

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.coef = min(max(self.coef, self.min_coef), self.max_coef)  # bounds are settings and may have changed

    def update(self, kl: float, n: int) -> None:
        """Update the coefficient. `n` matters only if it is 0: the coefficient then stays."""
        error = min(max(self._error(kl, n), -1.0), 1.0)
        if n:
            self.coef = min(max(self.coef * math.exp(self.learning_rate * error), self.min_coef), self.max_coef)


CONTROLLERS: dict[str, type[Controller]] = {
    "fixed": FixedKL,
    "linear": LinearKL,
    "cosine": CosineKL,
    "adaptive": AdaptiveKL,
    "dual": DualKL,
}
"""The controller class for each value of kl.controller."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _coefficient(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be finite and not negative, got {value}: a negative one rewards drift.")
    return float(value)


def _positive(name: str, value: float) -> float:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    return float(value)
