"""pytest plugin of the process that runs the peers' tests: applies the selection, and can break refkl on purpose.

    python -m pytest -p peers.plugin FOLDER        # FOLDER as `archives.lay_out` makes it

REFKL_PEERS names the peers of the run, REFKL_PEERS_REPORT a file for the outcomes, test id -> [outcome, what it
printed]. REFKL_PEERS_BREAK=1 breaks what the adapters call.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Before the peers' tests: one of them puts mocks in the place of peft and deepspeed while it imports its package.
import refkl
from peers.selection import PeerFile, files, names_of

_outcomes: dict[str, tuple[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    os.chdir(config.rootpath)  # TRL's tests find their models here, by the names of the hub
    if os.environ.get("REFKL_PEERS_BREAK"):
        break_refkl()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = files(os.environ["REFKL_PEERS"].split(","))
    found: dict[str, set[str]] = {path: set() for path in selected}
    kept, left_out = [], []
    for item in items:
        path, _, test = item.nodeid.partition("::")
        file = selected[path]
        names = names_of(test)
        found[path] |= names
        if names & file.left_out.keys() or (file.only and not names & set(file.only)):
            left_out.append(item)
            continue
        if deviation := file.deviations.get(test):
            error = pytest.RaisesExc(AssertionError, match=deviation.message)
            item.add_marker(pytest.mark.xfail(strict=True, raises=error, reason=deviation.reason))
        kept.append(item)
    for path, file in selected.items():
        _check_found(path, file, found[path])
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _check_found(path: str, file: PeerFile, found: set[str]) -> None:
    if stale := sorted({*file.left_out, *file.deviations, *file.only} - found):
        raise pytest.UsageError(f"tests/peers/selection.py names tests that {path} does not have: {stale}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        expected = report.outcome == "skipped" and bool(getattr(report, "wasxfail", ""))
        _outcomes[report.nodeid] = ("deviates" if expected else report.outcome, report.longreprtext)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    Path(os.environ["REFKL_PEERS_REPORT"]).write_text(json.dumps(_outcomes))
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        # The report says which; test_peers.py judges file by file. Any other exit status stays an error.
        session.exitstatus = pytest.ExitCode.OK


def break_refkl() -> None:
    """Errors in what the adapters call, each of a kind that has been made before. Only for this process."""
    estimate, aggregate, score_tokens = refkl.kl.estimate, refkl.kl.aggregate, refkl.score_tokens
    token_logp, linear_logp = refkl.kl.token_logp, refkl.kl.linear_logp
    swapped = {"reverse_kl": "autograd", "autograd": "reverse_kl"}

    def other_gradient(*args: Any, gradient: str = "reverse_kl", **options: Any) -> Any:
        return estimate(*args, gradient=swapped.get(gradient, gradient), **options)

    def own_count(*args: Any, normalizer: object = None, **options: Any) -> Any:
        return aggregate(*args, **options)

    def no_temperature(score: Any) -> Any:
        return lambda *args, temperature=1.0, **options: score(*args, **options)

    def in_16_bits(logits: Any, *args: Any, **options: Any) -> Any:
        return token_logp(logits.bfloat16(), *args, **options)

    refkl.kl.estimate = other_gradient  # type: ignore[assignment]
    refkl.kl.aggregate = own_count  # type: ignore[assignment]
    refkl.score_tokens = no_temperature(score_tokens)
    refkl.kl.linear_logp = no_temperature(linear_logp)
    refkl.kl.token_logp = in_16_bits  # type: ignore[assignment]
    refkl.build_reference = lambda policy, *args: SimpleNamespace(model=policy)  # type: ignore[assignment,return-value]
