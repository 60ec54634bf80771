"""What memory tensors take, by counting: every storage that some tensor of the process lives in, once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import UntypedStorage, nn
from torch.distributed.tensor import DTensor

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "llama": {"small": {}, "large": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5}},
    "gpt2": {"small": {}, "large": {"n_embd": 128, "n_layer": 5}},
}
"""What the tiny models of support.py are made with, to be counted."""


@contextmanager
def counting(policy: nn.Module) -> Iterator[Callable[[], int]]:
    """Gives a function that counts the bytes of storages that were not there when this was opened.

    What a policy's own forward left gathered must have been dropped, then and before each count: an address that was
    freed is given out anew. Any other that was in use then stays so.
    """
    gc.collect()
    before = _storages(gc.get_objects())

    def count() -> int:
        gc.collect()
        now = _storages([*gc.get_objects(), *policy.parameters(), *policy.buffers()])
        return sum(storage.nbytes() for address, storage in now.items() if address not in before)

    gc.freeze()  # half a million objects need not be looked at again
    try:
        yield count
    finally:
        gc.unfreeze()


def _storages(things: Iterable[Any]) -> dict[int, UntypedStorage]:
    found: dict[int, UntypedStorage] = {}
    for thing in things:
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = (thing.to_local() if isinstance(thing, DTensor) else thing).untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage
    return found
