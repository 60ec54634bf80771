"""Weights from a folder instead of from the policy in memory."""

from __future__ import annotations

import copy

import torch
from torch import nn

from refkl.backend import base_model
from refkl.messages import nearest
from refkl.reference.request import BuildRequest


def source_folder(request: BuildRequest) -> str:
    """The folder or hub name that the reference's weights are to be read from.

    Raises:
        ValueError: "pretrained" was asked for, or is needed, and the policy was not loaded from anywhere.
    """
    source = request.config.source
    if source not in ("policy", "pretrained"):
        return source
    name = base_model(request.policy).config._name_or_path  # type: ignore[union-attr]
    if not name:
        raise ValueError(
            "The reference's weights are to be read from where the policy was loaded, but the policy was made from a "
            "config. Save it with save_pretrained and load it again, or set reference.source to a model folder."
        )
    return str(name)


def load_pretrained(request: BuildRequest, folder: str, dtype: torch.dtype | None) -> nn.Module:
    """The model in `folder`, of the policy's class, in `dtype` (by default the policy's) and with its attention.

    Raises:
        ValueError: no such model there.
    """
    base = base_model(request.policy)
    # Rotary scaling, attention windows and the like are part of the function, and may be other ones on disk.
    same = request.config.source in ("policy", "pretrained")
    config = {"config": copy.deepcopy(base.config)} if same else {}
    try:
        model: nn.Module = type(base).from_pretrained(  # type: ignore[attr-defined]
            folder,
            dtype=dtype or next(base.parameters()).dtype,
            attn_implementation=base.config._attn_implementation,  # type: ignore[union-attr]
            **config,
        )
    except OSError as error:
        raise ValueError(
            f"The reference cannot be loaded from {folder!r}: {str(error).splitlines()[0]} Set reference.source to a "
            f"model folder.{nearest(folder, ('policy', 'base', 'pretrained'))}"
        ) from None
    return model
