"""The tokens of a batch in one row: each different prompt once, then each row's completion, and no padding.

Notation: B rows of T tokens, N tokens in the one row, M of them that predict, K columns that hold scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refkl.types import TokenBatch


@dataclass(frozen=True)
class Segment:
    """A run of tokens of the one row."""

    start: int
    length: int
    parent: int = -1
    """Of a completion: which prompt it continues."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a batch are in the one row."""

    input_ids: Tensor
    """[1, N]"""
    position_ids: Tensor
    """[1, N]"""
    keep: Tensor
    """[M] the tokens that predict: the last of each prompt, then all of the completions."""
    at: Tensor
    """[B, K] which of `keep` predicts the token in column k; 0 where none is scored."""
    prompts: list[Segment]
    completions: list[Segment]

    @property
    def tokens(self) -> int:
        """N."""
        return self.input_ids.shape[1]

    def longest(self) -> int:
        """Tokens of the longest row."""
        ends = [self.prompts[c.parent].length + c.length for c in self.completions]
        return max([*ends, *(p.length for p in self.prompts)])


def lay_out(batch: TokenBatch, columns: Tensor) -> Layout | None:
    """The tokens of a batch in one row; None where rows have holes, or nothing is scored.

    Args:
        batch: of text alone.
        columns: [K] where some row has a scored token.
    """
    real, scored = batch.attention_mask.bool(), batch.completion_mask
    rows = scored.any(1).nonzero()[:, 0]
    if not len(rows):
        return None
    real, of_scored, ids = real[rows], scored[rows].long(), batch.input_ids[rows]
    width = ids.shape[1]
    begin = real.long().argmax(1)
    first = of_scored.argmax(1)
    last = width - 1 - of_scored.flip(1).argmax(1)
    within = torch.arange(width, device=ids.device)
    inside = (within >= begin[:, None]) & (within <= last[:, None])
    if bool((inside & ~real).any()):
        return None
    positions = real.long().cumsum(1) - 1 if batch.position_ids is None else batch.position_ids[rows]
    prompt = (within >= begin[:, None]) & (within < first[:, None])

    # Prompts to the right edge, so that equal ones are equal rows whatever is around them.
    shift = (within[None] + first[:, None] - width).clamp(min=0)
    there = prompt.gather(1, shift) & (within[None] + first[:, None] - width >= 0)
    keys = torch.cat([x.gather(1, shift).masked_fill(~there, -1) for x in (ids, positions)], 1)
    _, parent = torch.unique(keys, dim=0, return_inverse=True)
    order = torch.argsort(parent, stable=True)
    rows, parent = rows[order], parent[order]
    count = int(parent[-1]) + 1
    begin, first, last = begin[order], first[order], last[order]
    of_prompt = torch.searchsorted(parent, torch.arange(count, device=ids.device))  # each prompt's first row
    spans = torch.stack([begin, first, last, parent], 1).tolist()
    chosen = of_prompt.tolist()

    prompts, completions, at_row, at_column = [], [], [], []
    start = 0
    for row in chosen:
        prompts.append(Segment(start, spans[row][1] - spans[row][0]))
        at_row.append(torch.full((prompts[-1].length,), row))
        at_column.append(torch.arange(spans[row][0], spans[row][1]))
        start += prompts[-1].length
    for row, (_, one, two, of) in enumerate(spans):
        completions.append(Segment(start, two - one, of))
        at_row.append(torch.full((two - one,), row))
        at_column.append(torch.arange(one, two))
        start += two - one
    source, column = torch.cat(at_row).to(ids.device), torch.cat(at_column).to(ids.device)
    source = order[source]

    # keep: prompts' ends, then completions' tokens; `own[r]` is where those of row r begin.
    ends = torch.tensor([p.start + p.length - 1 for p in prompts], device=ids.device)
    tokens = start
    first_completion = tokens - sum(c.length for c in completions)
    keep = torch.cat([ends, torch.arange(first_completion, tokens, device=ids.device)])
    own = torch.tensor([c.start for c in completions], device=ids.device) - first_completion + count
    offset = columns[None] - first[:, None]  # 0 is predicted by the prompt
    predicts = torch.where(offset == 0, parent[:, None], own[:, None] + offset - 1)
    at = torch.zeros(batch.input_ids.shape[0], len(columns), dtype=torch.long, device=ids.device)
    at[rows] = torch.where(scored[rows][:, columns], predicts, 0)
    return Layout(ids[source, column][None], positions[source, column][None], keep, at, prompts, completions)
