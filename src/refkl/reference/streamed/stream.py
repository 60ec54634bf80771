"""Weights that wait in host memory and pass through the device, unit by unit, while their model runs.

A unit is a decoder layer, or another module that holds weights: embedding, last norm, head. When one begins its forward
the one before it leaves the device and the one after it is fetched, so that two are there at most, and on a GPU the
next one's way overlaps with the computation. Nothing is written back: the host's numbers are the weights.

A sweep moves every weight once, however large the batch, so a whole rollout is to be scored in one. Its activations
stay those of a small batch: a decoder layer takes a large one in chunks of rows. Which of a layer's inputs have rows is
seen from what the model gives it for one sequence; where that does not settle it, the layer takes all rows at once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refkl.backend import named_weights
from refkl.reference.streamed.row_chunks import CHUNK_TOKENS, _joined, _leaves, _OneRow, _rebuilt
from refkl.reference.streamed.units import Unit, units_of, unstreamable
from refkl.scoring import prepare
from refkl.scoring.row_proof import judge_by_code
from refkl.types import TokenBatch


class Stream:
    """The way of a model's weights from host memory through the device. They are on the host when this is made.

    Raises:
        ValueError: as `unstreamable` says.
    """

    def __init__(self, model: nn.Module) -> None:
        if (why_not := unstreamable(model)) is not None:
            raise ValueError(f"reference.offload cannot work here: {why_not}")
        judge_by_code(model)
        self.units, rest = units_of(model)
        self.fetched: Counter[str] = Counter()
        """The number of times that each unit was put on the device, by its name."""
        self._model = model
        self._rest = Unit("", model, rest, layer=False)
        self.device = torch.device("cpu")
        """The device that the model runs on."""
        self._side: torch.cuda.Stream | None = None
        self._resident: dict[Unit, list[Tensor]] = {}
        self._users: Counter[int] = Counter()
        """The number of resident units that have a tensor: tied tensors are in several."""
        self._host: dict[int, Tensor] = {}
        """By id() of a tensor that is on the device, its numbers on the host."""
        self._ready: dict[Unit, torch.cuda.Event] = {}
        self._registered: dict[Unit, Unit | None] = dict(zip(self.units, [*self.units[1:], None], strict=True))
        self._seen: dict[tuple[Unit | None, Unit], Unit | None] = {}
        """The unit that followed two consecutive units; both count, for a module that runs between all layers."""
        self._first: Unit | None = None
        self._before: Unit | None = None
        self._now: Unit | None = None
        self._one_row: dict[Unit, _OneRow] = {}
        self._learning = self._learned = self._warned = False

    def follow(self, device: torch.device) -> None:
        """Run on this device from now on; where it is a GPU, weights on the host are pinned."""
        self.device, self._side = device, None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)
            for _, tensor in named_weights(self._model):
                if not tensor.is_pinned():
                    tensor.data = tensor.data.pin_memory()

    @contextmanager
    def sweep(self) -> Iterator[None]:
        """Let the model run on the device while open; afterwards every weight is only on the host, also if the model
        raised."""
        assert not self._resident, "one sweep at a time"
        with ExitStack() as stack:
            stack.callback(self._release)
            for unit in self.units:
                stack.callback(unit.module.register_forward_pre_hook(partial(self._enter, unit)).remove)
                if unit.layer:
                    stack.enter_context(self._taking_chunks(unit))
            # The first unit too: a model is taken to be where its first parameter is.
            for unit in (self._rest, *self.units[:1]):
                self._fetch(unit)
                self._await(unit)
            yield
            if self._now is not None:
                self._seen[self._before, self._now] = None  # nothing follows the head

    def taken(self, batch: TokenBatch) -> TokenBatch:
        """The batch as it is to be scored: too large for one chunk, in its rows, since one row has no chunks."""
        packed = prepare(self._model, batch).packed
        return replace(batch, prefix="off") if packed is not None and packed.tokens > CHUNK_TOKENS else batch

    def learn(self, batch: TokenBatch) -> None:
        """Inside a sweep: if the batch is to be taken in chunks for the first time, see what the layers get for one row
        of it. With padding, without which some models make no mask."""
        rows, length = batch.input_ids.shape
        tensors = [x for x in batch.model_inputs.values() if isinstance(x, Tensor)]
        if self._learned or rows == 1 or rows * length <= CHUNK_TOKENS or any(x.shape[:1] != (rows,) for x in tensors):
            return
        mask, last = torch.ones_like(batch.attention_mask[:1]), torch.zeros_like(batch.completion_mask[:1])
        mask[:, 0], last[:, -1] = 0, True
        row = TokenBatch(
            batch.input_ids[:1],
            mask,
            last,
            None if batch.position_ids is None else batch.position_ids[:1],
            {k: x[:1] if isinstance(x, Tensor) else x for k, x in batch.model_inputs.items()},
            prefix="off",
        )
        self._learning = True
        try:
            self._model(**prepare(self._model, row).inputs)
        finally:
            self._learning = False
        self._learned = True

    def _enter(self, unit: Unit, module: nn.Module, args: Any) -> None:
        """Before a unit's forward: it, and the one that is expected after it, are on the device, and no other."""
        for other in [u for u in self._resident if u not in (unit, self._rest)]:
            self._drop(other)
        self._fetch(unit)
        self._await(unit)
        self._first = self._first or unit
        if unit is self._first:  # a forward begins
            self._before = None
        else:
            assert self._now is not None
            self._seen[self._before, self._now] = unit
            self._before = self._now
        self._now = unit
        following = self._seen.get((self._before, unit), self._registered[unit])
        if following is not None:
            self._fetch(following)

    def _fetch(self, unit: Unit) -> None:
        if unit in self._resident:
            return
        if unit is not self._rest:
            self.fetched[unit.name] += 1
        held = self._resident[unit] = []
        for tensor in unit.tensors:
            if not self._users[id(tensor)]:
                host = tensor.data
                tensor.data = self._copy(host)
                self._host[id(tensor)] = host
            self._users[id(tensor)] += 1
            held.append(tensor)
        if self._side is not None:
            self._ready[unit] = self._side.record_event()

    def _copy(self, host: Tensor) -> Tensor:
        if self._side is None:
            return host.to(self.device, copy=True)
        with torch.cuda.stream(self._side):
            return host.to(self.device, non_blocking=True)

    def _await(self, unit: Unit) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[unit])

    def _drop(self, unit: Unit) -> None:
        if self._side is not None:
            # The memory goes back to the side stream's pool, and what is copied into it next waits for this unit's
            # computation. (After record_stream the allocator would take new memory, for as far as the host is ahead.)
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        for tensor in self._resident.pop(unit):
            self._users[id(tensor)] -= 1
            if not self._users[id(tensor)]:
                tensor.data = self._host.pop(id(tensor))

    def _release(self) -> None:
        if self._side is not None:
            self._side.synchronize()  # the host's numbers may be written from now on
        for unit in list(self._resident):
            self._drop(unit)
        self._ready.clear()
        self._first = self._before = self._now = None

    @contextmanager
    def _taking_chunks(self, unit: Unit) -> Iterator[None]:
        attributes = vars(unit.module)
        before = attributes.get("forward")
        attributes["forward"] = partial(self._forward, unit, unit.module.forward)
        try:
            yield
        finally:
            del attributes["forward"]
            if before is not None:
                attributes["forward"] = before

    def _forward(self, unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward, in chunks of rows where that is needed and can be done."""
        named = [*enumerate(args), *kwargs.items()]
        given = {path: leaf for key, value in named for path, leaf in _leaves(value, (key,))}
        hidden = next((x for x in given.values() if isinstance(x, Tensor) and x.dim() > 1), None)
        if self._learning:
            output = forward(*args, **kwargs)
            if hidden is not None and all(isinstance(x, Tensor | None) for _, x in _leaves(output)):
                sizes = {path: len(x) for path, x in given.items() if isinstance(x, Tensor) and x.dim()}
                self._one_row[unit] = _OneRow(hidden.shape[1], sizes)
            return output
        if hidden is None or hidden.numel() // hidden.shape[-1] <= CHUNK_TOKENS or hidden.shape[0] == 1:
            return forward(*args, **kwargs)
        rows, length = hidden.shape[:2]
        one = self._one_row.get(unit)
        having = None if one is None else one.having_rows(given, rows, length)
        if having is None or not any(given[path] is hidden for path in having):
            self._warn(unit, hidden.numel() // hidden.shape[-1])
            return forward(*args, **kwargs)
        size = max(1, CHUNK_TOKENS // length)
        outputs = []
        for start in range(0, rows, size):
            part = dict(given)
            for path in having:
                each = len(given[path]) // rows
                part[path] = given[path][start * each : (start + size) * each]
            own_args = [_rebuilt(value, part, (number,)) for number, value in enumerate(args)]
            own_kwargs = {name: _rebuilt(value, part, (name,)) for name, value in kwargs.items()}
            outputs.append(forward(*own_args, **own_kwargs))
        return _joined(outputs, min(size, rows))

    def _warn(self, unit: Unit, tokens: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{unit.name} takes inputs of which it is not known how they divide into rows, so all {tokens} tokens "
                "of a batch go through it at once. Score fewer sequences at a time if memory runs out.",
                stacklevel=2,
            )
