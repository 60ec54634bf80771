"""The contract of a reference: the methods that users call, and those that the author of a strategy writes.

An author writes `supports`, `cost`, `why`, `build`, `score` and `identity`. Everything else is optional. A method that
is not written raises an error that names the strategy, so a reference never gives a wrong answer or silently none. A
reference whose weights are in this process derives from `HeldReference` instead, which implements all of this and needs
only `activate` and `weights`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from refkl.reference.cost import Cost
from refkl.reference.moving.lora_update import LastUpdate
from refkl.reference.offers import Offers
from refkl.reference.request import BuildRequest
from refkl.types import TokenBatch, TokenScores
from refkl.versions import library_versions


class Reference(Offers, ABC):
    """A frozen model to compare the policy with."""

    strategy: str
    """The name in STRATEGIES. An "adapter" reference that moved is a "swap" from then on."""
    Options: ClassVar[type | None] = None
    """A dataclass of the strategy's own settings, which `reference.options` fills; None if it has none."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """The fields of ReferenceConfig, besides `strategy`, `cache` and `options`, that the strategy honours. If any other
    field is set, the strategy is refused before `supports` is called."""

    reason: str
    """One sentence that says why this strategy was chosen."""
    source: str
    """The source of the weights."""
    updates: int
    """The number of moves made by `update`."""
    last_update: LastUpdate | None
    """The result of the last move; None before the first, and after `load`."""

    def __init__(self, request: BuildRequest, reason: str, source: str) -> None:
        self.reason = reason
        self.source = source
        self.config = request.config
        """The configuration that was asked for."""
        self.updates = 0
        self.last_update = None
        self._recorded: str | None = None

    # Methods that an author writes.

    @classmethod
    @abstractmethod
    def supports(cls, request: BuildRequest) -> str | None:
        """Return None if the strategy gives the right reference for this policy here, else a sentence that says why
        not."""

    @classmethod
    @abstractmethod
    def cost(cls, request: BuildRequest) -> Cost:
        """Return the cost that the strategy would add on a rank, computed from `request.shape`. "auto" takes the
        cheapest strategy."""

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        """Return True if "auto" may take the strategy where `supports` allows it. By default users must ask for it by
        name."""
        return False

    @classmethod
    @abstractmethod
    def why(cls, request: BuildRequest) -> str:
        """Return the reason that "auto" gives for this strategy, without a full stop."""

    @classmethod
    @abstractmethod
    def build(cls, request: BuildRequest, reason: str) -> Reference:
        """Build the reference. `supports` has returned None."""

    @abstractmethod
    def score(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
    ) -> TokenScores:
        """Return log-probabilities of the scored tokens under the reference, without grad, on the batch's device.

        Args:
            batch: the sequences to score.
            temperature: divides the logits; give the policy the same.
            entropy: if True, also return the entropy of each predicting distribution.
            hidden: if True, also return the hidden states that enter the output head.

        Raises:
            ValueError: the reference cannot return the entropies or hidden states that were asked for.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON data that identifies this model: never empty, and equal only for equal models.

        If the model is elsewhere, ask there at each call, for example for a checkpoint's hash, a revision or a version:
        `verify` compares the answers.
        """

    # Methods that follow from those.

    def fingerprint(self) -> str:
        """Return 64 hex digits computed from `identity`, and record them.

        Raises:
            ValueError: `identity` is empty, so two different models would have the same fingerprint.
        """
        if not (found := self.identity()):
            raise ValueError(
                f"The reference of strategy {self.strategy!r} does not say which model it is: its identity() is empty, "
                "so any other model would pass for it. Return data that identifies the model, such as a checkpoint's "
                "hash."
            )
        self._recorded = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        return self._recorded

    @property
    def recorded_fingerprint(self) -> str | None:
        """The fingerprint when it was last computed; None after an update until it is computed again."""
        return self._recorded

    @property
    def scored_as(self) -> str:
        """The fingerprint that scores of the reference carry in its current state."""
        return self.recorded_fingerprint or self.fingerprint()

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each weight when the fingerprint was last computed; empty if no weights are in this process."""
        return {}

    def verify(self, count: int | None = None) -> None:
        """Raise ValueError if the reference changed without an `update` or `load`.

        Args:
            count: number of weights to check, the next ones at each call; None checks all.
        """
        before = self.recorded_fingerprint
        if before is not None and self.fingerprint() != before:
            self._recorded = before
            raise ValueError(
                f"The reference changed without an update or load: the model that strategy {self.strategy!r} scores "
                f"with is now {self.identity()}. Score with the recorded model, or build the reference again."
            )

    def provenance(self) -> dict[str, Any]:
        """Return the record of this reference: strategy, reason, source, updates, fingerprint (collective if the
        reference is sharded), and the versions of the libraries."""
        return {
            "strategy": self.strategy,
            "reason": self.reason,
            "source": self.source,
            "updates": self.updates,
            # The recorded one: computing it again would accept an unexplained change.
            "fingerprint": self.recorded_fingerprint or self.fingerprint(),
            "versions": library_versions(),
        }

    def score_conditions(self, batch: TokenBatch) -> dict[str, Any]:
        """Return JSON data on which the scores depend besides the batch: the key of a cache. May be collective."""
        return {"fingerprint": self.recorded_fingerprint or self.fingerprint(), "identity": self.identity()}

    @property
    def uncached(self) -> Reference:
        """The reference that scores, without the cache in front of it."""
        return self
