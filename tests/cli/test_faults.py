"""Runs that are killed at random moments come back to the same end, to the bit. One by default, all with --faults."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import faulty
from support.launching import accelerate_launch
from support.train_inputs import write_config

from refkl.checkpoint import MARK, newest_whole

STEPS = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 8,
    "save_total_limit": 2,
    "lr_scheduler_type": "linear",
}
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {
        "method": "dpo",
        "trainer": {**STEPS, "save_steps": 1, "save_total_limit": 1},
        "sync": {"every": 2, "alpha": 0.5, "first_kl_every": 3},
        "kl": {"coef": 0.1, "controller": "adaptive", "target": 0.1, "horizon": 100},
    },
    # Averages in fp32 beside weights of 16 bits: lost, every later reference would be another.
    "dpo in bf16": {
        "method": "dpo",
        "model": {"dtype": "bfloat16"},
        "trainer": STEPS,
        "sync": {"every": 1, "average": "bema"},
    },
    # LoRA: the reference is a copy of the adapter from step 2 on. Two steps to a rollout, saved between rollouts.
    "grpo": {
        "method": "grpo",
        "peft": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        "trainer": {**STEPS, "num_iterations": 2},
        "sync": {"every": 2, "alpha": 0.5},
    },
}
KILLS = [("dpo in bf16", "sync", 2), ("grpo", "file", 1), ("dpo", "time", 3)] + [
    (list(RUNS)[seed % 3], ("file", "file", "sync", "time")[seed % 4], seed) for seed in range(4, 21)
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], dict[str, float]]]:
    """What a run that is not killed ends with, and what there is to kill it at."""
    known: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}

    def of(name: str) -> tuple[dict[str, Any], dict[str, float]]:
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            config = _config(folder, name)
            assert faulty.run(["train", str(config)], folder / "log") == 0, (folder / "log").read_text()[-3000:]
            known[name] = _end(folder), faulty.counted(folder / "log")
        return known[name]

    return of


def _config(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    sections = {"samples": {"prompts": 0}, **RUNS[name]}
    return write_config(folder, sections.pop("method"), **sections)


def _end(folder: Path) -> dict[str, Any]:
    """Every logged number but times, the reference, and the bytes of the trained policy."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    not_ours = ("step_time", "num_tokens")  # a time; and a counter that TRL begins anew
    metrics = [
        {key: value for key, value in line.items() if key not in not_ours}
        for line in lines
        if "loss" in line or "reference_update" in line
    ]
    record = json.loads((folder / "run" / "reference.json").read_text())
    weights = next((folder / "run" / "model").glob("*.safetensors")).read_bytes()
    return {
        "metrics": metrics,
        "fingerprint": record["after"]["fingerprint"],
        "updates": record["updates"],
        "status": record["status"],
        "weights": weights,
    }


@pytest.mark.parametrize(
    ("name", "kind", "seed"),
    [pytest.param(*kill, marks=[pytest.mark.faults] * (number >= 1)) for number, kill in enumerate(KILLS)],
    ids=str,
)
def test_a_killed_run_comes_to_the_same_end(
    name: str, kind: str, seed: int, whole: Callable[[str], tuple[dict[str, Any], dict[str, float]]], tmp_path: Path
) -> None:
    expected, counts = whole(name)
    assert len([m for m in expected["metrics"] if "loss" in m]) == 8 and counts[kind] > 0
    config = _config(tmp_path, name)
    at = random.Random(seed).uniform(0.02, 0.98) * counts[kind]
    kill = faulty.Kill(kind, at if kind == "time" else max(1.0, at))
    status = faulty.run(["train", str(config)], tmp_path / "log", kill)
    assert status == -9 or (kind == "time" and status == 0)  # a quicker run than the one that was timed
    found = newest_whole(tmp_path / "run")
    resumed = faulty.run(["train", str(config), "--resume"], tmp_path / "log")
    if found.path is None:
        assert resumed == 2 and "no whole checkpoint" in (tmp_path / "log").read_text()
        resumed = faulty.run(["train", str(config)], tmp_path / "log")
    assert resumed == 0, (tmp_path / "log").read_text()[-3000:]
    assert _end(tmp_path) == expected
    print(f"{kind} {kill.at:.1f} of {counts[kind]:.1f}: from {found.path and found.path.name}")


@pytest.mark.faults
@pytest.mark.parametrize("backend", ["multi", "zero3"])
def test_when_one_of_two_is_killed_the_other_ends_and_the_run_goes_on(backend: str, tmp_path: Path) -> None:
    """Within a minute, with a message; resumed on two processes, to the end of a run that nobody killed."""
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    configs = {}
    for name, folder in folders.items():
        folder.mkdir()
        torch.manual_seed(0)
        trainer = {**STEPS, "save_steps": 1, "max_steps": 40, "per_device_train_batch_size": 2}
        sync = {"every": 2, "alpha": 0.5}
        configs[name] = write_config(folder, "dpo", trainer=trainer, samples={"prompts": 0}, sync=sync)
    accelerate_launch(backend, "refkl", "train", str(configs["whole"]), module=True)
    pid, mark = tmp_path / "pid", folders["killed"] / "run" / "checkpoint-5" / MARK
    (tmp_path / "victim.py").write_text(
        "import os, sys\n"
        f"if os.environ.get('RANK') == '1': open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "from refkl.cli import main\n"
        "sys.exit(main())\n"
    )
    watch = (
        "import os, pathlib, signal, time\n"
        f"pid, mark = pathlib.Path({str(pid)!r}), pathlib.Path({str(mark)!r})\n"
        "while not mark.exists(): time.sleep(0.05)\n"
        "os.kill(int(pid.read_text()), signal.SIGKILL)\n"
        f"open({str(tmp_path / 'when')!r}, 'w').write(str(time.time()))\n"
    )
    watcher = subprocess.Popen([sys.executable, "-c", watch])
    try:
        arguments = str(tmp_path / "victim.py"), "train", str(configs["killed"])
        output = accelerate_launch(backend, *arguments, fails=True)
    finally:
        watcher.kill()
    assert time.time() - float((tmp_path / "when").read_text()) < 60
    assert "Another process of this run is gone" in output and "--resume" in output, output[-3000:]
    found = newest_whole(folders["killed"] / "run").path
    assert found is not None and 5 <= int(found.name.split("-")[1]) < 40
    accelerate_launch(backend, "refkl", "train", str(configs["killed"]), "--resume", module=True)
    assert _end(folders["killed"]) == _end(folders["whole"])
