"""TRL's tests import names from here; none of them is refkl's."""

from trl._absent import absent as __getattr__

__all__ = ["__getattr__"]
