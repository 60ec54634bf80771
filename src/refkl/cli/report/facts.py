"""The text and tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from refkl.cli.report.runs import Run, flat
from refkl.cli.tables import first_to_last

_UNKNOWN = "—"


@dataclass(frozen=True)
class Row:
    """One line of a table with a column for each run."""

    name: str
    cells: list[str]
    """Text; a fingerprint is complete here, and the page shortens it."""
    differs: bool
    code: bool = False


def overview(runs: Sequence[Run]) -> list[Row]:
    """Return the most important facts. A course is shown from the mean of the first steps to that of the last."""
    rows = [
        _row("status", runs, lambda run: str(run.reference.get("status", _UNKNOWN))),
        _row("steps", runs, lambda run: str(run.steps[-1]["step"]) if run.steps else "none yet"),
        _row("reward", runs, lambda run: _course(run, "reward")),
        _row("reward margin", runs, lambda run: _course(run, "rewards/margins")),
        _row("KL, nats per token", runs, lambda run: _course(run, "kl")),
        _row("KL, nats per sequence", runs, lambda run: _course(run, "kl/sequence")),
        _row("KL to the first reference", runs, lambda run: _course(run, "kl/first")),
        _row("KL coefficient", runs, lambda run: _course(run, "kl/coef", most=1)),
        _row("reference", runs, lambda run: str(_record(run).get("strategy", _UNKNOWN))),
        _row("moves of the reference", runs, lambda run: str(len(run.updates))),
    ]
    return [row for row in rows if set(row.cells) != {_UNKNOWN}]


def warnings(runs: Sequence[Run]) -> list[str]:
    """Return notes that a reader should know before comparing the numbers."""
    found = []
    prints = {run.reference["before"]["fingerprint"] for run in runs if run.reference.get("before")}
    if len(prints) > 1:
        found.append(
            "These runs began from different references (see their fingerprints below), so their KLs are to different "
            "models."
        )
    for run in runs:
        if not run.steps:
            found.append(f"{run.name} has logged no training step yet.")
        elif (status := run.reference.get("status")) not in ("finished", None):
            found.append(f"{run.name} is not finished: {status} at step {run.steps[-1]['step']}.")
        if run.updates:
            times = "once" if len(run.updates) == 1 else f"{len(run.updates)} times"
            first = "kl/first is to the first one" if run.has("kl/first") else "no KL here is to the first one"
            found.append(
                f"The reference of {run.name} moved {times}: its KL is to the reference at that step; {first}."
            )
        if floor := _record(run).get("kl_floor"):
            found.append(
                f"The reference of {run.name} is quantised: a KL below {floor['mean']:.2g} nats per token is rounding."
            )
        names = [name for name, there in (("samples.jsonl", run.samples), ("reference.json", run.reference),
                                          ("config.yaml", run.config)) if not there]  # fmt: skip
        if names:
            found.append(f"{run.name} has no {', no '.join(names)}.")
    return found


def provenance(runs: Sequence[Run]) -> list[Row]:
    """Return the identity of each run's reference."""
    rows = [
        _row("strategy", runs, lambda run: _said(run, "strategy")),
        _row("reason", runs, lambda run: _said(run, "reason")),
        _row("source", runs, lambda run: _said(run, "source")),
        _row("quantised to", runs, lambda run: _said(run, "quantize")),
        _row("KL floor", runs, _floor),
        _row("fingerprint before", runs, lambda run: _fingerprint(run, "before"), code=True),
        _row("fingerprint after", runs, lambda run: _fingerprint(run, "after"), code=True),
        _row("moves", runs, _moves),
        _row("versions", runs, _versions),
    ]
    return [row for row in rows if set(row.cells) != {_UNKNOWN}]


def config_differences(runs: Sequence[Run]) -> list[Row]:
    """Return the settings that differ between the runs."""
    if len(runs) < 2:
        return []
    settings = [dict(flat(run.settings)) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [Row(name, [_setting(one, name) for one in settings], False) for name in names]
    # A run of another method has other settings; a missing one counts as null.
    return [row for row in rows if len({_UNKNOWN if cell == "null" else cell for cell in row.cells}) > 1]


def _row(name: str, runs: Sequence[Run], of: Callable[[Run], str], *, code: bool = False) -> Row:
    cells = [of(run) for run in runs]
    return Row(name, cells, len(set(cells)) > 1, code)


def _record(run: Run) -> dict[str, Any]:
    """Return the last record of the reference."""
    return run.reference.get("after") or run.reference.get("before") or {}


def _said(run: Run, key: str) -> str:
    return str(_record(run).get(key, _UNKNOWN))


def _fingerprint(run: Run, when: str) -> str:
    return str((run.reference.get(when) or {}).get("fingerprint", _UNKNOWN))


def _floor(run: Run) -> str:
    floor = _record(run).get("kl_floor")
    return _UNKNOWN if not floor else f"{floor['mean']:.3g} nats per token, {floor['max']:.3g} at most"


def _moves(run: Run) -> str:
    """Describe the first few updates of the reference."""
    if not run.reference:
        return _UNKNOWN
    if not run.updates:
        return "never"
    said = []
    for update in run.updates[:_LISTED]:
        reset = "" if update.get("kl") is None else f", as the KL was {update['kl']:.3g}"
        stamp = "" if "fingerprint" not in update else f", to {update['fingerprint'][:12]}"
        said.append(f"step {update['step']} (alpha {update['alpha']:.3g}{reset}{stamp})")
    rest = len(run.updates) - _LISTED
    return "; ".join(said) + (f"; {rest} more, the last at step {run.updates[-1]['step']}" if rest > 0 else "")


_LISTED = 6


def _versions(run: Run) -> str:
    found = run.reference.get("versions") or _record(run).get("versions")
    return _UNKNOWN if not found else ", ".join(f"{name} {version}" for name, version in found.items())


def _course(run: Run, key: str, most: int = 10) -> str:
    """Describe a measurement by the means of its first and last steps; one number if they are the same."""
    values = run.series(key)[1]
    if not values:
        return _UNKNOWN
    first, last = (f"{mean:.3g}" for mean in first_to_last(values, most))
    return first if first == last else f"{first} → {last}"


def _setting(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return _UNKNOWN
    return yaml.safe_dump(settings[name], default_flow_style=True, width=1000).removesuffix("...\n").strip()
