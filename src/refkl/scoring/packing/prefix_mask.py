"""Attention mask of a packed row, in which a prompt that several rows share is computed once and padding is skipped.

The packed row [1, N] (packed_batch.py) holds each distinct prompt once, then every row's completion up to its last
input. Outside attention, a decoder processes each token separately. The mask defines which tokens attend to which. It
is a tensor subclass: where torch would apply it, it computes in blocks the attention of each prompt to itself, and of
each completion to its prompt and itself. No mask [N, N] is stored, and no attention between unrelated rows is computed.
A model, its wrappers and gradient checkpointing pass the mask on like any other. Models that compute their attention by
hand ("eager") get a dense mask [N, N].

J. Juravsky et al. (2024), "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (arXiv 2402.05099), splits
attention over a shared prefix for inference; here gradients flow too.

Notation: N tokens in the packed row, n segments of a block, L and P the longest of them and of their prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refkl.scoring.packing.packed_batch import PackedBatch, Segment

BLOCK = 24.0
"""Cost of one more block of attention, in tokens run through the model: a few small operations per layer."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Indices of the tokens of n segments in the packed row, each padded to the longest with its last token."""

    index: Tensor
    """[n, L]"""
    start: int | None = None
    """The first index if the tokens are contiguous in the packed row without padding, so that `take` returns a view."""

    @classmethod
    def of(cls, segments: list[Segment], device: torch.device) -> Tokens:
        size = max(s.length for s in segments)
        begin = torch.tensor([s.start for s in segments])[:, None]
        ends = torch.tensor([s.start + s.length - 1 for s in segments])[:, None]
        index = (begin + torch.arange(size)).minimum(ends)
        start = segments[0].start
        in_a_row = bool((index.flatten() == start + torch.arange(index.numel())).all())
        return cls(index.to(device), start if in_a_row else None)

    def then(self, other: Tokens) -> Tokens:
        """Return these tokens followed by those of `other`, [n, L + M]."""
        return Tokens(torch.cat([self.index, other.index], 1))

    def take(self, rows: Tensor) -> Tensor:
        """Take these tokens from `rows`: [N, heads, width] -> [n, L, heads, width]."""
        if self.start is None:
            return rows.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        return rows.narrow(0, self.start, self.index.numel()).unflatten(0, self.index.shape)


@dataclass(frozen=True, eq=False)
class Block:
    """Segments of similar length whose attention is computed in one call."""

    queries: Tokens
    """[n, L]"""
    keys: Tokens
    """[n, P + L] the queries' tokens; for completions, preceded by those of their prompts."""
    ahead: Tensor | None = None
    """For completions, the lengths of their prompts: [n], padded to P, or [1] if all are equally long. For prompts,
    None."""

    def allowed(self, window: int | None) -> Tensor | None:
        """Return the mask [n or 1, 1, L, P + L], True = attended to; None if a causal mask is enough."""
        size = self.queries.index.shape[1]
        steps = torch.arange(size, device=self.queries.index.device)
        distance = steps[:, None] - steps[None]
        own = distance >= 0
        if window is not None:
            own = own & (distance < window)
        if self.ahead is None:
            return None if window is None or size <= window else own[None, None]
        lengths, there = self.ahead[:, None, None], torch.arange(self.keys.index.shape[1] - size, device=own.device)
        before = (there < lengths).expand(-1, size, -1)
        if window is not None:
            before = before & (lengths + steps[:, None] - there < window)
        return torch.cat([before, own.expand(len(before), -1, -1)], -1)[:, None]


class Seen:
    """The tokens of a packed batch that each of its tokens attends to.

    Args:
        packed: the packed batch.
        scale: number of query-key pairs that cost as much as one token does outside attention.
    """

    def __init__(self, packed: PackedBatch, scale: int) -> None:
        device = packed.input_ids.device
        self.packed = packed
        prompts, completions = packed.prompts, [c for c in packed.completions if c.length]
        alone = _alike(prompts, lambda p: p.length, scale)
        following = _alike(completions, lambda c: c.length + prompts[c.parent].length, scale)
        self.blocks = [Block(tokens, tokens) for tokens in (Tokens.of(part, device) for part in alone)]
        for part in following:
            parents = [prompts[c.parent] for c in part]
            lengths = torch.tensor([p.length for p in parents], device=device)
            even = len({p.length for p in parents}) == 1
            own = Tokens.of(part, device)
            keys = Tokens.of(parents, device).then(own)
            self.blocks.append(Block(own, keys, lengths[:1] if even else lengths))
        # The index of each token of the packed row in the concatenated outputs of the blocks, which include padding.
        place = torch.empty(packed.tokens, dtype=torch.long)
        done = 0
        for part in (*alone, *following):
            size = max(s.length for s in part)
            for number, segment in enumerate(part):
                begin = done + number * size
                place[segment.start : segment.start + segment.length] = torch.arange(begin, begin + segment.length)
            done += size * len(part)
        as_it_is = done == packed.tokens and bool((place == torch.arange(done)).all())
        self.place = None if as_it_is else place.to(device)
        self._allowed: dict[tuple[int | None, int], list[Tensor | None]] = {}

    def pairs(self) -> int:
        """Return the number of query-key pairs that the blocks compute."""
        total = 0
        for block in self.blocks:
            count, size = block.queries.index.shape
            total += count * size * (size // 2 if block.ahead is None else block.keys.index.shape[1])
        return total

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **options: Any) -> Tensor:
        """Compute attention, [1, heads, N, width] for each tensor and the result, as torch's attention does.

        Keys and values may have fewer heads. Each of these serves several consecutive query heads.
        """
        fold = query.shape[1] // key.shape[1]
        if (window, fold) not in self._allowed:
            each = [block.allowed(window) for block in self.blocks]
            self._allowed[window, fold] = [None if x is None else x.repeat(1, 1, fold, 1) for x in each]
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]
        found = []
        for block, allowed in zip(self.blocks, self._allowed[window, fold], strict=True):
            taken = zip((block.queries, block.keys, block.keys), rows, strict=True)
            q, k, v = (tokens.take(x).transpose(1, 2) for tokens, x in taken)
            if allowed is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=fold > 1, **options)
            else:
                # No enable_gqa: on CUDA, with a mask, it copies keys and values for each query head.
                heads = q.unflatten(1, (-1, fold)).flatten(2, 3)
                out = F.scaled_dot_product_attention(heads, k, v, attn_mask=allowed, **options)
                out = out.unflatten(2, (fold, -1)).flatten(1, 2)
            found.append(out.transpose(1, 2).flatten(0, 1))
        together = torch.cat(found)
        return (together if self.place is None else together.index_select(0, self.place)).transpose(0, 1)[None]

    def dense(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [1, 1, N, N]: 0 where attended to, else the lowest number of `dtype`."""
        packed = self.packed
        prompt, place = (torch.empty(packed.tokens, dtype=torch.long) for _ in range(2))
        own = torch.full_like(prompt, -1)
        for number, segment in enumerate((*packed.prompts, *packed.completions)):
            tokens = slice(segment.start, segment.start + segment.length)
            before = 0 if segment.parent < 0 else packed.prompts[segment.parent].length
            prompt[tokens] = number if segment.parent < 0 else segment.parent
            own[tokens] = -1 if segment.parent < 0 else number
            place[tokens] = before + torch.arange(segment.length)
        prompt, own, place = (x.to(packed.input_ids.device) for x in (prompt, own, place))
        seen = (prompt[:, None] == prompt) & ((own == -1) | (own[:, None] == own))
        distance = place[:, None] - place
        seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None]


class SharedMask(Tensor):
    """An attention mask [1, 1, N, N] whose elements are never stored: it computes the attention itself."""

    seen: Seen
    window: int | None

    @classmethod
    def of(cls, seen: Seen, window: int | None) -> SharedMask:
        """Return the mask for layers that attend to the last `window` tokens; None means all of them."""
        tokens, device = seen.packed.tokens, seen.packed.input_ids.device
        mask = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, tokens, tokens).as_subclass(cls)
        mask.seen, mask.window = seen, window
        return mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Compute attention under this mask; see `Seen.attend`.

        Raises:
            UnknownAttention: the number of tokens is not that of the mask.
        """
        tokens = self.seen.packed.tokens
        if query.shape[0] != 1 or query.shape[-2] != tokens or key.shape[-2] != tokens:
            raise UnknownAttention(
                f"The model computes attention of {query.shape[-2]} queries to {key.shape[-2]} keys in "
                f"{query.shape[0]} rows, but it was given {tokens} tokens in one packed row. Pass prefix='off' "
                "(scoring.prefix: 'off')."
            )
        return self.seen.attend(query, key, value, self.window, **options)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func is torch.equal:
            return _same(*args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if isinstance(args[0], cls) and func in _SAME and result.shape == args[0].shape:
            return args[0]
        raise UnknownAttention(
            f"The model applies {getattr(func, '__name__', func)} to its attention mask, which a mask of shared "
            "prompts does not support. Pass prefix='off' (scoring.prefix: 'off')."
        )


class UnknownAttention(RuntimeError):
    """Error for a model that computes its attention in a way that a `SharedMask` does not support."""


_SAME = {Tensor.__getitem__, Tensor.to, Tensor.contiguous, Tensor.detach, Tensor.expand, Tensor.bool, Tensor.view_as}


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True if under both masks the same tokens attend to each other."""
    if not isinstance(one, SharedMask) or not isinstance(other, SharedMask):
        return False
    mine, theirs = one.seen.packed, other.seen.packed
    return (one.window, mine.prompts, mine.completions) == (other.window, theirs.prompts, theirs.completions)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # not needed: the numbers of heads show it
) -> Tensor:
    if not isinstance(attn_mask, SharedMask) or is_causal:
        raise UnknownAttention(
            "The model passes a mask of shared prompts to torch's attention, but not as its only mask. Pass "
            "prefix='off' (scoring.prefix: 'off')."
        )
    return attn_mask.attend(query, key, value, dropout_p=dropout_p, scale=scale)


def _alike(segments: list[Segment], size: Callable[[Segment], int], scale: int) -> list[list[Segment]]:
    """Split segments into groups of similar size. A new group begins if padding to the largest would cost more than it.

    Args:
        segments: the segments to split.
        size: returns the size of a segment.
        scale: number of query-key pairs that cost as much as one token does outside attention.
    """
    ordered = sorted(segments, key=size, reverse=True)
    parts: list[list[Segment]] = []
    for number, segment in enumerate(ordered):
        if parts:
            largest, rest = size(parts[-1][0]), len(ordered) - number
            saved = rest * (largest - size(segment)) * (parts[-1][0].length + largest) / scale
            if saved < BLOCK:
                parts[-1].append(segment)
                continue
        parts.append([segment])
    return [sorted(part, key=lambda s: s.start) for part in parts]
