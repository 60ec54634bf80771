"""transformers' Trainer: the methods that refkl overrides are checked once, when refkl.hf is imported.

A transformers that has changed one of them gives one message, instead of a TypeError during training.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import version

from transformers import Trainer

METHODS: dict[str, tuple[str, ...]] = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "log": ("logs", "start_time"),
    "_prepare_inputs": ("inputs",),
    "_run_epoch": ("model", "epoch", "train_dataloader"),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
"""The first parameters of each method, after self."""


def check_transformers() -> None:
    """Raise ImportError if refkl's trainers do not work with the installed transformers."""
    if changed := changed_methods(Trainer, METHODS):
        raise ImportError(
            f"refkl's trainers override methods of transformers' Trainer, which differ in transformers "
            f"{version('transformers')}: {'; '.join(changed)}. Install a version that docs/versions.md lists, or use "
            "refkl without its trainers."
        )


def changed_methods(trainer: type, methods: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Describe each method of a trainer that is missing, or whose first parameters are not these."""
    found = []
    for method, parameters in methods.items():
        if (function := getattr(trainer, method, None)) is None:
            found.append(f"{trainer.__name__} has no {method}")
            continue
        taken = inspect.signature(function).parameters.values()
        has = tuple(p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))[1 : len(parameters) + 1]
        # If another package has wrapped the method, the wrapper takes the other parameters by **kwargs.
        expected = parameters[: len(has)] if any(p.kind is p.VAR_KEYWORD for p in taken) else parameters
        if has != expected:
            found.append(f"{trainer.__name__}.{method} takes {', '.join(has)} where it took {', '.join(parameters)}")
    return found
