"""The examples run as their first lines say, and do what they show."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from launching import ROOT, accelerate_launch, run
from train_inputs import model_folder


def _losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+ .* KL ([-\d.e]+) nats", output, re.MULTILINE)]


def test_own_loop(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    output = run([sys.executable, "examples/own_loop.py", "--model", str(folder), "--steps", "3", "--batch", "4"])
    assert "reference: clone: " in output
    kl = _losses(output)
    assert len(kl) == 3 and kl[0] == 0.0


def test_own_loop_on_two_processes(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    output = accelerate_launch("multi", "examples/own_loop.py", "--model", str(folder), "--steps", "2", "--batch", "4")
    assert "ddp on 2 processes" in output and _losses(output)[0] == 0.0


def test_the_loop_is_thirty_lines_at_most() -> None:
    tree = ast.parse((ROOT / "examples/own_loop.py").read_text())
    train = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "train")
    first_statement = train.body[1]  # past the docstring
    assert train.end_lineno is not None and train.end_lineno - first_statement.lineno + 1 <= 30
