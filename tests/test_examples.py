"""The examples run as their first lines say, and do what they show."""

from __future__ import annotations

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launching import ROOT, accelerate_launch, run
from support.train_inputs import model_folder
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from refkl.trl import KLGRPOTrainer


def _losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+ .* KL ([-\d.e]+) nats", output, re.MULTILINE)]


def test_own_loop(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    output = run([sys.executable, "examples/own_loop.py", "--model", str(folder), "--steps", "3", "--batch", "4"])
    assert "reference: clone: " in output
    kl = _losses(output)
    assert len(kl) == 3 and kl[0] == 0.0


@pytest.mark.slow
def test_own_loop_on_two_processes(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    output = accelerate_launch("multi", "examples/own_loop.py", "--model", str(folder), "--steps", "2", "--batch", "4")
    assert "ddp on 2 processes" in output and _losses(output)[0] == 0.0


def test_the_loop_is_thirty_lines_at_most() -> None:
    tree = ast.parse((ROOT / "examples/own_loop.py").read_text())
    train = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "train")
    first_statement = train.body[1]  # past the docstring
    assert train.end_lineno is not None and train.end_lineno - first_statement.lineno + 1 <= 30


def _example(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """Run the script's main() in this process, on a tiny model; its trainer."""
    if not (folder / "model").is_dir():
        model_folder(folder / "model")
    given = ["--model", str(folder / "model"), "--output", str(folder / "run"), *options]
    monkeypatch.setattr(sys, "argv", [str(path), *given])
    return runpy.run_path(str(path))["main"]()


def _logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _reversed(script: str) -> str:
    """The script before the README's diff was applied to it."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert diff is not None
    lines = diff[1].splitlines()
    removed, added = ([line[1:] for line in lines if line.startswith(sign)] for sign in "-+")
    assert len(removed) + len(added) == len(lines) and len(removed) == len(added)
    for old, new in zip(removed, added, strict=True):
        assert script.count(f"\n{new}\n") == 1
        script = script.replace(f"\n{new}\n", f"\n{old}\n")
    return script


def test_trl_grpo_is_a_script_of_trls_by_the_diff_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most three lines differ, and both versions run."""
    path = ROOT / "examples/trl_grpo.py"
    (tmp_path / "plain.py").write_text(plain := _reversed(path.read_text()))
    changes = [d for d in difflib.ndiff(plain.splitlines(), path.read_text().splitlines()) if d[0] in "+-"]
    assert len([d for d in changes if d[0] == "+"]) <= 3 and len([d for d in changes if d[0] == "-"]) <= 3
    assert "refkl" not in "".join(d for d in changes if d[0] == "-")
    options = ("--steps", "2", "--batch", "4")
    theirs, ours = (_example(p, tmp_path, monkeypatch, *options) for p in (tmp_path / "plain.py", path))
    assert type(theirs) is GRPOTrainer and type(ours) is KLGRPOTrainer
    assert ours.reference.strategy == "clone" and ours.penalty.coef == theirs.beta == 0.2
    assert _logged(ours, "kl")[0] == 0.0 and len(_logged(ours, "kl")) == len(_logged(theirs, "kl")) == 2
    assert _logged(ours, "reward")[0] == _logged(theirs, "reward")[0]  # the same completions


def test_trl_dpo_trdpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples/trl_dpo_trdpo.py"
    trainer = _example(path, tmp_path, monkeypatch, "--steps", "4", "--batch", "2", "--every", "2")
    assert [update["step"] for update in trainer.sync.updates] == [2, 4]
    assert _logged(trainer, "sync/updates")[-1] == 2 and len(_logged(trainer, "kl/first")) == 2
    assert _logged(trainer, "kl")[0] == 0.0


def test_hf_trainer_sft_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples/hf_trainer_sft_kl.py"
    trainer = _example(path, tmp_path, monkeypatch, "--steps", "3", "--batch", "2", "--coef", "0.5")
    kl = _logged(trainer, "kl")
    assert len(kl) == 3 and kl[0] == 0.0 < kl[-1] and _logged(trainer, "kl/coef") == [0.5] * 3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)


@pytest.mark.slow
def test_hf_trainer_sft_kl_is_the_same_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts on each of two processes are four on one: losses, and KL, which are means over tokens of both."""
    path = ROOT / "examples/hf_trainer_sft_kl.py"
    one = _example(path, tmp_path, monkeypatch, "--steps", "3", "--batch", "4")
    given = ("--model", str(tmp_path / "model"), "--output", str(tmp_path / "two"), "--steps", "3", "--batch", "2")
    output = accelerate_launch("multi", str(path.relative_to(ROOT)), *given)
    for key in ("loss", "kl"):
        found = [float(x) for x in re.findall(rf"'{key}': '([-\d.e]+)'", output)]
        assert found == pytest.approx(_logged(one, key), rel=2e-3, abs=1e-6), key
