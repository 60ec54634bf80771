"""Configuration of the updates of the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from refkl.config.options import check_offered


@dataclass(frozen=True, kw_only=True)
class SettledSync:
    """The values of a SyncConfig, with its open fields filled in; None for a field that it does not use."""

    alpha: float | None
    ema_power: float | None
    bias_power: float | None
    lag: float | None


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Updates of the reference: their times and their size.

    A field that the other fields leave without effect is refused if it is set. A config is frozen and keeps the given
    values: an open field stays None, and `settled` returns the value that it stands for.
    """

    every: int | None = 512
    """Optimizer steps (not micro-batches) between two syncs; 1 for a moving average. None updates the reference only if
    the KL passes `max_kl`."""
    average: Literal["ema", "bema"] = "ema"
    """"ema": theta_ref <- (1 - alpha) theta_ref + alpha theta, with one `alpha`. "bema": a moving average whose alpha
    decays, and which is corrected for its lag (Block and Zhang, arXiv:2508.00180); it holds two more copies in fp32."""
    alpha: float | None = None
    """Weight of the policy in an update, for "ema". 1 copies the policy (TR-DPO hard). None means 0.6, which is
    recommended for the soft variant with a sync every 512 steps (Gorbatovski et al., arXiv:2404.09656)."""
    ema_power: float | None = None
    """Exponent p of alpha = (lag + t)^-p at step t, for "bema". None means 0.5."""
    bias_power: float | None = None
    """Exponent p of the weight (lag + t)^-p of the correction theta - theta_first at step t, for "bema". None means
    0.2."""
    lag: float | None = None
    """Age of the average at its start, in steps, for "bema". None means 10."""
    lora: Literal["factors", "product"] = "factors"
    """Average of a LoRA policy's layers with alpha < 1. "factors" averages A and B separately. "product" averages the
    change of weight B · A that they make, exactly; the reference's rank then grows with each sync."""
    lora_rank: int | None = None
    """Rank that the reference is cut to at each sync, as the best approximation, for lora "product". None keeps the
    average exact; its rank is then at most the smaller side of a layer's weight."""
    warmup: int = 0
    """Optimizer steps at the start without any update; `every` and "bema" count from there."""
    max_kl: float | None = None
    """Limit of the KL to the reference, in nats per token. If the KL passes it, the reference becomes a copy of the
    policy, whatever `every` says (ProRL's reset, arXiv:2505.24864)."""
    reset_optimizer: bool = False
    """Also reset the optimizer's state if `max_kl` is passed: its moments are set to 0, as at the start."""
    first_kl_every: int | None = None
    """Optimizer steps between two measurements of the KL to the first reference, on the tokens of that step. The KL to
    a reference that moves does not show how far the policy has gone. It costs a copy of the weights that move (none for
    a fresh adapter)."""

    def __post_init__(self) -> None:
        check_offered("sync", self)
        if self.lora_rank is not None and self.lora != "product":
            raise ValueError(
                f"sync.lora_rank has no use with lora {self.lora!r}, which leaves the rank as it is. Set sync.lora "
                "'product', or leave it out."
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"sync.lora_rank must be at least 1, got {self.lora_rank}.")
        if self.lora == "product" and self.average == "bema":
            raise ValueError(
                "sync.lora 'product' has no use with sync.average 'bema', which is corrected tensor by tensor. Leave "
                "it out."
            )
        for name in ("every", "first_kl_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"sync.{name} counts optimizer steps and must be at least 1, got {value}.")
        if self.every is None and self.max_kl is None:
            raise ValueError("sync.every is None and sync.max_kl is not set: the reference would never move. Set one.")
        if self.warmup < 0:
            raise ValueError(f"sync.warmup counts optimizer steps and cannot be negative, got {self.warmup}.")
        if self.max_kl is not None and not self.max_kl > 0.0:
            raise ValueError(f"sync.max_kl is in nats per token and must be positive, got {self.max_kl}.")
        if self.reset_optimizer and self.max_kl is None:
            raise ValueError("sync.reset_optimizer is for the reset at sync.max_kl, which is not set. Leave it out.")
        self._check_average()

    def settled(self) -> SettledSync:
        """Return the values of the fields that may be left open; they depend on `every` and `average`."""
        names = () if self.every is None else _TAKES[self.average]
        given = {name: getattr(self, name) for name in _OPEN}
        values = {name: _OPEN[name] if name in names and value is None else value for name, value in given.items()}
        return SettledSync(**values)

    def _check_average(self) -> None:
        if self.every is None and self.average != "ema":
            raise ValueError("sync.average 'bema' moves the reference at regular steps: set sync.every.")
        own = () if self.every is None else _TAKES[self.average]
        for name in _OPEN:
            if name not in own and getattr(self, name) is not None:
                why = "without sync.every" if self.every is None else f"with sync.average {self.average!r}"
                raise ValueError(f"sync.{name} has no use {why}. Leave it out.")
        settled = self.settled()
        if settled.alpha is not None and not 0.0 < settled.alpha <= 1.0:
            raise ValueError(f"sync.alpha must be in (0, 1], got {settled.alpha}: at 0 the reference would never move.")
        if self.average == "bema":
            assert settled.lag is not None and settled.ema_power is not None and settled.bias_power is not None
            given = settled.lag, settled.ema_power, settled.bias_power
            if not all(0.0 <= value < math.inf for value in given):
                raise ValueError(
                    f"sync.lag, .ema_power and .bias_power must be finite and cannot be negative, got {settled.lag}, "
                    f"{settled.ema_power} and {settled.bias_power}."
                )


_OPEN = {"alpha": 0.6, "ema_power": 0.5, "bias_power": 0.2, "lag": 10.0}
"""Fields of SyncConfig that may be left open, and their values then, if they are used."""
_TAKES: dict[str, tuple[str, ...]] = {"ema": ("alpha",), "bema": ("ema_power", "bias_power", "lag")}
"""The fields that each average uses."""
