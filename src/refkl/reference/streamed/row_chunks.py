"""The forward of a layer in chunks of rows, so that activations of a large batch fit beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 16384
"""Tokens, padding included, that a decoder layer processes at once; at least one row."""


Path = tuple[Any, ...]


_PLAIN = (bool, int, float, str, torch.dtype, type(None))
"""Types of arguments of a layer that hold no rows, and no state that one chunk could pass to the next."""


@dataclass(frozen=True)
class _OneRow:
    """The inputs of a layer for one sequence."""

    tokens: int
    sizes: dict[Path, int]
    """The first dimension of each tensor."""

    def having_rows(self, given: dict[Path, Any], rows: int, tokens: int) -> list[Path] | None:
        """Return the tensors, among the arguments given for `rows` sequences, whose first dimension has grown with the
        rows. A first dimension of heads or tokens may have the same size. None if an argument cannot be classified."""
        found = []
        for path, value in given.items():
            if not isinstance(value, Tensor):
                if not isinstance(value, _PLAIN):
                    return None
            elif value.dim():
                size = self.sizes.get(path)
                if size is not None and size != self.tokens and len(value) == size * rows:
                    found.append(path)
                elif len(value) != (tokens if size == self.tokens else size):
                    return None
        return found


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the parts of an argument or a result, each with its path. Lists and dicts stay whole, because a layer may
    write into them."""
    if type(value) is tuple:
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, number))
    else:
        yield path, value


def _rebuilt(value: Any, leaves: dict[Path, Any], path: Path = ()) -> Any:
    """Return the same structure with other leaves."""
    if type(value) is tuple:
        return tuple(_rebuilt(inner, leaves, (*path, number)) for number, inner in enumerate(value))
    return leaves[path]


def _joined(parts: list[Any], rows: int) -> Any:
    """Join the results of the chunks into one; the first chunk had `rows` rows."""
    if type(parts[0]) is tuple:
        return tuple(_joined(list(inner), rows) for inner in zip(*parts, strict=True))
    if parts[0] is None or not parts[0].dim() or len(parts[0]) % rows:
        return parts[0]  # the same for all rows, such as a bias of positions
    return torch.cat(parts)
