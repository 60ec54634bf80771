"""Settings of the tests with random examples, in tests/hostile."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

USUAL, HOSTILE = "refkl", "refkl-hostile"
"""Profiles of Hypothesis; conftest.py loads one."""
_TIMES = 20
"""Number of examples with `--hostile`, for each one without."""
_COMMON: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "print_blob": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile(USUAL, max_examples=100, **_COMMON)
settings.register_profile(HOSTILE, max_examples=100 * _TIMES, **_COMMON)


def examples(count: int, **more: Any) -> settings:
    """Return settings with `count` examples, or 20 times as many with `--hostile`."""
    return settings(max_examples=max(1, count * settings.default.max_examples // 100), **more)
