"""When the reference moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refkl.config.options import check_offered


@dataclass(frozen=True, kw_only=True)
class SettledSync:
    """What a SyncConfig means where it leaves a field open; None for what it has no use for."""

    alpha: float | None
    ema_power: float | None
    bias_power: float | None
    lag: float | None


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """When the reference moves, and how far.

    A field that the others leave without a use is refused when it is set. A config is frozen and keeps what it was
    given: a field that is left open stays None, and `settled` says what it means.
    """

    every: int | None = 512
    """Optimizer steps between two syncs (not micro-batches), 1 for a moving average; None: only when `max_kl` says."""
    average: Literal["ema", "bema"] = "ema"
    """"ema": theta_ref <- (1 - alpha) theta_ref + alpha theta, with one `alpha`. "bema": a moving average whose alpha
    decays, and which is corrected for its lag (Block and Zhang, arXiv:2508.00180); holds two copies in fp32 more."""
    alpha: float | None = None
    """For "ema". 1 copies the policy (TR-DPO hard); None is 0.6, every 512 steps the soft variant's recommendation
    (Gorbatovski et al., arXiv:2404.09656)."""
    ema_power: float | None = None
    """For "bema": alpha at step t is (lag + t) to the power of minus this. None is 0.5."""
    bias_power: float | None = None
    """For "bema": the correction at step t, theta - theta_first, is weighed by (lag + t) to the power of minus this.
    None is 0.2."""
    lag: float | None = None
    """For "bema": how many steps old it begins. None is 10."""
    lora: Literal["factors", "product"] = "factors"
    """What of a LoRA policy's layers is averaged with alpha < 1: "factors", A and B each by itself, or "product", the
    change of weight B · A that they make, exactly; the reference's rank then grows with each sync."""
    lora_rank: int | None = None
    """For lora "product": the rank that the reference is cut back to at each sync, as the best approximation. None
    keeps the average exact, and its rank no higher than the smaller side of a layer's weight."""
    warmup: int = 0
    """Optimizer steps before any of it; `every` and "bema" count from there."""
    max_kl: float | None = None
    """Nats per token: when the KL to the reference passes this, the reference becomes a copy of the policy, whatever
    `every` says (ProRL's reset, arXiv:2505.24864)."""
    reset_optimizer: bool = False
    """At such a reset, also the optimizer's state: its moments are set to 0, as at the start."""
    first_kl_every: int | None = None
    """Optimizer steps between two measurements of the KL to the reference as it was first, on the tokens of that step:
    an anchor that moves hides how far it has gone. Costs a copy of what moves (none for a fresh adapter)."""

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
            raise ValueError("sync.every is None and sync.max_kl is not set: the reference would never move.")
        if self.warmup < 0:
            raise ValueError(f"sync.warmup counts optimizer steps and cannot be negative, got {self.warmup}.")
        if self.max_kl is not None and not self.max_kl > 0.0:
            raise ValueError(f"sync.max_kl is in nats per token and must be positive, got {self.max_kl}.")
        if self.reset_optimizer and self.max_kl is None:
            raise ValueError("sync.reset_optimizer is for the reset at sync.max_kl, which is not set. Leave it out.")
        self._check_average()

    def settled(self) -> SettledSync:
        """The fields that may be left open, as `every` and `average` settle them."""
        names = () if self.every is None else _TAKES[self.average]
        given = {name: getattr(self, name) for name in _OPEN}
        values = {name: _OPEN[name] if name in names and value is None else value for name, value in given.items()}
        return SettledSync(**values)

    def _check_average(self) -> None:
        if self.every is None and self.average != "ema":
            raise ValueError("sync.average 'bema' moves the reference every so many steps: set sync.every.")
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
            if not (settled.lag >= 0.0 and settled.ema_power >= 0.0 and settled.bias_power >= 0.0):
                raise ValueError(
                    f"sync.lag, .ema_power and .bias_power cannot be negative, got {settled.lag}, {settled.ema_power} "
                    f"and {settled.bias_power}."
                )


_OPEN = {"alpha": 0.6, "ema_power": 0.5, "bias_power": 0.2, "lag": 10.0}
"""Fields of SyncConfig that may be left open, and what they are then, where they are of use."""
_TAKES: dict[str, tuple[str, ...]] = {"ema": ("alpha",), "bema": ("ema_power", "bias_power", "lag")}
"""Which of them each average takes."""
