"""Scoring in parts, for a batch too large for one forward: rows of one prompt, or of similar length, come together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from refkl.backend import base_model
from refkl.kl.projection import free_bytes
from refkl.types import TokenBatch, TokenScores

SHARE = 0.25
"""Share of the free memory for the activations of a part. The rest is a margin: the size of activations is estimated,
and other tensors need memory too."""

_FILLED = 1.08
"""Largest ratio of tokens run to real tokens, in a part without shared prompts. A part of more than max_tokens / 8 ends
before it exceeds this."""


def free_tokens(model: nn.Module, device: torch.device) -> int:
    """Return the number of tokens that one forward without gradients can process in the device's free memory.

    The estimate: about ten tensors of the hidden width and four of the MLP's width are alive at a time.
    """
    config: Any = getattr(base_model(model), "config", None)
    text: Any = config.get_text_config() if config is not None else None
    hidden = getattr(text, "hidden_size", None) or 4096
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # one for each layer
        inner = max(inner)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return max(1, int(SHARE * free_bytes(str(device)) / ((10 * hidden + 4 * inner) * max(dtype.itemsize, 2))))


def parts(batch: TokenBatch, max_tokens: int, *, shares: bool) -> Iterator[tuple[Tensor, TokenBatch]]:
    """Yield parts of a batch, each with the indices of its rows.

    Rows of similar length come together, which keeps padding low. Columns that hold only padding are cut off.

    Args:
        batch: the rows to split. A batch with model_inputs is one part.
        max_tokens: the most tokens to run in a part. A single longer row is a part by itself.
        shares: True if rows share prompts. Rows of one prompt then come together; the prompt counts once in a part, and
            padding does not count.
    """
    whole = int(batch.attention_mask.sum()) if shares else batch.input_ids.numel()
    if batch.model_inputs or whole <= max_tokens:
        yield torch.arange(len(batch)), batch
        return
    for rows in _by_prompt(batch, max_tokens) if shares else _by_length(batch, max_tokens):
        yield _of_rows(batch, rows)


def _by_prompt(batch: TokenBatch, max_tokens: int) -> Iterator[list[int]]:
    real, scored = batch.attention_mask.bool().cpu(), batch.completion_mask.cpu()
    first = torch.where(scored.any(1), scored.long().argmax(1), real.shape[1])
    before = real & (torch.arange(real.shape[1]) < first[:, None])
    numbers: dict[tuple[int, ...], int] = {}
    texts = (tuple(row[mask].tolist()) for row, mask in zip(batch.input_ids.cpu(), before, strict=True))
    prompt = [numbers.setdefault(text, len(numbers)) for text in texts]
    shared, total = before.sum(1).tolist(), real.sum(1).tolist()
    longest = [0] * len(numbers)
    for number, length in zip(prompt, total, strict=True):
        longest[number] = max(longest[number], length)
    rows: list[int] = []
    count = 0
    for row in sorted(range(len(total)), key=lambda r: (-longest[prompt[r]], prompt[r], -total[r])):
        again = bool(rows) and prompt[row] == prompt[rows[-1]]
        count += total[row] - (shared[row] if again else 0)
        if rows and count > max_tokens:
            yield rows
            rows, count = [], total[row]
        rows.append(row)
    yield rows


def _by_length(batch: TokenBatch, max_tokens: int) -> Iterator[list[int]]:
    real = batch.attention_mask.bool().cpu()
    total = real.sum(1).tolist()
    begins = real.long().argmax(1).tolist()
    ends = (real.shape[1] - real.flip(1).long().argmax(1)).tolist()
    rows: list[int] = []
    begin = end = held = 0
    for row in sorted(range(len(total)), key=lambda r: -total[r]):
        wide, far = (min(begin, begins[row]), max(end, ends[row])) if rows else (begins[row], ends[row])
        count = (len(rows) + 1) * (far - wide)
        wasteful = count > _FILLED * (held + total[row]) and count > max_tokens / 8
        if rows and (count > max_tokens or wasteful):
            yield rows
            rows, held, wide, far = [], 0, begins[row], ends[row]
        rows.append(row)
        begin, end, held = wide, far, held + total[row]
    yield rows


def in_parts(
    score: Callable[[TokenBatch], TokenScores],
    batch: TokenBatch,
    max_tokens: int,
    rounds: Callable[[int], int],
    *,
    shares: bool,
) -> TokenScores:
    """Score a batch in parts, and return the scores in the batch's order.

    Args:
        score: scores a part.
        batch: the B rows to score.
        max_tokens: as in `parts`.
        shares: as in `parts`.
        rounds: takes this rank's number of parts and returns the number of calls of `score`; if weights are sharded, it
            is the largest number of parts on any rank. In the additional calls, the last part is scored again.
    """
    cut = list(parts(batch, max_tokens, shares=shares))
    again = rounds(len(cut)) - len(cut)  # agreed on before the first score, which is collective itself
    found = [score(part) for _, part in cut]
    for _ in range(again):
        score(cut[-1][1])
    if cut[0][1] is batch:
        return found[0]

    def whole(name: str) -> Tensor | None:
        if (like := getattr(found[0], name)) is None:
            return None
        values = like.new_zeros(batch.input_ids.shape + like.shape[2:])
        for (rows, _), scores in zip(cut, found, strict=True):
            start, length = _span(batch, rows)
            values[rows.to(values.device), start : start + length] = getattr(scores, name)
        return values

    logp = whole("logp")
    assert logp is not None, "always there"
    return TokenScores(logp, whole("entropy"), whole("hidden"), found[0].temperature, found[0].fingerprint)


def _span(batch: TokenBatch, rows: Tensor) -> tuple[int, int]:
    """Return the first column in which one of the rows has a token, and the number of columns."""
    columns = batch.attention_mask.bool()[rows.to(batch.attention_mask.device)].any(0).nonzero()[:, 0]
    if not len(columns):
        return 0, batch.input_ids.shape[1]
    return int(columns[0]), int(columns[-1] - columns[0]) + 1


def _of_rows(batch: TokenBatch, rows: list[int]) -> tuple[Tensor, TokenBatch]:
    chosen = torch.tensor(sorted(rows))
    start, length = _span(batch, chosen)
    positions = batch.position_ids  # None: counted from the mask, the same without these columns
    there = chosen.to(batch.input_ids.device)

    def cut(values: Tensor) -> Tensor:
        return values[there, start : start + length]

    part = TokenBatch(
        cut(batch.input_ids),
        cut(batch.attention_mask),
        cut(batch.completion_mask),
        None if positions is None else cut(positions),
        prefix=batch.prefix,
    )
    return chosen, part
