"""The computation of a model besides its weights and configuration: its modules, hooks and replaced forwards.

Two models with equal weights and configurations can differ in a replaced activation, a hook, or a user's forward. A
cache must tell them apart, or refuse code that it cannot see.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from refkl.backend import canonical_name, own_class
from refkl.backend.adapters import adapter_modules

_KNOWN = {"torch", "transformers", "peft", "accelerate", "deepspeed", "trl", "refkl", "bitsandbytes", "torchao"}
"""Packages whose code is identified by their versions, or changes no score."""


def structure(model: nn.Module) -> str:
    """Return a hash of the model's modules: their classes, settings and code, without adapters and wrappers.

    Raises:
        ValueError: a hook or a replaced forward is not from a known library, so its computation cannot be seen.
    """
    added = set(map(id, adapter_modules(model, copies=True)))
    found = {canonical_name(n): _described(n, m) for n, m in model.named_modules() if n and id(m) not in added}
    return hashlib.sha256("\n".join(f"{name} {what}" for name, what in sorted(found.items())).encode()).hexdigest()


def _described(name: str, module: nn.Module) -> str:
    for what, function in _put_before(module):
        if (package := _package(function)) not in _KNOWN:
            raise ValueError(
                f"{name} has a {what} of {package}: scores depend on its code, which reference.cache cannot see. "
                "Build the reference without cache, or put the change into a module's class."
            )
    cls = own_class(module)
    settings = "" if isinstance(module, _DropoutNd) else module.extra_repr()
    numbers = {k: v for k, v in vars(module).items() if type(v) is float and "drop" not in k}
    functions = {k: _qualified(v) for k, v in vars(module).items() if isinstance(v, types.FunctionType) and k[0] != "_"}
    functions.pop("forward", None)
    return f"{_qualified(cls)} {_code(cls)} {settings} {sorted(numbers.items())} {sorted(functions.items())}"


def _put_before(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the functions that run instead of, before and after the class's own forward."""
    if (forward := vars(module).get("forward")) is not None:
        yield "replaced forward", forward
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for hook in hooks.values():
            yield "forward hook", hook


def _package(function: Any) -> str:
    """Return the package in which a callable was defined, looking through partial, methods and objects."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    # functools.wraps copies the name of the wrapped function, but a wrapper's globals are its own.
    own = getattr(function, "__globals__", None)
    where = own["__name__"] if own is not None else type(function).__module__
    return str(where).split(".")[0]


def _qualified(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _code(cls: type) -> str:
    """Return a hash of the code of a class that is not in a known library; "" for other classes."""
    digest = hashlib.sha256()
    unknown = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in {*_KNOWN, "builtins"}]
    for base in unknown:
        for name, value in sorted(vars(base).items()):
            if isinstance(value, types.FunctionType):
                digest.update(f"{base.__qualname__}.{name}".encode())
                _hash_code(value.__code__, digest)
    return digest.hexdigest() if unknown else ""


def _hash_code(code: types.CodeType, digest: Any) -> None:
    digest.update(code.co_code)
    digest.update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _hash_code(constant, digest)
        else:
            digest.update(repr(constant).encode())
