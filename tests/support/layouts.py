"""A layout that cuts tensors anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refkl.backend import Block, Layout


@dataclass(frozen=True)
class Piece(Layout):
    """Elements `start` to `start + length` of the flattened weight."""

    start: int
    length: int

    def cut(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1)[self.start : self.start + self.length]

    def join(self, local: Tensor) -> Tensor:
        raise NotImplementedError

    def block(self) -> Block:
        return Block((self.shape.numel(),), (self.start,), (self.length,))
