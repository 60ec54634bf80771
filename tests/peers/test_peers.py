"""The published tests of OpenRLHF, verl and TRL, run against refkl in the place of their own code (docs/peers.md).

python -m pytest tests/peers                   # downloads 3 MB, once
REFKL_TRL_TESTS=…/trl/tests python -m pytest tests/peers       # those of a checkout of TRL 1.16 as well
REFKL_NEED_PEERS=1 python -m pytest ...        # no package index within reach is a failure, not a skip
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.launching import ROOT, run

import refkl
from peers.archives import NoIndexError, lay_out
from peers.selection import CHECKOUTS, PEERS, PeerFile, files
from peers.standins import make as make_models

pytestmark = pytest.mark.peers
FILES = files(PEERS)
CHECKED_OUT = files(CHECKOUTS)
Outcomes = dict[str, dict[str, tuple[str, str]]]
"""File -> test -> ("passed", "failed" or "deviates", and what a failure printed)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    try:
        lay_out(folder, PEERS)
    except NoIndexError as error:
        if os.environ.get("REFKL_NEED_PEERS"):
            raise
        pytest.skip(f"the peers' tests did not run: {error}")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for peer in CHECKOUTS.values():
        if not os.environ.get(peer.variable):
            pytest.skip(f"{peer.variable} does not name the tests of a checkout of version {peer.version}")
    folder = tmp_path_factory.mktemp("checkouts")
    lay_out(folder, CHECKOUTS)
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    return run_peers(folder, PEERS)


@pytest.fixture(scope="module")
def checkout_outcomes(checkouts: Path) -> Outcomes:
    return run_peers(checkouts, CHECKOUTS)


def run_peers(folder: Path, names: Iterable[str], *, broken: bool = False) -> Outcomes:
    """The peers' tests in a process of their own."""
    selected = files(names)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    source = Path(refkl.__file__).parents[1]
    pytest_ini = ("-c", str(folder / "pytest.ini"), "--rootdir", str(folder))
    paths = (str(folder / path) for path in selected)
    run(
        [sys.executable, "-m", "pytest", "-p", "peers.plugin", "-p", "no:cacheprovider", *pytest_ini, *paths],
        timeout=140,
        # verl's tests import verl, which is the adapter; OpenRLHF's look for its files beside themselves.
        PYTHONPATH=os.pathsep.join(map(str, (folder / "verl", ROOT / "tests", source))),
        PYTEST_ADDOPTS="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        REFKL_PEERS=",".join(names),
        REFKL_PEERS_REPORT=str(report),
        REFKL_PEERS_BREAK="1" if broken else "",
    )
    result: Outcomes = {path: {} for path in selected}
    for nodeid, outcome in json.loads(report.read_text()).items():
        path, _, test = nodeid.partition("::")
        result[path][test] = tuple(outcome)
    return result


def check(file: PeerFile, tests: dict[str, tuple[str, str]], more: bool = False) -> None:
    """`more`: a version beside the one that was counted may have added tests."""
    failures = [f"{test}\n{text}" for test, (outcome, text) in tests.items() if outcome == "failed"]
    assert not failures, "\n\n".join(failures)
    found, right = Counter(outcome for outcome, _ in tests.values()), {"passed": file.passes}
    right |= {"deviates": len(file.deviations)} if file.deviations else {}
    assert found >= Counter(right) if more else found == right


@pytest.mark.parametrize("path", FILES)
def test_refkl_passes_what_the_peer_tests(path: str, outcomes: Outcomes) -> None:
    check(FILES[path], outcomes[path])


@pytest.mark.parametrize("path", CHECKED_OUT)
def test_refkl_passes_what_a_checkout_tests(path: str, checkout_outcomes: Outcomes) -> None:
    check(CHECKED_OUT[path], checkout_outcomes[path], more=True)


def test_broken_refkl_fails_in_every_file(folder: Path) -> None:
    """Otherwise the adapters would be testing themselves."""
    for path, tests in run_peers(folder, PEERS, broken=True).items():
        assert "failed" in {outcome for outcome, _ in tests.values()}, f"{path} passes although refkl is broken"


def test_broken_refkl_fails_in_every_file_of_a_checkout(checkouts: Path) -> None:
    for path, tests in run_peers(checkouts, CHECKOUTS, broken=True).items():
        assert "failed" in {outcome for outcome, _ in tests.values()}, f"{path} passes although refkl is broken"


def test_the_page_on_peers_names_every_archive_and_every_deviation() -> None:
    page = (ROOT / "docs" / "peers.md").read_text()
    names = [peer.requirement for peer in PEERS.values()]
    names += [name.partition("[")[0] for file in (*FILES.values(), *CHECKED_OUT.values())
              for name in (*file.deviations, *file.left_out, *file.only)]  # fmt: skip
    assert not [name for name in names if f"`{name}`" not in page]
