"""Which versions something was made with."""

from __future__ import annotations

from importlib.metadata import version

PACKAGES = ("refkl", "torch", "transformers", "accelerate", "peft", "trl")


def library_versions() -> dict[str, str]:
    """The versions of refkl and of what it stands on, by package."""
    return {package: version(package) for package in PACKAGES}
