"""TRL's names for log-probabilities and entropies of logits, and for a PEFT policy with its adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import Tensor

import refkl
from refkl import ReferenceConfig
from trl._absent import absent as __getattr__

__all__ = ["__getattr__", "entropy_from_logits", "selective_log_softmax", "use_adapter"]


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """index: [...], or [..., K] for K tokens of each row."""
    each = index if index.dim() == logits.dim() else index[..., None]
    rows = logits[..., None, :].expand(*each.shape, logits.shape[-1]).flatten(0, -2)
    mask = None if row_mask is None else row_mask[..., None].expand(each.shape).flatten().bool()
    return refkl.kl.token_logp(rows, each.flatten(), temperature=temperature, mask=mask).logp.view(index.shape)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    found = refkl.kl.token_logp(rows, rows.new_zeros(len(rows)).long(), entropy=True).entropy
    assert found is not None
    return found.view(logits.shape[:-1])


@contextmanager
def use_adapter(model: PeftModel, adapter_name: str | None) -> Iterator[None]:
    """Without a name the reference that is the policy's bare base; with the active adapter's the policy as it is."""
    if adapter_name is not None:
        if adapter_name != model.active_adapter:
            raise NotImplementedError("refkl never switches to another adapter of the policy")
        yield
        return
    reference = refkl.build_reference(model, ReferenceConfig(strategy="adapter", source="base"))
    # What `reference.score` enters around the policy's forward.
    with reference.activate():
        yield
