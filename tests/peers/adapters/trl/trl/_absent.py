"""Names of TRL's that refkl has nothing for: TRL's test files import them for tests that are left out."""

from __future__ import annotations

from collections.abc import Callable


def absent(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def called(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"refkl has nothing in the place of TRL's {name}")

    return called
