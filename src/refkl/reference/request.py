"""The request that a strategy answers: which policy, which configuration, on which backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from refkl.backend import Backend, learned_prompt
from refkl.config import ReferenceConfig
from refkl.reference.cost import Shape, Step, shape_of
from refkl.types import TokenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class BuildRequest:
    """The policy and settings that a strategy is asked to hold a reference for."""

    policy: nn.Module
    """Wrapped or not, sharded or not."""
    config: ReferenceConfig
    """The configuration that was asked for."""
    backend: Backend
    """The backend that the policy runs on, or will."""
    accelerator: Accelerator | None
    """The one that prepares the policy, if there is one."""
    step: Step = field(default_factory=Step)
    """The tokens that are scored per step; without it a cost counts only the bytes held."""
    planned: bool = False
    """True if the policy is a plan, without weights: its adapter is fresh."""
    memory: int | None = None
    """Bytes of a device, for a plan; in a run the device is asked."""
    calibration: TokenBatch | Iterable[TokenBatch] | None = None
    """For a quantised reference: what its floor is measured on; None takes what is scored first."""
    options: Any = None
    """The strategy's own settings: an instance of its `Options`, filled from `config.options`; None if it has none."""

    @property
    def device(self) -> torch.device:
        """The device that the policy runs on, or will once the accelerator has prepared it."""
        return next(self.policy.parameters()).device if self.accelerator is None else self.accelerator.device

    @cached_property
    def shape(self) -> Shape:
        """The shape that a cost is counted from."""
        on_cpu = next(self.policy.parameters()).device.type == "cpu"
        stays = self.accelerator is None or self.accelerator.device.type == "cpu"
        memory = self.memory
        if memory is None and not (on_cpu and stays):
            memory = device_memory(self.device)
        return shape_of(self.policy, self.backend, self.step, on_host=on_cpu and stays, memory=memory)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for what is not known."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def held_in_place(request: BuildRequest) -> str | None:
    """A sentence for a strategy that makes a copy, where the reference is the policy's bare base, which needs none."""
    if request.config.source == "base":
        return "reference.source is 'base': the policy holds that itself, and strategy 'adapter' needs no copy of it."
    if request.config.source == "policy" and (prompt := learned_prompt(request.policy)) is not None:
        return (
            f"a learned prompt ({prompt.kind}) is no part of the reference, which is the bare base without it: the "
            "policy holds that itself, and strategy 'adapter' needs no copy of it."
        )
    return None
