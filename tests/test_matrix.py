"""Each trainer, with each strategy and option, on each backend, for each kind of policy (matrix.py says which).

By default a part of the matrix in which each backend occurs with each value of everything else; with --slow a part in
which each pair of values occurs, and the whole. The whole takes more than an hour on two cores, and goes on where it
was stopped: REFKL_MATRIX names the folder that keeps its results.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import astuple
from pathlib import Path

import pytest
from support.matrix import (
    ALLOWED,
    BACKENDS,
    CASES,
    Case,
    Result,
    covering,
    faults,
    make_inputs,
    needed,
    run_cases,
    runs,
)

from refkl import STRATEGIES

ABLE, UNABLE = [case for case in CASES if runs(case)], [case for case in CASES if not runs(case)]


def _check(cases: list[Case], folder: Path, timeout: int) -> None:
    if not (folder / "model").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        make_inputs(folder)
    results = run_cases([*needed(cases), *cases], folder, timeout=timeout, tell=print)
    wrong = [f"{case}: {fault}" for case in cases for fault in faults(case, results)]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)


@pytest.mark.timeout(1500)
def test_each_backend_with_each_value(tmp_path: Path) -> None:
    """Of what is refused, every third: a refusal does not depend on all other values."""
    _check([*covering(ABLE, of=["backend"]), *covering(UNABLE, of=["backend"])[::3]], tmp_path, timeout=700)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_each_pair_of_values(tmp_path: Path) -> None:
    _check([*covering(ABLE), *covering(UNABLE)], tmp_path, timeout=700)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_matrix(backend: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("REFKL_MATRIX", tmp_path))
    _check([case for case in CASES if case.backend == backend], folder, timeout=3 * 3600)


def test_the_matrix_has_every_strategy() -> None:
    assert set(ALLOWED) == set(STRATEGIES)
    for strategy, trainer, backend in itertools.product(STRATEGIES, ("grpo", "rloo", "dpo", "kto", "sft"), BACKENDS):
        possible = backend in {"zero3": ("zero2", "zero3"), "fsdp2": ("fsdp2",)}.get(strategy, BACKENDS)
        possible = possible and (strategy not in ("clone", "shared_trunk") or backend in ("plain", "ddp", "zero2"))
        found = [case for case in CASES if (case.strategy, case.trainer, case.backend) == (strategy, trainer, backend)]
        assert any(map(runs, found)) == possible


def test_covering_has_every_pair_that_occurs() -> None:
    def pairs(cases: list[Case], first: int) -> set[object]:
        return {(values[first], at, x) for case in cases for values in [astuple(case)] for at, x in enumerate(values)}

    for first in range(6):
        assert pairs(covering(ABLE), first) == pairs(ABLE, first)
    assert pairs(covering(ABLE, of=["backend"]), 0) == pairs(ABLE, 0)
    assert len(covering(ABLE, of=["backend"])) < len(covering(ABLE)) < 80


RIGHT = Result(
    "trained", "", "clone", (1.0, 0.5), (0.0, 0.1), (2.0, 1.0), before="a", after="a", processes=2, backend="ddp"
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"losses": (1.0, 0.50002)}, "losses"),
        ({"kls": (1e-7, 0.1)}, "KL 1e-07 at step 0"),
        ({"kls": (0.0, float("nan"))}, "kls"),
        ({"norms": (2.0, 1.001)}, "norms"),
        ({"losses": (1.0,)}, "losses"),
        ({"before": "b", "after": "b"}, "fingerprint differs"),
        ({"after": "b"}, "without a sync"),
        ({"strategy": "swap"}, "built swap"),
        ({"processes": 1}, "ran on"),
        ({"backend": "plain"}, "ran on"),
        ({"outcome": "refused", "message": "no"}, "refused: no"),
        ({"outcome": "failed", "message": "died"}, "failed: died"),
    ],
    ids=str,
)
def test_what_is_a_fault(change: dict[str, object], words: str | None) -> None:
    case = Case("ddp", "dpo", "clone", "none", "full", False)
    (plain,) = needed([case])
    results = {case: Result(**{**vars(RIGHT), **change}), plain: Result(**{**vars(RIGHT), "processes": 1})}  # type: ignore[arg-type]
    found = faults(case, results)
    assert [words in fault for fault in found] == [True] if words else found == []


@pytest.mark.parametrize(
    ("message", "right"), [("reference strategy 'zero3' cannot work here", True), ("something is wrong", False)]
)
def test_a_refusal_names_what_it_is_about(message: str, right: bool) -> None:
    case = Case("ddp", "dpo", "zero3", "none", "full", False)
    assert (faults(case, {case: Result("refused", message)}) == []) == right
    assert faults(case, {case: Result("trained")})


def test_a_case_that_ends_its_launch_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases after it run in another launch."""
    cases = [Case("plain", "dpo", "clone", "none", policy, False) for policy in ("fresh", "frozen", "full")]
    launches: list[list[Case]] = []

    def launch(backend: str, folder: Path, timeout: int) -> str:
        launches.append(left := [case for case in cases if case not in matrix.read_results(folder)])
        for case in left:
            (folder / "running").write_text(str(case))
            if case.policy == "frozen":
                raise AssertionError("Timeout (0:01:40)!")
            matrix.append_result(folder, case, Result("trained"))
        return ""

    from support import matrix

    monkeypatch.setattr(matrix, "_launch", launch)
    results = run_cases(cases, tmp_path)
    assert [results[case].outcome for case in cases] == ["trained", "failed", "trained"]
    assert "Timeout" in results[cases[1]].message and [len(left) for left in launches] == [3, 1]
