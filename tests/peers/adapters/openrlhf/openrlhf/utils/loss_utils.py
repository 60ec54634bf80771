"""OpenRLHF's names for what refkl divides by: the counts of a whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

import refkl


def get_loss_batch_info(strategy: object, loss_mask: Tensor) -> dict[str, Any]:
    return _info([loss_mask])


def iter_grad_accum_global_norm(
    data_iter: Iterable[Any], strategy: object, accumulated_gradient: int, mask_fn: Callable[[Any], Tensor]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    window = list(data_iter)
    assert len(window) == accumulated_gradient  # the tests feed one optimizer step
    info = _info([mask_fn(item) for item in window], accumulated_gradient)
    for item in window:
        yield item, info


def _info(masks: list[Tensor], steps: int = 1) -> dict[str, Any]:
    # Divided by the steps because the loop's backward divides by them too: see `global_normalizer`.
    return {
        "dp_size": 1,
        "batch_num_tokens": refkl.global_normalizer(masks, "token-mean") / steps,
        "global_batch_size": refkl.global_normalizer(masks, "seq-mean-token-mean") / steps,
    }
