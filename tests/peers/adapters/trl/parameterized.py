"""The one thing that TRL's earlier tests take from the package of this name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


class parameterized:
    @staticmethod
    def expand(cases: Sequence[tuple[Any, ...]]) -> Callable[[Callable[..., None]], None]:
        """A test method for each case in the class that is being defined, called NAME[VALUE-VALUE], as pytest does."""

        def decorate(test: Callable[..., None]) -> None:
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            for case in cases:
                frame.f_back.f_locals[f"{test.__name__}[{'-'.join(map(str, case))}]"] = _with(test, case)

        return decorate


def _with(test: Callable[..., None], case: tuple[Any, ...]) -> Callable[[Any], None]:
    def method(self: Any) -> None:
        test(self, *case)

    return method
