"""TRL's `precompute_ref_log_probs`: the reference scores the data before training, and is then freed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from refkl.config import ReferenceConfig
from refkl.reference import Reference
from refkl.reference.cached.reference import CachedReference
from refkl.types import TokenBatch

logger = logging.get_logger(__name__)

FOLDER = "_reference_scores"
"""The folder inside the output folder that keeps the scores, unless reference.cache names another. The Trainer does not
upload names that begin with an underscore."""


class Part(NamedTuple):
    """A data set to score before training."""

    data: Any
    """A map-style data set of `datasets`."""
    name: str
    """"train", "eval" or the key of an evaluation set."""
    batch_size: int


def with_cache(reference: str | ReferenceConfig | Reference, output_dir: str) -> ReferenceConfig | Reference:
    """Return the reference that was asked for, with a cache: its own, or one in the output folder."""
    folder = str(Path(output_dir) / FOLDER)
    if isinstance(reference, Reference):
        return reference if isinstance(reference, CachedReference) else CachedReference(reference, folder)
    config = ReferenceConfig(strategy=reference) if isinstance(reference, str) else reference
    return replace(config, cache=folder) if config.cache is None else config


class Precompute(TrainerCallback):
    """Fills the reference's cache when training begins, once the policy is where it trains."""

    def __init__(
        self,
        reference: Reference,
        parts: Sequence[Part],
        batches: Callable[[Part], Iterable[TokenBatch]],
        *,
        free: bool,
    ) -> None:
        self.reference, self.parts, self.batches, self.free = reference, parts, batches, free

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score all data sets, and free the reference's weights if they are not needed afterwards."""
        if self.reference.freed:
            return
        # In one call: each row must be found to belong in a cache before the weights are gone.
        self.reference.fill(chain.from_iterable(map(self.batches, self.parts)), free=self.free)


def batches_of(part: Part, collator: Any, args: Any, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """Yield this rank's micro-batches of a data set, in its order."""
    own = part.data.select(range(accelerator.process_index, len(part.data), accelerator.num_processes))
    loader = DataLoader(
        own,
        batch_size=part.batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and accelerator.device.type == "cuda",
        generator=torch.Generator(),  # a DataLoader draws a seed, and training draws from the global generator
    )
    shown = f"Computing reference log probs for {part.name} dataset"
    yield from logging.tqdm(loader, desc=shown, disable=args.disable_tqdm or not accelerator.is_main_process)
