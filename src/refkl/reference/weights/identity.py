"""Which numbers a reference has, and whether they are still those that were recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from refkl.backend import Weight
from refkl.reference.weights.fingerprint import combined, digests


class Identity:
    """The fingerprint of a reference's weights, and the digests that it was made from.

    Args:
        weights: lists every weight of the reference, as far as this rank holds it.
    """

    def __init__(self, weights: Callable[[], Iterator[Weight]]) -> None:
        self._weights = weights
        self.recorded: str | None = None
        """The fingerprint when it was last taken; None from an update until it is taken again."""
        self.digests: dict[str, str] = {}
        """The digest of each weight at that time: to name the one that changed."""
        self._verified = 0
        self._scored_as: str | None = None
        self._last = ""
        self._changes = 0

    def take(self) -> str:
        """Return the fingerprint of the weights as they are, and record it. Collective if a weight is sharded."""
        self.digests = digests(self._weights())
        self.recorded = self._last = combined(self.digests)
        self._changes = 0
        if self._scored_as is not None and "+" not in self._scored_as:
            self._scored_as = None
        return self.recorded

    @property
    def scored_as(self) -> str:
        """The name that scores of the current weights carry: the fingerprint; if none was taken since they changed, the
        last one with the number of changes since.

        It stays the same until the weights change, also if the fingerprint is taken meanwhile: scores of one model
        must carry one name.
        """
        if self._scored_as is None:
            self._scored_as = self.recorded or f"{self._last}+{self._changes}"
        return self._scored_as

    def forget(self) -> None:
        """Forget the fingerprint: the weights have changed, as they were meant to."""
        self._changes += 1
        self.recorded = self._scored_as = None

    @contextmanager
    def replaced_by(self, fingerprint: str) -> Iterator[None]:
        """Let another fingerprint be the recorded one while open."""
        present = self._state()
        self.recorded = self._scored_as = fingerprint
        try:
            yield
        finally:
            self._restore(present)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Bring back what is recorded now if an error is raised while open."""
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
        """Compare weights with the recorded digests: `count` of them, the next ones at each call, or all.

        Raises:
            ValueError: a weight has changed; it is named.
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
