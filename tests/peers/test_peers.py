"""The published tests of OpenRLHF and verl, run against refkl in the place of their own code (docs/peers.md).

python -m pytest tests/peers                   # downloads 2 MB, once
REFKL_NEED_PEERS=1 python -m pytest ...        # no package index within reach is a failure, not a skip
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from launching import ROOT, run

import refkl
from peers.archives import NoIndexError, lay_out
from peers.selection import PEERS, files

pytestmark = pytest.mark.peers
FILES = files()
Outcomes = dict[str, dict[str, tuple[str, str]]]
"""File -> test -> ("passed", "failed" or "deviates", and what a failure printed)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    try:
        lay_out(folder)
    except NoIndexError as error:
        if os.environ.get("REFKL_NEED_PEERS"):
            raise
        pytest.skip(f"the peers' tests did not run: {error}")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    return run_peers(folder)


def run_peers(folder: Path, *, broken: bool = False) -> Outcomes:
    """The peers' tests in a process of their own."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    source = Path(refkl.__file__).parents[1]
    pytest_ini = ("-c", str(folder / "pytest.ini"), "--rootdir", str(folder))
    paths = (str(folder / path) for path in FILES)
    run(
        [sys.executable, "-m", "pytest", "-p", "peers.plugin", "-p", "no:cacheprovider", *pytest_ini, *paths],
        timeout=140,
        # verl's tests import verl, which is the adapter; OpenRLHF's look for its files beside themselves.
        PYTHONPATH=os.pathsep.join(map(str, (folder / "verl", ROOT / "tests", source))),
        PYTEST_ADDOPTS="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        REFKL_PEERS_REPORT=str(report),
        REFKL_PEERS_BREAK="1" if broken else "",
    )
    result: Outcomes = {path: {} for path in FILES}
    for nodeid, outcome in json.loads(report.read_text()).items():
        path, _, test = nodeid.partition("::")
        result[path][test] = tuple(outcome)
    return result


@pytest.mark.parametrize("path", FILES)
def test_refkl_passes_what_the_peer_tests(path: str, outcomes: Outcomes) -> None:
    file = FILES[path]
    tests = outcomes[path]
    failures = [f"{test}\n{text}" for test, (outcome, text) in tests.items() if outcome == "failed"]
    assert not failures, "\n\n".join(failures)
    assert Counter(outcome for outcome, _ in tests.values()) == Counter(
        passed=file.passes, deviates=len(file.deviations)
    )


def test_broken_refkl_fails_in_every_file(folder: Path) -> None:
    """Otherwise the adapters would be testing themselves."""
    for path, tests in run_peers(folder, broken=True).items():
        assert "failed" in {outcome for outcome, _ in tests.values()}, f"{path} passes although refkl is broken"


def test_the_page_on_peers_names_every_archive_and_every_deviation() -> None:
    page = (ROOT / "docs" / "peers.md").read_text()
    names = [peer.requirement for peer in PEERS.values()]
    names += [name.partition("[")[0] for file in FILES.values() for name in (*file.deviations, *file.left_out)]
    assert not [name for name in names if f"`{name}`" not in page]
