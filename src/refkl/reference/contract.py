"""The contract of a reference: what users call, and what the author of a strategy writes.

An author writes `supports`, `cost`, `why`, `build`, `score` and `identity`. Everything else is optional, and refuses by
name until it is written: a reference never answers wrongly, or silently not at all. A reference whose weights are in
this process starts from `HeldReference` instead, which has all of it and asks for `activate` and `weights`.
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
    """The fields of ReferenceConfig, beside `strategy`, `cache` and `options`, that the strategy honours. Another one
    that is set is refused before `supports` is asked."""

    reason: str
    """One sentence: why this strategy."""
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

    # What an author writes.

    @classmethod
    @abstractmethod
    def supports(cls, request: BuildRequest) -> str | None:
        """Return None if the strategy gives the right reference for this policy here, else a sentence: why not."""

    @classmethod
    @abstractmethod
    def cost(cls, request: BuildRequest) -> Cost:
        """Return what the strategy would add on a rank, counted from `request.shape`. Auto takes the cheapest."""

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        """Return True if auto may take the strategy, given that it can. By default it has to be asked for by name."""
        return False

    @classmethod
    @abstractmethod
    def why(cls, request: BuildRequest) -> str:
        """Return the reason that auto gives for this strategy, without a full stop."""

    @classmethod
    @abstractmethod
    def build(cls, request: BuildRequest, reason: str) -> Reference:
        """Make the reference. `supports` has returned None."""

    @abstractmethod
    def score(
        self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False, hidden: bool = False
    ) -> TokenScores:
        """Return log-probabilities of the scored tokens under the reference, without grad, on the batch's device.

        Args:
            batch: what to score.
            temperature: divides the logits; give the policy the same.
            entropy: also the entropy of each predicting distribution.
            hidden: also the states that enter the output head.

        Raises:
            ValueError: the reference does not offer what was asked for.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells this model from every other one, as JSON: never empty, equal only for equal models.

        For a model elsewhere, ask there (a checkpoint's hash, a revision, a version), at each call: `verify` compares.
        """

    # What follows from those.

    def fingerprint(self) -> str:
        """Return 64 hex digits that stand for `identity`, and record them.

        Raises:
            ValueError: `identity` is empty, so that two different models would be the same.
        """
        if not (found := self.identity()):
            raise ValueError(
                f"The reference of strategy {self.strategy!r} does not say which model it is: its identity() is empty, "
                "and any other model would pass for it."
            )
        self._recorded = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        return self._recorded

    @property
    def recorded_fingerprint(self) -> str | None:
        """The fingerprint when it was last taken; None from an update until it is taken again."""
        return self._recorded

    @property
    def scored_as(self) -> str:
        """The fingerprint that scores of the reference carry in its current state."""
        return self.recorded_fingerprint or self.fingerprint()

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each weight when the fingerprint was last taken; empty if no weights are in this process."""
        return {}

    def verify(self, count: int | None = None) -> None:
        """Raise ValueError if the reference changed with no `update` or `load` to explain it.

        Args:
            count: how many weights to look at, the next ones at each call; None looks at all.
        """
        before = self.recorded_fingerprint
        if before is not None and self.fingerprint() != before:
            self._recorded = before
            raise ValueError(
                f"The reference changed though nothing was to update it: what strategy {self.strategy!r} scores with "
                f"is now {self.identity()}."
            )

    def provenance(self) -> dict[str, Any]:
        """Return what to record of this reference: strategy, reason, source, updates, fingerprint (collective if the
        reference is sharded), and the versions of the libraries."""
        return {
            "strategy": self.strategy,
            "reason": self.reason,
            "source": self.source,
            "updates": self.updates,
            # What it was when recorded: taking it anew would approve of a change.
            "fingerprint": self.recorded_fingerprint or self.fingerprint(),
            "versions": library_versions(),
        }

    def score_conditions(self, batch: TokenBatch) -> dict[str, Any]:
        """Return what the scores depend on beside the batch, as JSON: the key of a cache. May be collective."""
        return {"fingerprint": self.recorded_fingerprint or self.fingerprint(), "identity": self.identity()}

    @property
    def uncached(self) -> Reference:
        """The reference that scores, without the cache in front of it."""
        return self
