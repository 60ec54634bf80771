"""What a reward function may return to `refkl train`, and the sentence for everything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.train_inputs import write_config
from transformers import AutoModelForCausalLM

from refkl.cli import main
from refkl.cli.inputs import load_reward
from refkl.config import RewardConfig

TEXTS = ["ab", "cd", "ef", "gh"]


def written(name: str, body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module with the function `score`; return its import path."""
    (folder / f"{name}.py").write_text(f"import numpy as np\nimport torch\n\n\n{body}\n")
    monkeypatch.syspath_prepend(str(folder))
    return f"{name}:score"


def plain(expression: str) -> str:
    return f"def score(completions, **columns):\n    return {expression}"


LISTS = "it must return a list with one number per completion, in their order"
WRONG: dict[str, tuple[str, list[str]]] = {
    "nothing": (plain("None"), ["returned nothing; it must return one number per completion"]),
    "one number": (plain("0.5"), ["returned '0.5' of type float for 4 completions", LISTS]),
    "a 0-d tensor": (plain("torch.tensor(0.5)"), ["'tensor(0.5000)' of type Tensor for 4 completions", LISTS]),
    "a 0-d array": (plain("np.array(0.5)"), ["'0.5' of type ndarray for 4 completions", LISTS]),
    "a NumPy number": (plain("np.float64(0.5)"), ["of type float64 for 4 completions", LISTS]),
    "a dict": (plain("{'ab': 1.0}"), ["of type dict for 4 completions", LISTS]),
    "a set": (plain("{1.0}"), ["of type set for 4 completions", LISTS]),
    "a text": (plain("'good'"), ["'good' of type str for 4 completions", LISTS]),
    "bytes": (plain("b'1234'"), ["of type bytes for 4 completions", LISTS]),
    "NaN": (plain("[0.0, float('nan'), 0.0, 0.0]"), ["returned nan for completion 1 ('cd'): not a finite number"]),
    "infinity": (plain("torch.tensor([0.0, 0.0, -torch.inf, 0.0])"), ["-inf for completion 2 ('ef')"]),
    "texts in a list": (plain("[1.0, 1.0, 1.0, '1']"), ["returned '1' for completion 3 ('gh'): not a finite number"]),
    "two numbers each": (plain("torch.ones(4, 2)"), ["returned [1.0, 1.0] for completion 0 ('ab')"]),
    "too many": (plain("[0.0] * 5"), ["returned 5 rewards for 4 completions"]),
    "none at all": (plain("[]"), ["returned 0 rewards for 4 completions"]),
    "async": (
        "async def score(completions, **columns):\n    return [1.0] * len(completions)",
        ["is an async function, whose result would have to be awaited. Make it a plain one"],
    ),
}


@pytest.mark.filterwarnings("error")  # such as for a coroutine that was never awaited
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_reward_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, parts = WRONG[case]
    path = written(f"wrong_{list(WRONG).index(case)}", body, tmp_path, monkeypatch)
    with pytest.raises(ValueError) as error:
        load_reward(RewardConfig(function=path))(completions=TEXTS, prompts=[""] * 4)
    for part in (path, *parts):
        assert part in str(error.value)


RIGHT = {
    "a list": "[1, 2.5, None, True]",
    "a tuple": "(1, 2.5, None, True)",
    "a generator": "(x for x in [1, 2.5, None, True])",
    "0-d tensors": "[torch.tensor(1), torch.tensor([2.5]), None, torch.tensor(True)]",
    "NumPy numbers": "[np.int64(1), np.float32(2.5), None, True]",
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_a_list_of_numbers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(f"right_{list(RIGHT).index(case)}", plain(RIGHT[case]), tmp_path, monkeypatch)
    assert load_reward(RewardConfig(function=path))(completions=TEXTS, prompts=[""] * 4) == [1, 2.5, None, True]


@pytest.mark.parametrize("made", ["np.array([1.0, 2.5, 0.0, 1.0])", "torch.tensor([1.0, 2.5, 0.0, 1.0]).bfloat16()"])
def test_arrays_and_tensors(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(f"array_{made[0]}", plain(made), tmp_path, monkeypatch)
    assert load_reward(RewardConfig(function=path))(completions=TEXTS, prompts=[""] * 4) == [1.0, 2.5, 0.0, 1.0]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("[None] * len(completions)", "None of the 4 completions of this rollout has a reward: score returned None"),
        ("None", "ends_0:score returned nothing"),
    ],
)
def test_a_run_without_rewards_ends_before_its_first_step(
    method: str, case: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    number = 0 if case == "None" else 1
    monkeypatch.delitem(sys.modules, f"ends_{number}", raising=False)  # of the other method
    path = written(f"ends_{number}", plain(case), tmp_path, monkeypatch)
    assert main(["train", str(write_config(tmp_path, method, reward=[{"function": path}]))]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    assert not metrics.exists() or not [x for x in map(json.loads, metrics.read_text().splitlines()) if "loss" in x]
    assert json.loads((run / "reference.json").read_text())["status"] == "failed"
    found, start = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (run / "model", tmp_path / "model"))
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_one_reward_may_leave_out_what_another_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is logged as the mean over the completions that it applies to; `reward` is the mean of their weighted
    sums."""
    first = written(
        "partly", plain("[1.0 if at % 2 else None for at in range(len(completions))]"), tmp_path, monkeypatch
    )
    second = written("always", plain("[float(at) for at in range(len(completions))]"), tmp_path, monkeypatch)
    rewards = [{"function": first, "name": "partly", "weight": 2.0}, {"function": second, "name": "always"}]
    assert main(["train", str(write_config(tmp_path, reward=rewards, trainer={"max_steps": 1}))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "loss" in line]
    assert step["rewards/partly/mean"] == 1.0 and step["rewards/always/mean"] == 1.5
    assert step["reward"] == pytest.approx((0 + 0 + 2 + 1 + 0 + 2 + 2 + 3) / 4)
