"""DeepSpeed ZeRO-3: each rank holds a part of every parameter. Only this file imports deepspeed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_deepspeed_available
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from accelerate import Accelerator

_RANK_0_ALONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Variable that, if true, lets transformers read weights only on a node's first rank; FSDP then sends them to the
others."""


def is_partitioned(parameter: Tensor) -> bool:
    """Return True if a parameter is under ZeRO-3: this rank holds its part in `ds_tensor`, and the parameter is a
    placeholder of size 0."""
    return hasattr(parameter, "ds_id")


def local_shard(parameter: Tensor) -> Tensor:
    """Return this rank's data of a parameter: its ZeRO-3 partition (flat, padded), its DTensor part, or all."""
    if is_partitioned(parameter):
        return parameter.ds_tensor.data  # type: ignore[attr-defined]
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, not of the placeholder."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


@contextmanager
def gathered(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Gather the whole parameters on every rank while open; collective. With `write`, rank 0's changes are kept."""
    sharded = [p for p in parameters if is_partitioned(p)]
    if not sharded:
        yield
        return
    import deepspeed

    # Without modifier_rank, changes made inside are dropped on exit.
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def release(parameters: Iterable[Tensor]) -> None:
    """Drop gathered copies that a forward left behind, so that the next forward reads only the partitions."""
    for parameter in parameters:
        if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]


def active_zero3_config(accelerator: Accelerator | None) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of this run if it is ZeRO-3, else None."""
    from accelerate.state import AcceleratorState

    if not is_deepspeed_available():
        return None
    if accelerator is not None:
        plugin = accelerator.state.deepspeed_plugin
    else:
        plugin = AcceleratorState().deepspeed_plugin if AcceleratorState._shared_state else None
    return plugin.deepspeed_config if plugin is not None and plugin.zero_stage == 3 else None


def run_config(policy: nn.Module, accelerator: Accelerator | None) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of this run, of any stage: the accelerator's, or the policy engine's."""
    from accelerate.state import AcceleratorState

    if not is_deepspeed_available():
        return None
    state = accelerator.state if accelerator is not None else None
    if state is None and AcceleratorState._shared_state:
        state = AcceleratorState()
    if state is not None and state.deepspeed_plugin is not None:
        return state.deepspeed_plugin.deepspeed_config
    engine = getattr(policy, "_config", None)
    return getattr(engine, "_param_dict", None)


def inference_config(training: dict[str, Any], *, offload: bool = False) -> dict[str, Any]:
    """Return a ZeRO-3 configuration for a model that never trains, derived from the run's.

    It has no optimizer, whatever stage the run has. No parameter stays gathered and none is kept for reuse: each
    forward reads the partitions, so an update only has to change those. Parameter offload stays as the user set it; if
    it is not set, `offload` puts the partitions into host memory.
    """
    stage = training.get("zero_optimization", {})
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    if stage.get("offload_param", {}).get("device", "none") not in (None, "none"):
        zero["offload_param"] = copy.deepcopy(stage["offload_param"])
    elif offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    # The accelerator's own copy may still say "auto" before it has prepared a model.
    for key in ("bf16", "fp16"):
        if training.get(key, {}).get("enabled") is True:
            config[key] = {"enabled": True}
    return config


@contextmanager
def transformers_zero3(config: dict[str, Any]) -> Iterator[None]:
    """Let from_pretrained partition weights as it loads them, under `config`; restore the run's setting on exit."""
    import transformers.integrations.deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    own = integration.HfDeepSpeedConfig(config)  # a local reference: transformers holds it weakly
    try:
        yield
    finally:
        del own
        integration._hf_deepspeed_config_weak_ref = before


@contextmanager
def loading_whole() -> Iterator[None]:
    """Let from_pretrained load whole weights on every rank, also under ZeRO-3 and FSDP, for a model that these do not
    wrap."""
    import transformers.integrations.deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    efficient = os.environ.pop(_RANK_0_ALONE, None)
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before
        if efficient is not None:
            os.environ[_RANK_0_ALONE] = efficient


def partitioned(kind: type[nn.Module], config: Any, dtype: torch.dtype, zero: dict[str, Any]) -> nn.Module:
    """Make a transformers model from its configuration, partitioned from the start, with arbitrary weights."""
    import deepspeed
    from transformers import initialization

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with initialization.no_init_weights(), deepspeed.zero.Init(config_dict_or_path=zero):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # type: ignore[operator]
    return model


def inference_engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Return a DeepSpeed engine without optimizer around a partitioned model, in eval mode."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def set_micro_batch(accelerator: Accelerator, size: int) -> None:
    """Set the micro-batch size that accelerate takes from a data loader, for a model that is prepared without one."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.deepspeed_config.get("train_micro_batch_size_per_gpu") == "auto":
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = size


def check_can_save(accelerator: Accelerator) -> None:
    """Raise ValueError for a ZeRO-3 run that could not save its trained model: DeepSpeed only warns, at the end."""
    config = active_zero3_config(accelerator)
    if config is not None and not config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "Under ZeRO-3 the trained model is written only if its parts are gathered. Set zero3_save_16bit_model: "
            "true in accelerate's configuration, or stage3_gather_16bit_weights_on_model_save in the DeepSpeed JSON."
        )
