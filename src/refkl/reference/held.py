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
from torch import nn

from refkl.backend import Weight, outside_inference_mode
from refkl.backend.exclusive import Use, use_of
from refkl.reference.contract import Reference
from refkl.reference.moving.average import Move
from refkl.reference.moving.mover import Mover
from refkl.reference.request import BuildRequest
from refkl.reference.saving import WriteHooks, load_held, save_held
from refkl.reference.score import Conditions, prepared, score_held
from refkl.reference.weights.identity import Identity
from refkl.reference.weights.pairing import Pair
from refkl.reference.weights.saved import Saved
from refkl.reference.weights.tensors import bytes_held
from refkl.scoring import ScoredLogits, completion_logits
from refkl.scoring.row_proof import Apart, rows_apart
from refkl.types import MemoryReport, TokenBatch, TokenScores

ALL_SETTINGS = frozenset({"source", "dtype", "device", "offload", "quantize", "max_tokens", "averages", "max_kl_floor"})
"""The fields of ReferenceConfig that refkl's own strategies honour, or refuse in `supports` with a reason."""


class HeldReference(WriteHooks, Reference):
    """A reference whose weights are in this process: scored, fingerprinted, moved and saved by refkl.

    A strategy provides the module to run (`activate`) and lists its weights (`weights`). If it can move, it also pairs
    them with the policy's (`pairs`).
    """

    takes = frozenset({"max_tokens", "averages"})
    movers: ClassVar[type[Mover]] = Mover
    """Class that moves the reference."""

    def __init__(
        self, request: BuildRequest, reason: str, source: str, *, borrowed_from: nn.Module | None = None
    ) -> None:
        """Store the settings; `borrowed_from` is the policy, if scores put the reference's weights into its module."""
        super().__init__(request, reason, source)
        self._accelerator = request.accelerator
        self.device = None if request.config.device is None else torch.device(request.config.device)
        """Device on which batches are scored; None leaves each batch on its device."""
        self.known = Identity(self.weights)
        """The record of the weights."""
        self._mover = self.movers(self, on_host=request.config.averages == "host")
        self.use = Use() if borrowed_from is None else use_of(borrowed_from)
        self._active: nn.Module | None = None
        self._conditions = Conditions(self)
        self._apart: Apart | None = None
        self.weights_freed = False
        """True once `free_weights` dropped the weights: only the score conditions are known from then on."""

    # Methods that a strategy writes.

    @abstractmethod
    def activate(self) -> AbstractContextManager[nn.Module]:
        """Yield the module to run. It is the reference while this is open, and is switched back on exit or error."""

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Yield every weight of the reference, as far as this rank holds it, in a fixed order; tied ones once."""

    def pairs(self, policy: nn.Module) -> list[Pair]:
        """Return each weight that moves, paired with the policy's. Nothing is written here.

        Raises:
            ValueError: names or shapes do not pair; the strategy cannot move.
        """
        self._refuse("cannot move")

    def drop_weights(self) -> bool:
        """Drop the weights that belong to the reference only; return False if there are none, so it can still run."""
        self._refuse("cannot free its weights")

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes of the reference's own weights on this rank: by default, those that `weights` lists."""
        if self.weights_freed:
            return MemoryReport(device=0, host=0)
        return bytes_held((weight.local for weight in self.weights() if self.owns(weight.name)), self.home())

    def holds_parts(self) -> bool:
        """Return True if this rank holds only a part of some weight."""
        return any(weight.layout.sharded for weight in self.weights())

    # Scoring.

    def score(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
    ) -> TokenScores:
        """Return log-probabilities of the scored tokens under the reference, on the batch's device.

        Runs without gradients and with dropout off, and leaves nothing changed. Every rank must call if weights are
        sharded, and at the first score of a quantised reference, which measures the KL floor over all ranks.

        Raises:
            ValueError: see `score_tokens`; the reference can no longer be told from the policy; the KL floor
                (`kl_floor`) of a quantised reference is too high, or can no longer be measured.
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
        """Raise nothing: hidden states and logits are available."""

    @contextmanager
    def scoring(self, batch: TokenBatch, what: str = "reference.score") -> Iterator[tuple[nn.Module, TokenBatch]]:
        """Yield the module to run and the batch on its device, with no grad and dropout off; restore all on exit."""
        with self.use.borrowed(self, what), outside_inference_mode():
            self._mover.check_whole()
            if self._active is None:
                self.follow_policy()
            self.before_scoring(batch)
            with prepared(self, batch) as found:
                yield found

    @contextmanager
    def activated(self) -> Iterator[nn.Module]:
        """Yield the module of `activate`, or the one already active: contexts of one reference can be nested."""
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
        """Return the accelerator's autocast; without an accelerator, a context that does nothing."""
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()

    @property
    def collective(self) -> bool:
        several = dist.is_initialized() and dist.get_world_size() > 1
        return several and not self.weights_freed and self.holds_parts()

    def why_not_by_row(self, batch: TokenBatch) -> str | None:
        if self._apart is None:
            self._apart = self.prove_rows_apart(batch)
        return self._apart.why_not(batch)

    def prove_rows_apart(self, batch: TokenBatch) -> Apart:
        """Return the conditions for scoring rows in several batches, by a trial of the module that scores."""
        with self.scoring(batch) as (model, moved):
            return rows_apart(model, moved)

    def score_conditions(self, batch: TokenBatch) -> dict[str, Any]:
        return self._conditions.of(batch)

    # Identity.

    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self.recorded_fingerprint or self.fingerprint()}

    def fingerprint(self) -> str:
        """Return 64 hex digits that change if and only if the name, shape, dtype or a bit of some weight does.

        The same weights have the same fingerprint with any strategy, device or number of ranks. If weights are sharded,
        every rank must call: the ranks exchange one number per weight. See weights/fingerprint.py.
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
        """Raise ValueError if a weight changed since the fingerprint was computed, without an `update` or `load`.

        Right after an update there is nothing to compare with, so the fingerprint is computed instead.

        Args:
            count: number of weights to check, the next ones at each call; None checks all. If weights are sharded,
                every rank must call.

        Raises:
            ValueError: a weight has changed; the message names it.
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
        with self._idle("show its first state"), self._mover.initial():
            yield

    @contextmanager
    def _idle(self, what: str) -> Iterator[None]:
        """Hold the lock. Raise ValueError if one of the reference's contexts is open in this thread."""
        with self.use.lock, outside_inference_mode():
            self._mover.check_closed(what)
            if self._active is not None:
                raise ValueError(
                    f"{self.use.what} is open and uses the reference's weights, so the reference cannot {what}. Leave "
                    "that context first."
                )
            yield

    # Memory and files.

    def free_weights(self) -> bool:
        with self._idle("free its weights"):
            self._conditions.take()
            self.weights_freed = self.drop_weights()
        return self.weights_freed

    def home(self) -> torch.device:
        """Return the device on which the accelerator runs models; without an accelerator, the CPU."""
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
