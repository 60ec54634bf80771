"""Locks on modules: one thread runs a module at a time, and the policy never runs while it holds a reference's weights.

Strategies that score inside the policy's own module (`swap`, `adapter`) borrow it while they score. Another thread
waits for them. The thread that borrowed it cannot wait for itself, so running the policy there raises an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from refkl.backend.modules import unwrap


class Use:
    """Lock of one module, and its present borrower."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._borrower: Any = None
        self.what = ""
        """Name of the open context that has borrowed it, such as "reference.logits"; empty if there is none."""
        self._depth = 0
        self._scoring = 0

    @contextmanager
    def borrowed(self, borrower: Any, what: str) -> Iterator[None]:
        """Hold the module for `borrower` while open; other threads wait.

        Args:
            borrower: the reference. It may borrow a module again that it has borrowed.
            what: for error messages, such as "reference.logits".

        Raises:
            ValueError: another reference has borrowed the module in this thread.
        """
        with self.lock:
            if self._borrower not in (None, borrower):
                raise ValueError(
                    f"{self.what} of another reference is open, and its weights are in the policy, which this "
                    "reference needs too. Leave that context first."
                )
            before = self.what
            self._borrower, self._depth = borrower, self._depth + 1
            self.what = before or what
            try:
                yield
            finally:
                self._depth -= 1
                self.what = before
                if not self._depth:
                    self._borrower = None

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Allow the borrower to run the module itself: `running` raises no error meanwhile. The lock must be held."""
        self._scoring += 1
        try:
            yield
        finally:
            self._scoring -= 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the module while it runs with its own weights; wait while another thread has borrowed it.

        Raises:
            ValueError: this thread has borrowed it.
        """
        with self.lock:
            if self._borrower is not None and not self._scoring:
                raise ValueError(
                    f"{self.what} is open, so the policy holds the reference's weights: its scores would be the "
                    "reference's. Score the policy before or after that context."
                )
            yield


_USES: WeakKeyDictionary[nn.Module, Use] = WeakKeyDictionary()
_MAKING = threading.Lock()


def use_of(model: nn.Module) -> Use:
    """Return the Use of this model: one object per model, with or without wrappers."""
    inner = unwrap(model)
    with _MAKING:
        if inner not in _USES:
            _USES[inner] = Use()
        return _USES[inner]
