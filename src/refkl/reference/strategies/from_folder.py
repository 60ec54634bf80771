"""Reference weights that are read from a folder instead of from the policy in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from refkl.backend import base_model
from refkl.loading import load_again, load_beside
from refkl.messages import nearest
from refkl.reference.request import BuildRequest


def source_folder(request: BuildRequest) -> str:
    """Return the folder or hub name from which the reference's weights are read.

    Raises:
        ValueError: "pretrained" was asked for, or is needed, but the policy was not loaded from a folder or the hub.
    """
    source = request.config.source
    if source not in ("policy", "pretrained"):
        return source
    name = base_model(request.policy).config._name_or_path  # type: ignore[union-attr]
    if not name:
        raise ValueError(
            "The reference's weights must be read from the folder that the policy was loaded from, but the policy was "
            "made from a config. Save it with save_pretrained and load it again, or set reference.source to a model "
            "folder."
        )
    return str(name)


def load_pretrained(request: BuildRequest, folder: str, dtype: torch.dtype | None) -> nn.Module:
    """Return the model in `folder`, in `dtype` (by default the policy's).

    A named folder may hold a model of another class. "pretrained" has the policy's class and configuration.

    Raises:
        ValueError: the folder has no such model, or one that cannot be scored on the policy's tokens.
    """
    base = base_model(request.policy)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"The reference cannot be loaded from {folder!r}: the policy is a {type(base).__name__}, and only a "
            "transformers model can be compared with a folder. Leave reference.source at 'policy'."
        )
    number, what = dtype or next(base.parameters()).dtype, f"The reference cannot be loaded from {folder!r}"
    try:
        if request.config.source in ("policy", "pretrained"):
            return load_again(base, what, dtype=number)
        return load_beside(base, folder, what, dtype=number)
    except ValueError as error:
        hint = "" if Path(folder).is_dir() else nearest(folder, ("policy", "base", "pretrained"))
        raise ValueError(
            f"{error} Set reference.source to the folder of a whole model with the policy's vocabulary.{hint}"
        ) from None
