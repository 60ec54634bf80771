"""The fingerprint of a reference's weights, and the check that they still match the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from refkl.backend import Weight
from refkl.reference.weights.fingerprint import combined, digests


class Identity:
    """The fingerprint of a reference's weights, and the digests from which it was computed.

    Args:
        weights: lists every weight of the reference, as far as this rank holds it.
    """

    def __init__(self, weights: Callable[[], Iterator[Weight]]) -> None:
        self._weights = weights
        self.recorded: str | None = None
        """The fingerprint when it was last computed; None after an update until it is computed again."""
        self.digests: dict[str, str] = {}
        """The digest of each weight at that time, to name the weight that changed."""
        self._verified = 0
        self._scored_as: str | None = None
        self._last = ""
        self._changes = 0

    def take(self) -> str:
        """Compute the fingerprint of the present weights, record and return it. Collective if a weight is sharded."""
        self.digests = digests(self._weights())
        self.recorded = self._last = combined(self.digests)
        self._changes = 0
        if self._scored_as is not None and "+" not in self._scored_as:
            self._scored_as = None
        return self.recorded

    @property
    def scored_as(self) -> str:
        """The name that scores of the current weights carry: the fingerprint or, if none was computed since the weights
        changed, the last one with the number of changes since.

        It stays the same until the weights change, even if the fingerprint is computed in between: all scores of one
        model must carry one name.
        """
        if self._scored_as is None:
            self._scored_as = self.recorded or f"{self._last}+{self._changes}"
        return self._scored_as

    def forget(self) -> None:
        """Forget the fingerprint after an intended change of the weights."""
        self._changes += 1
        self.recorded = self._scored_as = None

    @contextmanager
    def replaced_by(self, fingerprint: str) -> Iterator[None]:
        """Record another fingerprint while this is open."""
        present = self._state()
        self.recorded = self._scored_as = fingerprint
        try:
            yield
        finally:
            self._restore(present)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restore the present record if an error is raised while this is open."""
        present = self._state()
        try:
            yield
        except BaseException:
            self._restore(present)
            raise

    def _state(self) -> tuple[Any, ...]:
        return self.recorded, self.digests, self._scored_as, self._last, self._changes

    def _restore(self, state: tuple[Any, ...]) -> None:
        self.recorded, self.digests, self._scored_as, self._last, self._changes = state

    def verify(self, count: int | None) -> None:
        """Compare weights with the recorded digests: the next `count` weights at each call, or all if it is None.

        Raises:
            ValueError: a weight has changed; the message names it.
        """
        if self.recorded is None:
            self.take()
            return
        names = sorted(self.digests)
        if count is not None:
            start, self._verified = self._verified % len(names), self._verified + count
            names = [*names, *names][start : start + min(count, len(names))]
        chosen = set(names)
        found = digests(w for w in self._weights() if w.name in chosen)
        if changed := [name for name, digest in found.items() if digest != self.digests[name]]:
            raise ValueError(
                f"The reference changed without an update or load: {changed[0]} has other values "
                f"({len(changed)} of the {len(found)} weights that were checked)."
            )
