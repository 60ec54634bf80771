"""Wrapped modules: the modules inside, canonical names of their parameters, and evaluation without side effects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

_OUTER_PREFIX = re.compile(r"^(?:module\.)+")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")
# If LoRA adapts two parameters of one module, one adapter is inside the other's base_layer: its name stays.
_PEFT_INNER = re.compile(r"\.(?:(?:token_adapter\.)?base_layer|original_module)(?=\.|$)(?!(?:\.base_layer)*\.lora_)")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel, FSDP1, torch.compile and DeepSpeed wrappers; PEFT is left in
    place."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel | FullyShardedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model.get_submodule("_orig_mod")
        elif is_engine(model):
            model = model.get_submodule("module")
        else:
            return model


def is_engine(model: nn.Module) -> bool:
    """Return True if the model is a DeepSpeed engine, without importing deepspeed (which need not be installed)."""
    return _is_engine_class(type(model))  # type: ignore[arg-type]  # mypy compares the class with the instances' __hash__


@cache
def _is_engine_class(cls: type) -> bool:
    return any(t.__name__ == "DeepSpeedEngine" and t.__module__.startswith("deepspeed.") for t in cls.__mro__)


@cache
def canonical_name(name: str, *, prompt: bool = False) -> str:
    """Return a parameter's name in the bare model, without the parts that wrappers and PEFT add.

    Set `prompt` if the model has a learned prompt: PEFT then holds the model one level higher than under an adapter.
    """
    outer = _OUTER_PREFIX.sub("", _WRAPPERS.sub("", name))
    return _PEFT_INNER.sub("", outer.removeprefix("base_model.") if prompt else _PEFT_PREFIX.sub("", outer))


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, then persistent buffers, with canonical names; tied ones once."""
    prompt = "prompt_encoder" in unwrap(model)._modules
    modules, seen = _named_submodules(model), set()
    for prefix, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield canonical_name(prefix + name, prompt=prompt), parameter
    for prefix, module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                if name not in module._non_persistent_buffers_set:
                    yield canonical_name(prefix + name, prompt=prompt), buffer


def _named_submodules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `named_modules()` yields in the same order, with a dot after each name, in a third of its time."""
    found, seen, stack = [], set(), [("", model)]
    while stack:
        prefix, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((prefix, module))
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((f"{prefix}{name}.", child))
    return found


def submodules(model: nn.Module) -> list[nn.Module]:
    """Return the model and every module in it, once each.

    `modules()`, which builds names too, takes four times as long. A large adapter has thousands of modules, and each
    score visits all.
    """
    found, seen = [model], {model}
    for module in found:  # grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def parameters_in(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the modules' own parameters. A parameter that several modules share is repeated."""
    return (parameter for m in modules for parameter in m._parameters.values() if parameter is not None)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Make normal tensors, without grad, also inside `torch.inference_mode`, whose tensors can never be written or
    trained outside it. Nothing changes in other modes."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # leaving that mode also switches grad on
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every submodule to eval mode. Dropout is off, also if it is a float that a layer reads (attention_dropout).

    Each submodule's own mode is restored on exit, so that one left in eval inside a training model stays so.
    """
    changed = [(module, module.training) for module in submodules(model) if module.training != evaluates_as(module)]
    for module, training in changed:
        module.training = not training
    try:
        yield
    finally:
        for module, training in changed:
            module.training = training


def evaluates_as(module: nn.Module) -> bool:
    """Return the value of `training` during evaluation: False, except for quantised layers of bitsandbytes.

    Its 4-bit layers in eval mode, without gradients, on a processor with AVX-512 BF16, rewrite their weight in place,
    in a form that passes no gradient, even when they train again. Its 8-bit layers, on a CPU, compute another product
    in eval mode than in training, which would give a nonzero KL at step 0. Neither has dropout.
    """
    # mypy compares the class with the instances' __hash__.
    kind = _of_bitsandbytes(type(module))  # type: ignore[arg-type]
    return kind == "Linear4bit" or (kind == "Linear8bitLt" and module.training)


def eight_bit_layer(model: nn.Module) -> str | None:
    """Return the name of a layer that bitsandbytes holds in 8 bits; None if there is none."""
    found = (n for n, module in model.named_modules() if _of_bitsandbytes(type(module)) == "Linear8bitLt")  # type: ignore[arg-type]
    return next(found, None)


@cache
def _of_bitsandbytes(cls: type) -> str | None:
    """Return the name of bitsandbytes' quantised layer that a class is, or None. bitsandbytes need not be installed."""
    names = {base.__name__ for base in cls.__mro__ if base.__module__ == "bitsandbytes.nn.modules"}
    return next((name for name in ("Linear4bit", "Linear8bitLt") if name in names), None)


def dropout_rates(module: nn.Module) -> dict[str, float]:
    """Return the module's own dropout rates above 0.

    These are the rate of an nn.Dropout, and floats that a layer reads (attention_dropout), which a search for
    nn.Dropout misses.
    """
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return {"p": module.p} if module.p > 0 else {}
    return {key: v for key, v in vars(module).items() if "drop" in key and isinstance(v, float) and v > 0}


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside wrappers and PEFT."""
    inner = unwrap(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """Return the layers that the hidden states pass in sequence; None for a model without a list of them."""
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return None
    decoder = base.get_decoder()
    # A list inside another one belongs to a layer, such as its experts.
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len, default=None)
