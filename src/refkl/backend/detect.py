"""Detection of the backend of a model or a process, and a check that it is the configured one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from refkl.backend.modules import is_engine, unwrap
from refkl.backend.zero import active_zero3_config, is_partitioned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator


@dataclass(frozen=True)
class Backend:
    """The backend of a policy, and its number of processes."""

    name: str
    """"plain", "ddp", "zero1", "zero2", "zero3", "fsdp1" or "fsdp2"."""
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.name} on {self.processes} process{'es' if self.processes > 1 else ''}"


def detect(policy: nn.Module | None = None, accelerator: Accelerator | None = None) -> Backend:
    """Detect the backend of a policy, from its wrappers, its parameters, and the accelerator that will prepare it."""
    processes = accelerator.num_processes if accelerator is not None else _world_size()
    if policy is not None:
        parameters = list(unwrap(policy).parameters())
        if any(is_partitioned(p) for p in parameters):
            return Backend("zero3", processes)
        if any(isinstance(p, DTensor) for p in parameters):
            return Backend("fsdp2", processes)
        if any(isinstance(m, FullyShardedDataParallel) for m in policy.modules()):
            return Backend("fsdp1", processes)
        if is_engine(policy):
            return Backend(f"zero{policy.zero_optimization_stage()}", processes)  # type: ignore[operator]
    if active_zero3_config(accelerator) is not None:
        return Backend("zero3", processes)
    state = accelerator.state if accelerator is not None else None
    if state is None and AcceleratorState._shared_state:
        state = AcceleratorState()
    if state is not None:
        if state.distributed_type == DistributedType.DEEPSPEED:
            return Backend(f"zero{state.deepspeed_plugin.zero_stage}", processes)
        if state.distributed_type == DistributedType.FSDP:
            return Backend(f"fsdp{state.fsdp_plugin.fsdp_version}", processes)
    return Backend("ddp" if processes > 1 else "plain", processes)


def check_launch(
    found: Backend,
    *,
    expected: str | None = None,
    processes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Refuse a launch that would not train what was configured.

    A wrong launch often exits 0: two processes that train separately, ZeRO that became DDP, FSDP that became DDP on
    CPU.

    Args:
        found: the backend of this process.
        expected: the backend in the run's configuration, if any.
        processes: the number of processes in the run's configuration, if any.
        environment: os.environ, in which launchers leave their settings.

    Raises:
        ValueError: the launch differs; the message says what was asked, what was found, and what to do.
    """
    env = os.environ if environment is None else environment
    cpu_hint = (
        " ACCELERATE_USE_CPU is set, which makes accelerate ignore DeepSpeed and FSDP: unset it, and set "
        "trainer.use_cpu instead."
        if env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        else ""
    )
    launched = int(env.get("WORLD_SIZE", "1"))
    if launched != found.processes:
        raise ValueError(
            f"The launcher started {launched} processes but {found.processes} work together here: each would train "
            "separately. On a machine without a GPU set trainer.use_cpu: true." + cpu_hint
        )
    if processes is not None and processes != found.processes:
        raise ValueError(
            f"The configuration asks for {processes} processes (launch.processes) but the launch gave "
            f"{found.processes}. Pass --num_processes {processes} to accelerate launch, or --num_gpus to deepspeed. On "
            "a CPU, use accelerate's --multi_gpu too: its --cpu starts a single process."
        )
    for variable, kind in (("ACCELERATE_USE_DEEPSPEED", "zero"), ("ACCELERATE_USE_FSDP", "fsdp")):
        if env.get(variable, "").lower() in ("1", "true") and not found.name.startswith(kind):
            raise ValueError(
                f"The launch asked for {'DeepSpeed' if kind == 'zero' else 'FSDP'} ({variable} is set) but got "
                f"{found}: accelerate fell back without a warning.{cpu_hint}"
                + (" accelerate does not run FSDP without a GPU: use ZeRO or DDP." if kind == "fsdp" else "")
            )
    if expected is not None and expected != found.name:
        raise ValueError(
            f"The configuration asks for {expected} (launch.backend) but the launch gave {found}. Start it with the "
            f"accelerate configuration for that backend from launch/accelerate/, or change launch.backend.{cpu_hint}"
        )


def _world_size() -> int:
    if PartialState._shared_state:
        return PartialState().num_processes
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
