"""The linear layers of a transformers model: nn.Linear, and GPT-2's Conv1D with its transposed weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from refkl.backend.adapters import adapter_parameters
from refkl.backend.modules import base_model
from refkl.backend.zero import full_shape


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that can be quantised: nn.Linear and GPT-2's Conv1D.

    Excluded are the output head, weights tied to an embedding, adapters, layers whose forward was replaced, and layers
    whose weight is packed or sharded.
    """
    base = base_model(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    looked_up = (m.weight for m in base.modules() if isinstance(m, nn.Embedding))
    kept = {id(weight) for weight in (*looked_up, *(() if head is None else head.parameters()))}
    kept |= adapter_parameters(model)
    for name, layer in base.named_modules():
        if type(layer).forward not in (nn.Linear.forward, Conv1D.forward) or "forward" in vars(layer):
            continue
        weight: Any = layer.weight
        if type(weight) is nn.Parameter and weight.is_floating_point() and id(weight) not in kept:
            yield name, layer


def matrix_shape(layer: nn.Module) -> torch.Size:
    """Return the shape [out, in] of a layer from `linear_layers`."""
    shape = full_shape(layer.weight)  # type: ignore[arg-type]
    return shape[::-1] if isinstance(layer, Conv1D) else shape
