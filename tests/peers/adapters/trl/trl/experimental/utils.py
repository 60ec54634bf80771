"""TRL's name for a frozen copy of a model."""

from __future__ import annotations

from torch import nn

import refkl
from trl._absent import absent as __getattr__

__all__ = ["__getattr__", "create_reference_model"]


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None) -> nn.Module:
    """A clone, which shares what does not train. To share layers is to freeze them first, with all that is below."""
    if num_shared_layers is not None:
        names = [name for name, _ in model.named_parameters()]
        above = next(i for i, name in enumerate(names) if f".h.{num_shared_layers}." in name)
        refkl.freeze(model, sorted({name.rpartition(".")[0] for name in names[:above]}))
    return refkl.build_reference(model, "clone").model  # type: ignore[attr-defined]
