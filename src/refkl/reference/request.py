"""The request that a strategy answers: a policy, a configuration and a backend."""

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
    """The policy, wrapped or not, sharded or not."""
    config: ReferenceConfig
    """The configuration that was asked for."""
    backend: Backend
    """The backend that the policy runs on, or will run on."""
    accelerator: Accelerator | None
    """The accelerator that prepares the policy, if there is one."""
    step: Step = field(default_factory=Step)
    """The tokens that are scored per step; without it a cost counts only the bytes held."""
    planned: bool = False
    """True if the policy is a plan, without weights: its adapter is fresh."""
    memory: int | None = None
    """Bytes of the device's memory, for a plan; in a run the device reports them."""
    calibration: TokenBatch | Iterable[TokenBatch] | None = None
    """Tokens on which the floor of a quantised reference is measured; None uses the first batch that is scored."""
    options: Any = None
    """The strategy's own settings: an instance of its `Options`, filled from `config.options`; None if it has none."""

    @property
    def device(self) -> torch.device:
        """The device that the policy runs on, or will run on once the accelerator has prepared it."""
        return next(self.policy.parameters()).device if self.accelerator is None else self.accelerator.device

    @cached_property
    def shape(self) -> Shape:
        """The shape from which a cost is computed."""
        on_cpu = next(self.policy.parameters()).device.type == "cpu"
        stays = self.accelerator is None or self.accelerator.device.type == "cpu"
        memory = self.memory
        if memory is None and not (on_cpu and stays):
            memory = device_memory(self.device)
        return shape_of(self.policy, self.backend, self.step, on_host=on_cpu and stays, memory=memory)


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def held_in_place(request: BuildRequest) -> str | None:
    """Return why a copy is not needed if the reference is the policy's bare base, as a sentence; else None."""
    if request.config.source == "base":
        return "reference.source is 'base': the policy holds its base itself, and strategy 'adapter' needs no copy."
    if request.config.source == "policy" and (prompt := learned_prompt(request.policy)) is not None:
        return (
            f"a learned prompt ({prompt.kind}) is not part of the reference, which is the bare base: the policy holds "
            "its base itself, and strategy 'adapter' needs no copy."
        )
    return None
