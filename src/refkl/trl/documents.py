"""Batches that TRL's collator lays in one row (packing, padding_free), as one padded row per document.

Only some attention kernels keep documents in one row apart. refkl's scorer keeps rows apart with any kernel, and packs
them itself where that is exact, so nothing is lost by taking a row apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refkl.hf.observed_loss import IGNORED

_OF_ONE_ROW = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class Documents:
    """A collator whose batches have a document per row."""

    def __init__(self, collator: Callable[[Any], dict[str, Any]], pad_token_id: int) -> None:
        """Wrap `collator`. Batches that it pads itself are left as they are."""
        self.collator = collator
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Any) -> dict[str, Any]:
        return rows_of(self.collator(examples), self.pad_token_id)


def rows_of(batch: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """Return a batch with a document per row: input_ids, labels and attention_mask [D, T], padded on the right.

    A document begins where `position_ids` is 0. Documents of one token, such as the padding of pad_to_multiple_of, have
    nothing to predict and are left out, unless there are no others.

    Args:
        batch: input_ids, labels and position_ids [1, N], and what describes this row to a kernel. A batch with an
            attention_mask is returned as it is.
        pad_token_id: fills input_ids.

    Raises:
        ValueError: the batch has other entries, of which it is not known which document they belong to.
    """
    if "attention_mask" in batch or "position_ids" not in batch:
        return batch
    if other := sorted(batch.keys() - _OF_ONE_ROW - {"input_ids", "labels"}):
        raise ValueError(
            f"The batch holds documents in one row, and also {', '.join(other)}: which part of these belongs to which "
            "document is not known. Use a collator that pads, or one that gives input_ids, labels and position_ids."
        )
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([batch["input_ids"].numel()])])
    lengths = (ends - starts).tolist()
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    found = {name: _rows(batch[name].flatten(), lengths, fill) for name, fill in fills.items()}
    found["attention_mask"] = _rows(torch.ones_like(batch["input_ids"].flatten()), lengths, 0)
    return found


def _rows(flat: Tensor, lengths: list[int], fill: int) -> Tensor:
    """Return a tensor [N] as padded rows [D, T]."""
    documents = flat.split(lengths)
    kept = [document for document in documents if len(document) > 1] or [documents[0]]
    return pad_sequence(kept, batch_first=True, padding_value=fill)
