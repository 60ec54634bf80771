"""Freezing of parameters by module path, with requires_grad.

Wrapping a frozen layer in no_grad would cut the gradient to everything below it. With requires_grad=False, the layer's
own weights get no gradient, but the gradient still flows through the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from refkl.messages import nearest


def freeze(module: nn.Module, patterns: str | Sequence[str] | None = None) -> list[str]:
    """Set requires_grad=False on the parameters that match the patterns, and return their names.

    Args:
        module: the model.
        patterns: module (or parameter) paths. A path matches that module and everything below it: "model.layers.1"
            freezes layer 1 and not layer 10. `*` matches any characters except a dot, as in "model.layers.*.mlp". None
            freezes every parameter.

    Raises:
        ValueError: a pattern matches no parameter; the message names the nearest path. Nothing is frozen then.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if patterns is None:
        chosen = list(parameters)
    else:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        chosen_set: set[str] = set()
        for pattern in wanted:
            matched = {name for name in parameters if _matches(pattern, name)}
            if not matched:
                paths = {path for name in parameters for path in _ancestors(name)}
                raise ValueError(
                    f"freeze pattern {pattern!r} matches no parameter of {type(module).__name__}."
                    f"{nearest(pattern, paths)} A pattern is a module path such as 'model.layers.0'."
                )
            chosen_set |= matched
        chosen = [name for name in parameters if name in chosen_set]
    for name in chosen:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None  # an optimizer that already holds the parameter would update it again
    return chosen


def frozen_parameters(module: nn.Module) -> list[str]:
    """Return the names of the frozen parameters, in the module's order."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters, each once, to pass to the optimizer."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _matches(pattern: str, name: str) -> bool:
    """Return True if `pattern` matches the parameter's path or a parent module's path, part by part."""
    want, have = pattern.split("."), name.split(".")
    return len(want) <= len(have) and all(fnmatchcase(h, w) for w, h in zip(want, have, strict=False))
