"""Versions of refkl and its main dependencies, for records."""

from __future__ import annotations

from importlib.metadata import version

PACKAGES = ("refkl", "torch", "transformers", "accelerate", "peft", "trl")


def library_versions() -> dict[str, str]:
    """Return the versions of refkl and its main dependencies, by package."""
    return {package: version(package) for package in PACKAGES}
