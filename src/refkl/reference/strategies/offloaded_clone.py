"""A clone in host memory that is moved through the device layer by layer while it scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from refkl.backend import base_model, named_weights, unwrap
from refkl.backend.adapters import adapter_tensors
from refkl.reference.cost import Cost, Entry
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.whole_copy import SharingCopy
from refkl.reference.streamed.stream import Stream
from refkl.reference.streamed.units import largest_pair, unit_bytes
from refkl.reference.weights.tensors import bytes_offloaded
from refkl.scoring import Head, find_head
from refkl.scoring.row_proof import Apart, rows_apart
from refkl.types import MemoryReport, TokenBatch


class OffloadedClone(SharingCopy):
    """A clone whose weights wait in host memory. Each score moves all of them once."""

    def __init__(self, request: BuildRequest, reason: str, source: str, model: nn.Module, shared: set[str]) -> None:
        super().__init__(request, reason, source, model, shared)
        self._stays = True
        self._stream: Stream | None = Stream(model)
        self._head: Head | None = None

    @property
    def stream(self) -> Stream:
        """The stream that moves the weights through the device."""
        assert self._stream is not None, "dropped with the weights"
        return self._stream

    def _move_buffers(self, policy: nn.Module, first: Tensor) -> None:
        super()._move_buffers(policy, first)
        self.stream.follow(first.device)

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        self._evaluate()
        with self.stream.sweep():
            yield self.model

    @contextmanager
    def scoring(self, batch: TokenBatch, what: str = "reference.score") -> Iterator[tuple[nn.Module, TokenBatch]]:
        with super().scoring(batch, what) as (model, moved):
            taken = self.stream.taken(moved)
            self.stream.learn(taken)
            yield model, taken

    @property
    def one_sweep(self) -> bool:
        return self._stream is not None

    def prove_rows_apart(self, batch: TokenBatch) -> Apart:
        """Judge by the model's code: a trial would fetch the weights."""
        return rows_apart(self.model, batch)

    def head(self) -> Head | None:
        """Return the head with a copy of its weights on the policy's device."""
        self.follow_policy()
        if self._head is None:
            with self.activated() as model:
                self._head = find_head(model)
        module, device = self._head.module, self.stream.device
        return self._head.holding(*(None if t is None else t.detach().to(device) for t in (module.weight, module.bias)))

    def drop_weights(self) -> bool:
        self._stream = self._head = None
        return super().drop_weights()

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes of the weights in host memory and of the buffers on the device. A score also takes device
        memory for two units of weights."""
        weights = {id(tensor): tensor for _, tensor in named_weights(self.model)}
        return bytes_offloaded(weights.values(), (b for b in self.model.buffers() if id(b) not in weights))


def streamed_cost(request: BuildRequest, copied: list[Entry], dtype: torch.dtype | None) -> Cost:
    """Return the cost of a whole copy in host memory, with at most two units on the device at once."""
    shape, policy, without = request.shape, unwrap(request.policy), set[int]()
    if request.config.source != "policy":
        policy, without = base_model(policy), adapter_tensors(policy)
    units, rest = unit_bytes(policy, dtype=dtype, without=without)
    stays = [e for e in copied if e.buffer and not e.persistent]
    return Cost(
        device=shape.held(stays, "whole", dtype),
        host=shape.held(copied, "whole", dtype) - shape.held(stays, "whole", dtype),
        scoring=largest_pair(units) + rest,
        flops=shape.forward(),
        moved=sum(units) + rest if shape.step.tokens else 0,
    )
