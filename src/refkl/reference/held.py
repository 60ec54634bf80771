"""A reference whose weights are in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refkl.backend import Weight
from refkl.backend.adapters import LoraFactors
from refkl.backend.exclusive import Use, use_of
from refkl.reference.contract import Reference
from refkl.reference.moving.average import Move
from refkl.reference.moving.mover import Mover
from refkl.reference.request import BuildRequest
from refkl.reference.saving import load_held, save_held
from refkl.reference.score import Conditions, prepared, score_held
from refkl.reference.weights.identity import Identity
from refkl.reference.weights.pairing import Pair
from refkl.reference.weights.saved import Saved
from refkl.scoring import ScoredLogits, completion_logits
from refkl.types import MemoryReport, TokenBatch, TokenScores


class HeldReference(Reference):
    """A reference whose weights are in this process: scored, fingerprinted, moved and saved by refkl.

    A strategy opens the module that is to be run (`activate`) and lists its weights (`weights`). If it can move, it
    pairs them with the policy's (`pairs`).
    """

    takes = frozenset({"source", "dtype", "device", "offload", "quantize", "max_tokens", "averages", "max_kl_floor"})
    movers: ClassVar[type[Mover]] = Mover
    """The class that moves it."""

    def __init__(
        self, request: BuildRequest, reason: str, source: str, *, borrowed_from: nn.Module | None = None
    ) -> None:
        """`borrowed_from` is the policy, if scores run inside its own module: it is not itself while they do."""
        super().__init__(request, reason, source)
        self._accelerator = request.accelerator
        self.device = None if request.config.device is None else torch.device(request.config.device)
        """The device that a batch is scored on; None leaves the batch on its own."""
        self.known = Identity(self.weights)
        """The record of the weights."""
        self._mover = self.movers(self, on_host=request.config.averages == "host")
        self.use = Use() if borrowed_from is None else use_of(borrowed_from)
        self._active: nn.Module | None = None
        self._conditions = Conditions(self)
        self.weights_freed = False
        """True once `free_weights` dropped the weights: nothing but the score conditions is known from then on."""

    # What a strategy writes.

    @abstractmethod
    def activate(self) -> AbstractContextManager[nn.Module]:
        """Yield the module to run, as the reference while this is open; switched back also when scoring raises."""

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Yield every weight of the reference, as far as this rank holds it, in a fixed order; tied ones once."""

    def pairs(self, policy: nn.Module) -> list[Pair]:
        """Return each weight that moves, with the policy's; nothing is written here.

        Raises:
            ValueError: names or shapes that do not pair; a strategy that cannot move.
        """
        self._refuse("cannot move")

    def lora_layers(self) -> list[LoraFactors]:
        """Return the LoRA layers that the reference can hold with another rank than the policy's; a strategy that lists
        any has `replace_weights`."""
        return []

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        """Let these be the reference's weights in place of ones of other shapes; it owns the tensors from then on."""
        self._refuse("cannot hold weights of other shapes than the policy's")

    def before_writing(self) -> None:
        """Drop what would hide new weights from the next forward."""

    def drop_weights(self) -> bool:
        """Drop the weights that are only the reference's; return False if there are none, so that it can still run."""
        self._refuse("cannot free its weights")

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes of the reference's own weights on this rank."""
        return MemoryReport(device=0, host=0)

    def holds_parts(self) -> bool:
        """Return True if this rank holds only a part of some weight."""
        return any(weight.layout.sharded for weight in self.weights())

    # Scoring.

    def score(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
    ) -> TokenScores:
        """Return log-probabilities of the scored tokens under the reference: no grad, dropout off, nothing left
        changed. On the batch's device.

        If its weights are sharded, every rank must call; and so for a quantised one the first time, which measures its
        floor over all of them.

        Raises:
            ValueError: as `score_tokens`; or the reference can no longer be told from the policy; or it is quantised
                and its floor (`kl_floor`) is too high, or cannot be measured any more.
        """
        with self.use.lock:
            scores = score_held(self, batch, temperature=temperature, entropy=entropy, hidden=hidden)
            return replace(scores, fingerprint=self.scored_as)

    @contextmanager
    def logits(self, batch: TokenBatch) -> Iterator[ScoredLogits]:
        with self.scoring(batch, "reference.logits") as (model, moved):
            with self.use.scoring():
                logits = completion_logits(model, moved)
            yield logits

    def check_exact(self) -> None:
        """Refuse nothing: hidden states and logits are available."""

    @contextmanager
    def scoring(self, batch: TokenBatch, what: str = "reference.score") -> Iterator[tuple[nn.Module, TokenBatch]]:
        """Yield the module to run and the batch on its device: no grad, dropout off, nothing left changed."""
        with self.use.borrowed(self, what):
            self._mover.check_whole()
            if self._active is None:
                self.follow_policy()
            self.before_scoring(batch)
            with prepared(self, batch) as found:
                yield found

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """`activate`, or the module that is active already: contexts of one reference can be nested."""
        if self._active is not None:
            yield self._active
            return
        with self.activate() as model:
            self._active = model
            try:
                yield model
            finally:
                self._active = None

    def autocast(self) -> AbstractContextManager[None]:
        """The accelerator's autocast, if there is one."""
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()

    @property
    def collective(self) -> bool:
        several = dist.is_initialized() and dist.get_world_size() > 1
        return several and not self.weights_freed and self.holds_parts()

    def score_conditions(self, batch: TokenBatch) -> dict[str, Any]:
        return self._conditions.of(batch)

    # Identity.

    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self.recorded_fingerprint or self.fingerprint()}

    def fingerprint(self) -> str:
        """Return 64 hex digits that change if and only if the name, shape, dtype or a bit of some weight does.

        The same weights have the same fingerprint whatever strategy, device or number of ranks holds them. If weights
        are sharded, every rank must call: they exchange one number a weight. See weights/fingerprint.py.
        """
        return self.known.take()

    @property
    def recorded_fingerprint(self) -> str | None:
        return self.known.recorded

    @property
    def digests(self) -> dict[str, str]:
        return self.known.digests

    @property
    def scored_as(self) -> str:
        return self.known.scored_as

    def verify(self, count: int | None = None) -> None:
        """Find a weight that changed since the fingerprint was taken, with no `update` or `load` to explain it.

        Args:
            count: how many weights to look at, the next ones at each call; None looks at all. If weights are sharded,
                every rank must call.

        Raises:
            ValueError: one has changed; it is named. Right after an update there is nothing to compare with: the
                fingerprint is taken instead.
        """
        self.follow_policy()
        self.known.verify(count)

    # Moving.

    def check_movable(
        self,
        policy: nn.Module,
        alpha: float = 1.0,
        *,
        bias: float | None = None,
        lora: Literal["factors", "product"] = "factors",
        rank: int | None = None,
    ) -> None:
        step = Move(alpha, bias, lora, rank)
        step.check()
        self._mover.check(policy, step)

    def update(
        self,
        policy: nn.Module,
        alpha: float = 1.0,
        *,
        bias: float | None = None,
        lora: Literal["factors", "product"] = "factors",
        rank: int | None = None,
    ) -> None:
        step = Move(alpha, bias, lora, rank)
        step.check()
        with self._idle("be moved"):
            if not step.copies:
                self._mover.check_whole()
            self._mover.update(policy, step)

    def keep_first(self) -> None:
        with self._idle("keep its first state"):
            self._mover.keep_initial()

    @contextmanager
    def first(self) -> Iterator[None]:
        with self._idle("be shown as it was first"), self._mover.initial():
            yield

    @contextmanager
    def _idle(self, what: str) -> Iterator[None]:
        """Hold the lock. Raise ValueError while one of the reference's contexts is open in this thread."""
        with self.use.lock:
            self._mover.check_closed(what)
            if self._active is not None:
                raise ValueError(
                    f"{self.use.what} is open, and its weights are being run, so the reference cannot {what}: leave "
                    "that first."
                )
            yield

    # Memory and files.

    def free_weights(self) -> bool:
        with self._idle("free its weights"):
            self._conditions.take()
            self.weights_freed = self.drop_weights()
        return self.weights_freed

    def home(self) -> torch.device:
        """Return where the accelerator has models run; without one, a CPU."""
        return torch.device("cpu") if self._accelerator is None else self._accelerator.device

    def memory(self) -> MemoryReport:
        held, averages = self.memory_of_weights(), self._mover.averages.memory(self.home())
        return MemoryReport(device=held.device + averages.device, host=held.host + averages.host)

    def save(self, folder: str | Path) -> None:
        with self._idle("be saved"):
            save_held(self, self._mover, Path(folder))

    def load(self, folder: str | Path) -> None:
        with self._idle("be loaded into"):
            load_held(self, self._mover, Saved(Path(folder)))
