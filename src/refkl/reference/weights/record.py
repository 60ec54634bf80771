"""The JSON record of a saved reference, checked field by field before anything uses it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refkl.files import inside, read_json
from refkl.reference.weights.fingerprint import combined

_DIGEST = re.compile(r"torch\.\w+ \[(\d+(?:, \d+)*)?\] [0-9a-f]{16}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
KEPT = ("mean", "lost", "start", "first")
"""The kinds of tensor that a moving reference keeps for a weight: fields of `moving.average.Averages`."""
_AVERAGE = re.compile(rf"({'|'.join(KEPT)}):.+", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """The fields of a saved reference's record that `Reference.load` uses."""

    weights: dict[str, str]
    """The digest of every weight, by name."""
    averages: dict[str, str]
    """The digest of every tensor that a moving reference keeps, by a name such as "mean:model.norm.weight"."""
    shapes: dict[str, torch.Size]
    """The shape of everything in the files, averages included."""
    files: list[str]
    """Names of the weights' files; all are in the folder itself."""
    scalings: dict[str, float]
    """The scaling of each LoRA layer, by the name of its B; empty in older folders."""
    updates: int
    fingerprint: str
    first: str | None
    """The fingerprint before the first move; None if that state was not kept."""
    kl_floor: dict[str, Any] | None
    """The KL floor of a quantised reference."""


def read_record(path: Path) -> Record:
    """Read and check a record.

    Raises:
        ValueError: it is damaged: a field is missing, or has a value that refkl does not write there.
    """
    field = _fields_of(path)
    record = Record(
        weights=field("weights", _digests, "the digest of each weight"),
        averages=field(
            "averages", lambda v: _digests(v) and all(map(_AVERAGE.fullmatch, v)), "the digest of each kept average"
        ),
        shapes={
            name: torch.Size(shape)
            for name, shape in field("shapes", _shapes, "a list of sizes for each tensor in the files").items()
        },
        files=field("files", _names, "names of safetensors files in the folder itself"),
        scalings=field("scalings", _numbers, "a finite number for each LoRA layer", {}),
        updates=field("updates", _count, "a whole number of at least 0"),
        fingerprint=field("fingerprint", _fingerprint, "64 hex digits"),
        first=field("first", lambda v: v is None or _fingerprint(v), "64 hex digits or null", None),
        kl_floor=field("kl_floor", lambda v: v is None or _floor(v), "mean and max in nats, and tokens", None),
    )
    if unknown := sorted(record.shapes.keys() - record.weights.keys() - record.averages.keys()):
        raise ValueError(f"{path} is damaged: {unknown[0]!r} has a shape, but no digest.")
    if missing := sorted(record.averages.keys() - record.shapes.keys()):
        raise ValueError(f"{path} is damaged: {missing[0]!r} has a digest, but no shape.")
    if record.fingerprint != combined(record.weights):
        raise ValueError(f"{path} is damaged: its fingerprint is not the one of the digests in it.")
    return record


def read_description(path: Path) -> dict[str, Any]:
    """Read a checkpoint's description of its reference: `Reference.provenance`, and "saved" if the weights are there.

    Raises:
        ValueError: it is damaged: a field is missing, or has a value that refkl does not write there.
    """
    field = _fields_of(path)
    return {
        "saved": field("saved", lambda v: isinstance(v, bool), "true or false"),
        "updates": field("updates", _count, "a whole number of at least 0"),
        "fingerprint": field("fingerprint", _fingerprint, "64 hex digits"),
        "strategy": field("strategy", lambda v: isinstance(v, str), "a strategy's name"),
        "source": field("source", lambda v: isinstance(v, str), "the source of the weights"),
        "kl_floor": field("kl_floor", lambda v: v is None or _floor(v), "mean and max in nats, and tokens", None),
    }


def _fields_of(path: Path) -> Callable[..., Any]:
    found = read_json(path)

    def field(name: str, right: Callable[[Any], bool], expected: str, *default: Any) -> Any:
        if name not in found and default:
            return default[0]
        value = found.get(name)
        if name not in found or not right(value):
            shown = f"is {str(value)[:80]!r}" if name in found else "is missing"
            raise ValueError(
                f"{path} is damaged: {name!r} {shown}, but must be {expected}. Use another copy of the folder, or save "
                "it again."
            )
        return value

    return field


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _digests(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) and _DIGEST.fullmatch(v) for v in value.values())


def _shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**63 for size in shape)
        for shape in value.values()
    )


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(inside(name) and name.endswith(".safetensors") for name in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _fingerprint(value: Any) -> bool:
    return isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None


def _floor(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"mean", "max", "tokens"}
        and type(value["tokens"]) is int
        and all(type(value[name]) in (int, float) for name in ("mean", "max"))
    )
