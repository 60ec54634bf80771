"""TRL's tests take their base class and conditions from here."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

_case = unittest.TestCase()


class TrlTestCase:
    """For TRL's earlier tests, which are unittest's, and for its present ones, whose parameters are pytest's."""

    assertTrue = staticmethod(_case.assertTrue)
    assertFalse = staticmethod(_case.assertFalse)

    def setup_method(self) -> None:
        self.setUp()

    def setUp(self) -> None:
        pass


def __getattr__(name: str) -> Callable[[Any], Any]:
    """Conditions (`require_…`) are about TRL's own code, such as kernels that need a GPU: refkl's run everywhere."""
    if not name.startswith("require_"):
        raise AttributeError(name)
    return lambda test: test
