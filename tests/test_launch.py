"""Real launches on two processes (gloo): every backend trains the same, and a launch that would not is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.launching import accelerate_launch, deepspeed_launch, run
from support.train_inputs import write_config

TOLERANCE = 1e-5
STEPS = 5
GLOBAL_BATCH = 4
OFFLOAD = "deepspeed/zero3_offload.json"

LAUNCHES: dict[str, tuple[str, int, Callable[..., str]]] = {
    "one process": ("plain", 1, lambda *a, **k: accelerate_launch("single", *a, module=True, **k)),
    "two processes": ("ddp", 2, lambda *a, **k: accelerate_launch("multi", *a, module=True, **k)),
    "zero2": ("zero2", 2, lambda *a, **k: accelerate_launch("zero2", *a, module=True, **k)),
    "zero3": ("zero3", 2, lambda *a, **k: accelerate_launch("zero3", *a, module=True, **k)),
    "fsdp2": (
        "fsdp2",
        2,
        lambda module, *a, **k: accelerate_launch("fsdp2", "tests/scripts/train_fsdp2.py", *a, **k),
    ),
    "deepspeed zero3": (
        "zero3",
        2,
        lambda module, *a, **k: deepspeed_launch(module, *a, "--trainer.deepspeed", "deepspeed/zero3.json", **k),
    ),
    "deepspeed zero3, offloaded": (
        "zero3",
        2,
        # It has an optimizer of its own, on the CPU, which DeepSpeed compiles the first time: for minutes.
        lambda module, *a, **k: deepspeed_launch(
            module, *a, "--trainer.deepspeed", "deepspeed/zero3_offload.json", timeout=1200, **k
        ),
    ),
}
MARKS: dict[str, list[Any]] = {
    "two processes": [pytest.mark.slow],  # by default those of the matrix
    "zero2": [pytest.mark.slow],
    "zero3": [pytest.mark.slow],  # the printed command is launched so in test_printed_commands.py
    "fsdp2": [pytest.mark.slow],
    "deepspeed zero3": [pytest.mark.slow],  # a configuration is launched so in test_configs.py
    "deepspeed zero3, offloaded": [pytest.mark.slow, pytest.mark.timeout(1300)],
}


def _train(name: str, folder: Path, *options: str, **launch: Any) -> dict[str, Any]:
    """What a run left: its metrics, its reference's record, its weights."""
    backend, processes, start = LAUNCHES[name]
    out = folder / name.replace(" ", "-").replace(",", "")
    expected = ["--launch.backend", backend, "--launch.processes", str(processes)]
    share = ["--trainer.per_device_train_batch_size", str(GLOBAL_BATCH // processes)]
    arguments = ["train", str(folder / "config.yaml"), *expected, *share, "--trainer.output_dir", str(out), *options]
    output = start("refkl", *arguments, **launch)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "output": output,
        "metrics": [m for m in metrics if "loss" in m],
        "reference": json.loads((out / "reference.json").read_text()),
        "weights": load_file(out / "model" / "model.safetensors"),
    }


def _inputs(folder: Path, method: str = "dpo", **trainer: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"max_steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1e9}
    return write_config(folder, method, trainer={**sizes, **trainer})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same training in one process: what the others must give."""
    folder = tmp_path_factory.mktemp("launch")
    _inputs(folder)
    return folder, _train("one process", folder)


def test_one_process_moves(alone: tuple[Path, dict[str, Any]]) -> None:
    losses = [m["loss"] for m in alone[1]["metrics"]]
    assert len(losses) == STEPS and losses[0] - losses[-1] >= 0.01
    assert alone[1]["metrics"][0]["kl"] == 0.0 and alone[1]["metrics"][-1]["kl"] > 1e-4


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ())) for n in LAUNCHES if n != "one process"])
def test_every_launch_trains_the_same(name: str, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = alone
    found = _train(name, folder)
    strategy = "zero3" if "zero3" in name else "fsdp2" if name == "fsdp2" else "clone"
    assert f"reference: {strategy}: " in found["output"]
    assert found["metrics"][0]["kl"] == 0.0
    for key in ("loss", "kl"):
        got, right = ([m[key] for m in result["metrics"]] for result in (found, expected))
        assert got == pytest.approx(right, rel=0, abs=TOLERANCE), key
    assert found["weights"].keys() >= expected["weights"].keys()  # DeepSpeed also writes the tied head
    for weight, right in expected["weights"].items():
        torch.testing.assert_close(found["weights"][weight], right, rtol=0, atol=TOLERANCE)
    # One fingerprint for one reference, whatever holds it; and training does not change it.
    prints = {found["reference"][when]["fingerprint"] for when in ("before", "after")}
    assert prints == {expected["reference"]["before"]["fingerprint"]}


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["zero3", "fsdp2"])
def test_a_sharded_reference_is_scored_in_parts(sharded: str, alone: tuple[Path, dict[str, Any]]) -> None:
    """Ranks have unequally many parts, and each part moves the weights of all."""
    folder, expected = alone
    found = _train(sharded, folder, "--reference.max_tokens", "12")
    for key in ("loss", "kl"):
        got, right = ([m[key] for m in result["metrics"]] for result in (found, expected))
        assert got == pytest.approx(right, rel=0, abs=TOLERANCE), key


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["zero3", "fsdp2"])
def test_sync_of_a_sharded_policy_is_sync_in_one_process(sharded: str, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = alone
    results = {}
    for name in ("one process", sharded):
        results[name] = _train(name, folder, "--sync.every", "2", "--sync.alpha", "0.5")
    for result in results.values():
        assert [u["step"] for u in result["reference"]["updates"]] == [2, 4]
        prints = [result["reference"]["before"]["fingerprint"]]
        prints += [u["fingerprint"] for u in result["reference"]["updates"]]
        assert len(set(prints)) == 3 and result["reference"]["after"]["fingerprint"] == prints[-1]
    kl = {name: [m["kl"] for m in result["metrics"]] for name, result in results.items()}
    assert kl[sharded] == pytest.approx(kl["one process"], rel=0, abs=TOLERANCE)
    assert kl[sharded][2] < kl[sharded][1]  # the reference came nearer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "zero2", "zero3"])
def test_bf16_starts_at_zero_kl(name: str, tmp_path: Path) -> None:
    """Mixed precision (DDP) casts in autocast, DeepSpeed casts the policy: the reference must follow it in both."""
    _inputs(tmp_path, max_steps=3, learning_rate=0.01)
    found = _train(name, tmp_path, "--trainer.bf16", "true")
    assert found["metrics"][0]["kl"] == 0.0 and found["metrics"][-1]["kl"] > 0
    assert found["reference"]["before"]["fingerprint"] == found["reference"]["after"]["fingerprint"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("two processes", "zero3", "fsdp2")])
def test_grpo_on_two_processes(name: str, tmp_path: Path) -> None:
    _inputs(tmp_path, "grpo", max_steps=2)
    found = _train(name, tmp_path)
    assert found["metrics"][0]["kl"] == 0.0 and found["metrics"][1]["kl"] > 0
    assert found["reference"]["before"]["fingerprint"] == found["reference"]["after"]["fingerprint"]
    assert len((tmp_path / name.replace(" ", "-") / "samples.jsonl").read_text().splitlines()) == 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "zero2", "zero3", "fsdp2"])
def test_kto_trains_the_same(name: str, tmp_path: Path) -> None:
    """With a KL in the loss, a mean over the tokens of both ranks; the loss type is one without a term of the batch."""
    _inputs(tmp_path, "kto", loss_type="apo_zero_unpaired", train_sampling_strategy="sequential")
    options = ("--kl.coef", "0.5", "--kl.estimator", "exact")
    found, right = (_train(which, tmp_path, *options) for which in (name, "one process"))
    assert found["metrics"][0]["kl"] == 0.0 and found["metrics"][-1]["kl"] > 1e-4
    for key in ("loss", "kl"):
        losses, expected = ([m[key] for m in result["metrics"]] for result in (found, right))
        assert losses == pytest.approx(expected, rel=0, abs=TOLERANCE), key
    for weight, expected in right["weights"].items():
        torch.testing.assert_close(found["weights"][weight], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "zero2", "zero3", "fsdp2"])
def test_rloo_on_two_processes(name: str, tmp_path: Path) -> None:
    """The penalty of each completion is gathered with its group's rewards, which are on both ranks."""
    _inputs(tmp_path, "rloo", max_steps=3, learning_rate=0.01)
    found = _train(name, tmp_path, "--kl.placement", "reward", "--kl.reward", "sequence", "--kl.coef", "0.5")
    assert found["metrics"][0]["kl"] == 0.0 and found["metrics"][-1]["kl"] != 0.0
    assert found["reference"]["before"]["fingerprint"] == found["reference"]["after"]["fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "zero2", "zero3", "fsdp2"])
def test_the_leash_trains_the_same(name: str, tmp_path: Path) -> None:
    """Supervised, with the exact KL of every token: a mean over those of all ranks, which have unequally many."""
    _inputs(tmp_path, "sft", train_sampling_strategy="sequential")
    options = ("--kl.coef", "0.5", "--kl.estimator", "exact")
    found, right = (_train(which, tmp_path, *options) for which in (name, "one process"))
    assert found["metrics"][0]["kl"] == 0.0 and found["metrics"][-1]["kl"] > 1e-4
    for key in ("loss", "kl"):
        values, expected = ([m[key] for m in result["metrics"]] for result in (found, right))
        assert values == pytest.approx(expected, rel=0, abs=TOLERANCE), key
    for weight, expected in right["weights"].items():
        torch.testing.assert_close(found["weights"][weight], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "zero3", "fsdp2"])
def test_exact_kl_in_passing_on_two_processes(name: str, tmp_path: Path) -> None:
    """`exact_every` with an estimator that needs no distributions: every rank makes the passes, or none does."""
    _inputs(tmp_path, "kto", loss_type="apo_zero_unpaired", train_sampling_strategy="sequential")
    options = ("--kl.coef", "0.5", "--kl.estimator", "k3", "--kl.exact_every", "2")
    found, right = (_train(which, tmp_path, *options) for which in (name, "one process"))
    exact, expected = ([m.get("kl/exact") for m in result["metrics"]] for result in (found, right))
    assert [value is None for value in exact] == [value is None for value in expected]
    assert 1 < sum(value is not None for value in exact) < STEPS
    for value, wanted in zip(exact, expected, strict=True):
        assert value == (None if wanted is None else pytest.approx(wanted, rel=0, abs=TOLERANCE))


@pytest.mark.slow
def test_lora_under_zero3_uses_the_adapter(tmp_path: Path) -> None:
    _inputs(tmp_path, max_steps=3, learning_rate=0.05)
    options = ["--peft.peft_type", "LORA", "--peft.r", "4", "--peft.target_modules", "[q_proj, v_proj]"]
    out = tmp_path / "zero3"
    arguments = ["train", str(tmp_path / "config.yaml"), *options, "--trainer.output_dir", str(out)]
    output = accelerate_launch("zero3", "refkl", *arguments, module=True)
    assert "reference: adapter: " in output
    trained = (
        2 * 4 * ((32 + 32) + (32 + 16))
    )  # two layers, r = 4, q_proj and v_proj: counted whole, not as placeholders
    assert f" {trained:,} parameters train" in output
    kl = [json.loads(line)["kl"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert kl[0] == 0.0 and kl[-1] > 0
    record = json.loads((out / "reference.json").read_text())
    assert record["before"]["fingerprint"] == record["after"]["fingerprint"]


@pytest.mark.parametrize("launch", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_partitioned_reference_is_the_policy_in_memory(launch: str, tmp_path: Path) -> None:
    _inputs(tmp_path)
    flags = ("--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0")
    output = accelerate_launch(launch, "tests/scripts/changed_policy.py", str(tmp_path / "model"), flags=flags)
    for line in (
        "as in memory: True",
        "as on disk, when asked for: True",
        "built after prepare, the same: True",
        "moved to the policy: True",
        "holds 0.50 of it",
        "a policy from a config: the policy as it stood when the reference was built",
        "patched refused: reference strategy 'zero3' cannot work here: the forward of model.layers.0.mlp was replaced",
    ):
        assert line in output
    assert ("clone refused: " in output and "Use 'zero3' instead" in output) == (launch == "zero3")


WRONG_LAUNCHES: dict[str, tuple[str, dict[str, str], list[str], str]] = {
    "DDP that would train apart": ("multi", {}, ["--trainer.use_cpu", "false"], "train separately|assign use_cpu"),
    "ZeRO that became DDP": ("zero2", {"ACCELERATE_USE_CPU": "true"}, [], "fell back without a warning"),
    "FSDP that became DDP": ("fsdp2", {}, [], "FSDP.*fell back without a warning"),
    "another backend": ("multi", {}, ["--launch.backend", "zero3"], "asks for zero3.*gave ddp on 2 processes"),
    "another size": ("multi", {}, ["--launch.processes", "4"], "asks for 4 processes.*gave 2"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "ZeRO that became DDP" else pytest.mark.slow) for n in WRONG_LAUNCHES],
)
def test_a_launch_that_gives_something_else_is_refused(name: str, tmp_path: Path) -> None:
    import re

    config, environment, options, message = WRONG_LAUNCHES[name]
    _inputs(tmp_path)
    output = accelerate_launch(
        config, "refkl", "train", str(tmp_path / "config.yaml"), *options, module=True, fails=True, **environment
    )
    assert re.search(message, output, re.DOTALL), output[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_launched_processes_are_gone(tmp_path: Path) -> None:
    """A run that does not end is killed with its children, and said to have been."""
    import sys

    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    with pytest.raises(AssertionError, match="still running after 10 s"):
        run([sys.executable, "-c", code], timeout=10)
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):  # a busy machine takes a moment to bury it
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
