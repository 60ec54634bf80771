"""Helpers for messages: the nearest match to an unknown name, and readable sizes."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RunError(RuntimeError):
    """Error for a run that cannot continue although its configuration is correct; the message says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence " Did you mean 'x'?" with the known name closest to `name`, or "" if none is close."""
    matches = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def size(count: float) -> str:
    """Format a number of bytes: "3.6 kB", "28.0 GB"."""
    left = float(count)
    for unit in ("bytes", "kB", "MB"):
        if left < 999.5:
            return f"{left:.0f} bytes" if unit == "bytes" else f"{left:.1f} {unit}"
        left /= 1000
    return f"{left:,.1f} GB"


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name: the name, the nearest match, and all known names."""
    options = sorted(known)
    return ValueError(f"Unknown {kind} {name!r}.{nearest(name, options)} Known: {', '.join(options)}.")
