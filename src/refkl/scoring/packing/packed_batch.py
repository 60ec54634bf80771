"""The tokens of a batch in one packed row: each distinct prompt once, then each row's completion, without padding.

Notation: B rows of T tokens, N tokens in the packed row, M of them that predict, K columns that hold scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refkl.types import TokenBatch


@dataclass(frozen=True)
class Segment:
    """Contiguous tokens of the packed row."""

    start: int
    length: int
    parent: int = -1
    """For a completion, the index of the prompt that it continues."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The tokens of a batch in one row, and the token that predicts each scored token."""

    input_ids: Tensor
    """[1, N]"""
    position_ids: Tensor
    """[1, N]"""
    keep: Tensor
    """[M] indices of the tokens that predict: the last of each prompt, then all of the completions."""
    at: Tensor
    """[B, K] index into `keep` of the token that predicts the one in column k; 0 where not scored."""
    prompts: list[Segment]
    completions: list[Segment]

    @property
    def tokens(self) -> int:
        """The number N of tokens in the packed row."""
        return self.input_ids.shape[1]

    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        ends = [self.prompts[c.parent].length + c.length for c in self.completions]
        return max([*ends, *(p.length for p in self.prompts)])


def scored_columns(batch: TokenBatch) -> Tensor:
    """Return the columns [K] in which some row has a scored token.

    If there are none, one column is returned, because every rank must run the forward.
    """
    columns = batch.completion_mask.any(0).nonzero()[:, 0]
    if columns.numel():
        return columns
    return torch.tensor([min(1, batch.input_ids.shape[1] - 1)], device=batch.input_ids.device)


def pack_tokens(batch: TokenBatch) -> PackedBatch | None:
    """Pack the tokens of a batch of text into one row; None if a row has padding inside, or nothing is scored."""
    real, scored, columns = batch.attention_mask.bool(), batch.completion_mask, scored_columns(batch)
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
    parent = _same_prompts((ids, positions), begin, first)
    order = torch.argsort(parent, stable=True)
    rows, parent, begin, first, last = (x[order] for x in (rows, parent, begin, first, last))
    prompts, completions, source, column = _segments(torch.stack([begin, first, last, parent], 1).tolist())
    source, column = order[source.to(ids.device)], column.to(ids.device)

    # keep: the last token of each prompt, then the completions' tokens. `own[r]` is the first of those of row r.
    tokens, count = len(source), len(prompts)
    after = prompts[-1].start + prompts[-1].length
    ends = torch.tensor([p.start + p.length - 1 for p in prompts], device=ids.device)
    keep = torch.cat([ends, torch.arange(after, tokens, device=ids.device)])
    own = torch.tensor([c.start for c in completions], device=ids.device) - after + count
    offset = columns[None] - first[:, None]  # 0 is predicted by the prompt
    predicts = torch.where(offset == 0, parent[:, None], own[:, None] + offset - 1)
    at = torch.zeros(batch.input_ids.shape[0], len(columns), dtype=torch.long, device=ids.device)
    at[rows] = torch.where(scored[rows][:, columns], predicts, 0)
    return PackedBatch(ids[source, column][None], positions[source, column][None], keep, at, prompts, completions)


def _same_prompts(values: tuple[Tensor, ...], begin: Tensor, first: Tensor) -> Tensor:
    """Return the number [B] of each row's prompt. Equal prompts have the same number.

    Args:
        values: [B, T] each; tokens and positions, which are equal if the prompts are.
        begin: [B] columns in which the prompts begin.
        first: [B] columns of the first scored tokens.
    """
    width = values[0].shape[1]
    # Shift prompts to the right edge, so that equal prompts are equal rows whatever surrounds them.
    shifted = torch.arange(width, device=first.device)[None] + first[:, None] - width
    there = shifted >= begin[:, None]
    shift = shifted.clamp(min=0)
    keys = torch.cat([x.gather(1, shift).masked_fill(~there, -1) for x in values], 1)
    return torch.unique(keys, dim=0, return_inverse=True)[1]


def _segments(spans: list[list[int]]) -> tuple[list[Segment], list[Segment], Tensor, Tensor]:
    """Return prompts and completions in their order, and for each token its row and column in the batch, [N] each.

    Args:
        spans: for each row, the columns of its first token and of its first and last scored tokens, and the number of
            its prompt, which increases from 0.
    """
    prompts: list[Segment] = []
    completions: list[Segment] = []
    source: list[Tensor] = []
    column: list[Tensor] = []
    start = 0

    def run(row: int, one: int, two: int) -> int:
        source.append(torch.full((two - one,), row))
        column.append(torch.arange(one, two))
        return start + two - one

    for row, (begin, first, _, number) in enumerate(spans):
        if number == len(prompts):
            prompts.append(Segment(start, first - begin))
            start = run(row, begin, first)
    for row, (_, first, last, number) in enumerate(spans):
        completions.append(Segment(start, last - first, number))
        start = run(row, first, last)
    return prompts, completions, torch.cat(source), torch.cat(column)
