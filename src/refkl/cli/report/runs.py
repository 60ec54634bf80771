"""Reading of run folders for a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from refkl.cli.run_folder import read_lines
from refkl.files import read_json
from refkl.yaml_files import read_yaml


@dataclass(frozen=True)
class Run:
    """The contents of one run folder."""

    name: str
    """The folder's name, with enough of the path before it to distinguish it from the other runs."""
    path: Path
    steps: list[dict[str, Any]]
    """The logged training steps, in order."""
    columns: dict[str, tuple[list[int], list[float]]]
    """Steps with a finite number and the numbers, by name."""
    updates: list[dict[str, Any]]
    """The updates of the reference."""
    samples: list[dict[str, Any]]
    reference: dict[str, Any]
    """reference.json; empty if it is missing."""
    config: str
    """The text of config.yaml; empty if it is missing."""
    settings: dict[str, Any]
    """config.yaml parsed."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps with a finite number of this name, and the numbers."""
        return self.columns.get(key, ([], []))

    def has(self, key: str) -> bool:
        """Return True if any step logged a finite number of this name."""
        return key in self.columns


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs, and give them distinct names.

    Raises:
        ValueError: a path is not a run folder, is damaged, or is given twice.
    """
    whole = [path.resolve() for path in paths]
    for number, path in enumerate(whole):
        if path in whole[:number]:
            raise ValueError(f"The run folder {paths[number]} is given twice.")
    return [read_run(path, name) for path, name in zip(paths, _names(whole), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Read a run folder; only metrics.jsonl is required.

    Raises:
        ValueError: not a run folder, or a damaged file.
    """
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is not a run folder: it has no metrics.jsonl.")
    lines = _records(path / "metrics.jsonl")
    for line in lines:
        found = line.get("reference_update", line)
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise ValueError(f"{path / 'metrics.jsonl'} is damaged: a line has no step.")
    samples = _records(path / "samples.jsonl") if (path / "samples.jsonl").is_file() else []
    for sample in samples:
        if not {"step", "prompt", "completion"} <= sample.keys():
            raise ValueError(f"{path / 'samples.jsonl'} is damaged: a line lacks step, prompt or completion.")
        lengths = {len(sample[name]) for name in ("tokens", "log_ratio", "kl_per_token") if name in sample}
        if len(lengths) > 1:
            raise ValueError(f"{path / 'samples.jsonl'} is damaged: a line must have one number per token.")
    config = _text(path / "config.yaml")
    steps = [line for line in lines if "loss" in line]
    return Run(
        name=name,
        path=path,
        steps=steps,
        columns=_columns(steps),
        updates=[line["reference_update"] for line in lines if "reference_update" in line],
        samples=samples,
        reference=_reference(path / "reference.json"),
        config=config,
        settings=_settings(path / "config.yaml", config),
    )


def finite(value: Any) -> float | None:
    """Return the value if it is a finite number, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def running_mean(values: Sequence[float], span: int = 5) -> list[float]:
    """Return the mean of each value with up to `span` - 1 before it."""
    return [
        sum(values[max(0, i - span + 1) : i + 1]) / len(values[max(0, i - span + 1) : i + 1])
        for i in range(len(values))
    ]


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """Return indices of at most `limit` values: the first, the last, and the extremes of equal spans between them."""
    if len(values) <= limit:
        return list(range(len(values)))
    spans = max(1, (limit - 2) // 2)
    bounds = [1 + (len(values) - 2) * i // spans for i in range(spans + 1)]
    kept = {0, len(values) - 1}
    for start, end in pairwise(bounds):
        kept |= {min(range(start, end), key=values.__getitem__), max(range(start, end), key=values.__getitem__)}
    return sorted(kept)


def flat(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting with its path, such as "kl.coef"."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, settings


def _columns(steps: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for row in steps:
        for key, value in row.items():
            if finite(value) is not None:
                at, values = columns.setdefault(key, ([], []))
                at.append(row["step"])
                values.append(value)
    return columns


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    for length in range(1, max((len(path.parts) for path in paths), default=1)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _records(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict):
            raise ValueError(f"{path} is damaged in line {number}.")
    return lines


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _reference(path: Path) -> dict[str, Any]:
    return read_json(path) if _text(path) else {}


def _settings(path: Path, text: str) -> dict[str, Any]:
    found = read_yaml(path) if text else {}
    return found if isinstance(found, dict) else {}
