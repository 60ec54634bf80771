"""The benchmark runs, measures everybody it can, and would notice a wrong kernel and a large temporary."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.launching import ROOT, run

SCRIPT = ROOT / "benchmarks" / "kernels.py"
SHAPE = "64x32x500"
# Everything but Liger comes with an install of refkl: a row that goes missing is a failure, not an absence.
ALWAYS = {
    "logp": {"refkl", "refkl token_loss", "full logits", "torch", "torch chunked", "torch chunked, sum", "TRL"},
    "logp_entropy": {"refkl", "refkl token_loss", "full logits", "TRL"},
    "logp_entropy_detached": {"refkl", "refkl token_loss", "full logits", "TRL"},
    "reverse_kl": {"refkl", "refkl token_loss", "full logits", "TRL"},
}
LIGER = {"logp": {"Liger GRPO"}, "reverse_kl": {"Liger JSD"}}


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's own modules, importable as they are for the script beside them."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kernel_cases
    import kernel_measure
    import kernel_peers

    yield kernel_cases, kernel_measure, kernel_peers
    for name in [name for name in sys.modules if name.startswith("kernel_")]:
        del sys.modules[name]


def benchmark(folder: Path, *arguments: str) -> dict:
    out = folder / "out.json"
    # Compiling takes longer than all else here, and is not what is tested.
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--json", str(out), *arguments]
    run(command, TORCHDYNAMO_DISABLE="1")
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_installed_kernel_is_measured_and_right(tmp_path):
    saved = benchmark(tmp_path, "--shapes", SHAPE, "--no-memory", "--masked", "0", "50", "--ops", *ALWAYS)
    assert len(saved["cases"]) == len(ALWAYS) * 2 * 2
    for result in saved["cases"]:
        case, rows = result["case"], {row["peer"]: row for row in result["rows"]}
        expected = ALWAYS[case["op"]] | (LIGER.get(case["op"], set()) if find_spec("liger_kernel") else set())
        assert set(rows) == expected | ({"full logits, scored only"} if case["masked"] else set())
        assert len(result["matmul_seconds"]) == 1
        for name, row in rows.items():
            assert row["failure"] is None, (name, case, row["failure"])
            assert row["median"] > 0
            assert row["errors"]["hidden"] < 2e-5, (name, case)
            assert (row["errors"]["weight"] is None) == (case["head"] == "frozen")
            assert (row["errors"]["weight"] or 0.0) < 2e-5, (name, case)
            # Liger's GRPO loss does not hold log-probabilities in its value.
            assert name == "Liger GRPO" or row["errors"]["value"] < 1e-5, (name, case)


@pytest.mark.slow
def test_scaling_goes_over_all_token_counts(tmp_path):
    arguments = ("--scaling", "--shapes", "1x8x64", "--ops", "logp", "--heads", "frozen", "--no-memory")
    saved = benchmark(tmp_path, *arguments)
    assert [result["case"]["shape"] for result in saved["cases"]] == [[2**k, 8, 64] for k in range(8, 14)]
    assert {row["peer"] for row in saved["cases"][0]["rows"]} == {"refkl", "refkl token_loss"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_read_in_a_process_of_its_own(tmp_path):
    arguments = ("--shapes", "4096x8x500", "--ops", "logp", "--heads", "frozen", "--only", "full logits")
    (result,) = benchmark(tmp_path, *arguments)["cases"]
    logits = 4096 * 500 * 4
    # logits, log-softmax and a gradient of either: at least two of them at a time, and no six
    assert 2 * logits <= result["rows"][0]["memory"] < 6 * logits


@pytest.mark.parametrize("scale, off", [(1.0, False), (1.01, True), (float("nan"), True)])
def test_a_wrong_gradient_is_marked(modules, scale, off):
    cases, measure, peers = modules
    case = cases.Case("logp", "trained", "fp32", 0, (16, 8, 50), "cpu", 0)

    def run_scaled(case, inputs):
        outcome = peers.PEERS["full logits"].run(case, inputs)
        # the value stays right: the gradient alone is off
        return peers.Outcome(outcome.loss * scale, outcome.value)

    peers.PEERS["scaled"] = peers.Peer("scaled", cases.OPS, "", run_scaled)
    row = measure.measure_case(case, [peers.PEERS["scaled"]], 1, lambda _: None).rows["scaled"]
    assert row.failure is None
    assert row.off is off


def test_a_wrong_value_is_marked(modules):
    cases, measure, peers = modules
    case = cases.Case("reverse_kl", "frozen", "fp32", 0, (16, 8, 50), "cpu", 0)

    def run_shifted(case, inputs):
        outcome = peers.PEERS["full logits"].run(case, inputs)
        return peers.Outcome(outcome.loss, outcome.value + 0.01)

    peers.PEERS["shifted"] = peers.Peer("shifted", cases.OPS, "", run_shifted)
    assert measure.measure_case(case, [peers.PEERS["shifted"]], 1, lambda _: None).rows["shifted"].off


def test_a_peer_that_raises_is_a_row_of_its_own(modules):
    cases, measure, peers = modules
    case = cases.Case("logp", "frozen", "fp32", 0, (16, 8, 50), "cpu", 0)

    def fail(case, inputs):
        raise RuntimeError("no kernel for this")

    peers.PEERS["failing"] = peers.Peer("failing", cases.OPS, "", fail)
    chosen = [peers.PEERS["failing"], peers.PEERS["full logits"]]
    rows = measure.measure_case(case, chosen, 2, lambda _: None).rows
    assert "no kernel for this" in rows["failing"].failure
    assert len(rows["full logits"].seconds) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("reader", ["host_peak", "_sampled_peak"])
def test_the_memory_reading_sees_what_was_freed_again(modules, reader):
    _, measure, _ = modules

    def work():
        temporary = torch.ones(64 << 18)  # 64 MiB
        # Both are over 32 MiB, below which malloc may give what was freed before.
        both = torch.ones(40 << 18).add_(temporary.sum())  # 40 MiB, while the temporary is still there
        time.sleep(1.0)  # on a busy machine the thread that looks gets its turn late
        return both

    assert 104 << 20 <= getattr(measure, reader)(work) + (1 << 20) < 132 << 20


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("step") / "out.json"
    size = ("--hidden", "64", "--layers", "1", "--vocabulary", "300", "--prompt", "4", "--completion", "8")
    options = ("--sequences", "4", "--rounds", "2", "--control", "--no-memory", "--json", str(out))
    run([sys.executable, str(ROOT / "benchmarks" / "step.py"), "--cases", "grpo-full", "dpo-lora", *size, *options])
    return {row["case"]: row for row in json.loads(out.read_text())["cases"]}


@pytest.mark.slow
@pytest.mark.parametrize("case, strategy", [("grpo-full", "clone"), ("dpo-lora", "adapter")])
def test_steps_of_trl_and_refkl_are_measured_on_the_same_work(steps, case, strategy):
    row = steps[case]
    extra = ["without"] if case.startswith("grpo") else []
    assert row["strategy"] == strategy
    assert row["loss"]["difference"] < 1e-5 < row["loss"]["largest"]
    # Far from 0 after four steps, so that policy and reference were two.
    assert abs(row["reports"]["TRL"]) > 1e-6
    assert row["reports"]["refkl"] == pytest.approx(row["reports"]["TRL"], rel=0.02)
    assert row["reports"]["TRL again"] == pytest.approx(row["reports"]["TRL"], rel=0.02)
    for side in ("TRL", "refkl", "TRL again"):
        parts = dict(row["parts"][side])
        assert all((seconds > 0) == case.startswith("grpo") for seconds in parts.pop("generation"))
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in parts.values()), side
        for each, whole in zip(zip(*parts.values(), strict=True), row["seconds"][side], strict=True):
            assert sum(each) == pytest.approx(whole)
    for ratio in (row[name] for name in ("ratio", "cpu_ratio", "control", "cpu_control", *extra)):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.slow
def test_both_ways_of_scoring_are_measured_on_the_same_scores(tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    size = ("--hidden", "64", "--layers", "2", "--vocabulary", "300", "--prompts", "64", "--completions", "8", "16")
    options = ("--generations", "4", "--rounds", "2", "--policy", "--json", str(out), "--plot", str(plot))
    run([sys.executable, str(ROOT / "benchmarks" / "scoring.py"), *size, *options])
    cases = json.loads(out.read_text())["cases"]
    assert [row["tokens"]["one row"] for row in cases] == [64 + 4 * 7, 64 + 4 * 15]
    for row in cases:
        assert row["difference"] < 1e-5 and row["speedup"] > 0
        assert 0 < row["of full"] < 1 and 0 < row["of LoRA"] < 1
    assert plot.stat().st_size > 10_000


def test_the_spread_of_a_median_is_the_sign_test_s(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import step

    # For 20 values the 6th and the 15th, for 10 the 2nd and the 9th, for 5 no two of them do.
    assert step.spread([float(i) for i in range(20, 0, -1)]) == {"median": 10.5, "low": 6.0, "high": 15.0}
    assert step.spread([float(i) for i in range(1, 11)]) == {"median": 5.5, "low": 2.0, "high": 9.0}
    assert step.spread([3.0, 1.0, 5.0, 2.0, 4.0]) == {"median": 3.0, "low": 1.0, "high": 5.0}
