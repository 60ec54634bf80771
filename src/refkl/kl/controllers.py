"""What the KL is multiplied by, and how that changes over a run."""

from __future__ import annotations

import math


class FixedKL:
    """A coefficient that stays as it is. 0.0 measures the KL and penalises nothing.

    Raises:
        ValueError: a coefficient that is negative or not finite.
    """

    def __init__(self, coef: float) -> None:
        if not (math.isfinite(coef) and coef >= 0.0):
            raise ValueError(
                f"The KL coefficient must be finite and not negative, got {coef}: below zero it rewards drift."
            )
        self.coef = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Called once per optimizer step with the KL in nats over `n` samples; a fixed coefficient takes no notice."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`."""
        self.coef = float(state["coef"])
