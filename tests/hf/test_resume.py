"""A run that was stopped comes back to the same numbers, or says why it cannot."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.models import llama
from support.train_inputs import model_folder, write_config
from support.trl_runs import dpo, grpo, kto, logged, rloo, saved
from transformers import LlamaForCausalLM
from trl import DPOTrainer

import refkl.hf.checkpoints
from refkl import KLConfig, ReferenceConfig, SyncConfig
from refkl.checkpoint import BEGUN, MARK
from refkl.cli import main
from refkl.cli.settings import parse_run
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "still": {},
    "alpha 1": {"sync": SyncConfig(every=2, alpha=1.0)},
    "bf16, averaged": {"sync": SyncConfig(every=1, alpha=0.1), "reference": ReferenceConfig(dtype="bfloat16")},
    "adaptive": {"kl": KLConfig(coef=0.5, controller="adaptive", target=0.5, horizon=20)},
}


def dpo_run(folder: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    torch.manual_seed(0)
    return dpo(KLDPOTrainer, llama(), folder, {**SAVED, **(options or {})}, **refkl)


def numbers(trainer: Any) -> list[list[float]]:
    return [logged(trainer, key) for key in ("loss", "kl", "grad_norm")]


@pytest.mark.parametrize("settings", SETTINGS)
def test_dpo_comes_back_to_the_bit_at_any_step(settings: str, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = dpo_run(tmp_path, options, **SETTINGS[settings])
    whole.train()
    for step in (1, 2, 3):
        again = dpo_run(tmp_path / str(step), options, **SETTINGS[settings])
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert numbers(again) == numbers(whole), step
        assert again.reference.fingerprint() == whole.reference.fingerprint()
        assert again.reference.updates == whole.reference.updates
        assert again.penalty.coef == whole.penalty.coef
        for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)
        kept = [[w.local for w in trainer.reference._mover.averages.weights()] for trainer in (whole, again)]
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
        assert bool(kept[0]) == (settings == "bf16, averaged")


def test_kto_comes_back_to_the_bit(tmp_path: Path) -> None:
    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        kl = KLConfig(coef=0.3, controller="adaptive", target=0.5, horizon=20)
        return kto(KLKTOTrainer, llama(), folder, SAVED, kl=kl, sync=SyncConfig(every=2, alpha=0.5))

    whole, again = trainer(tmp_path), trainer(tmp_path / "again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for key in ("loss", "kl", "kl/token", "kl/coef", "grad_norm"):
        assert logged(again, key) == logged(whole, key)
    assert again.reference.fingerprint() == whole.reference.fingerprint()


def test_a_run_that_had_ended_is_not_trained_on(tmp_path: Path) -> None:
    """transformers takes one step more, in the middle of an epoch."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = dpo(KLDPOTrainer, llama(), tmp_path, options)
    start = copy.deepcopy(first.model)
    first.train()
    again = dpo(KLDPOTrainer, start, tmp_path, options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and logged(again, "kl") == logged(first, "kl")
    for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make, cls", [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer)])
@pytest.mark.parametrize("settings", [pytest.param("alpha 1", marks=pytest.mark.slow), "bf16, averaged"])
def test_sampling_comes_back_to_the_bit_where_it_generates(settings: str, make: Any, cls: type, tmp_path: Path) -> None:
    placed = {"placement": "reward", "reward": "sequence"} if make is rloo else {}

    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        chosen = {"kl": KLConfig(coef=0.1, **placed), **SETTINGS[settings]}
        return make(cls, llama(), folder, {**SAVED, "num_iterations": 2, "max_steps": 6}, **chosen)

    whole = trainer(tmp_path)
    whole.train()
    for step in (2, 4):  # a rollout is used twice
        again = trainer(tmp_path / str(step))
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert numbers(again) == numbers(whole) and logged(again, "reward") == logged(whole, "reward")
        assert again.reference.fingerprint() == whole.reference.fingerprint()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(refkl.hf.checkpoints.logger, "warning", texts.append)
    return texts


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with four checkpoints; the reference has moved from the second on."""
    folder = tmp_path_factory.mktemp("written")
    dpo_run(folder, sync=SyncConfig(every=2, alpha=0.5)).train()
    return folder / "run"


@pytest.fixture
def run_folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def resume(folder: Path, wanted: str | bool = True, **refkl: Any) -> Any:
    trainer = dpo_run(folder.parent, {"max_steps": 5}, **{"sync": SyncConfig(every=2, alpha=0.5), **refkl})
    trainer.train(resume_from_checkpoint=wanted)
    return trainer


def test_the_newest_whole_checkpoint_is_taken_and_others_are_named(run_folder: Path, warned: list[str]) -> None:
    (run_folder / "checkpoint-4" / MARK).rename(run_folder / "checkpoint-4" / BEGUN)
    (run_folder / "checkpoint-3" / "optimizer.pt").unlink()
    trainer = resume(run_folder)
    assert warned[:2] == [
        f"checkpoint-4 was not written to its end (no {MARK}): it is not resumed from.",
        "checkpoint-3 lacks optimizer.pt: it is not resumed from.",
    ]
    assert [m["step"] for m in trainer.state.log_history if "loss" in m] == [1, 2, 3, 4, 5]
    assert trainer.sync.updates == [{"step": 2, "alpha": 0.5}, {"step": 4, "alpha": 0.5}]


def test_there_is_none(run_folder: Path, tmp_path: Path, warned: list[str]) -> None:
    for checkpoint in run_folder.glob("checkpoint-*"):
        (checkpoint / MARK).unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint in \S+run: checkpoint-4 is not marked .*; checkpoint-3"):
        resume(run_folder)
    with pytest.raises(ValueError, match=r"no whole checkpoint in \S+run, nor any other"):
        resume(tmp_path / "elsewhere" / "run")


def test_one_that_is_named_must_be_whole(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoint-4"
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 lacks optimizer\.pt\. \S+checkpoint-3 is the newest"):
        resume(run_folder, str(checkpoint))
    with pytest.raises(ValueError, match=r"checkpoint-7 is not there\. \S+checkpoint-3 is the newest"):
        resume(run_folder, str(run_folder / "checkpoint-7"))


def damage_gone(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint / "reference")
    return r"lacks reference/reference\.json, which is of its reference\."


def damage_altered(checkpoint: Path) -> str:
    path = checkpoint / "reference" / "reference.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return r"has an altered reference/reference\.safetensors, which is of its reference\."


def damage_record(checkpoint: Path) -> str:
    (checkpoint / "reference.json").unlink()
    return r"lacks reference\.json, which is of its reference\."


@pytest.mark.parametrize("damage", [damage_gone, damage_altered, damage_record], ids=lambda d: d.__name__)
def test_a_run_does_not_start_from_another_reference_unless_asked(damage: Any, run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoint-2"
    message = damage(checkpoint)
    with pytest.raises(ValueError, match=rf"{message} To go on with .* resume_reference='initial'"):
        resume(run_folder, str(checkpoint))
    trainer = resume(run_folder, str(checkpoint), resume_reference="initial")
    # Its schedule begins anew too: of the recorded moves it has made none.
    assert trainer.reference.updates == 1 and trainer.sync.updates == [{"step": 4, "alpha": 0.5}]
    initial = dpo_run(run_folder.parent).reference
    assert trainer.reference.fingerprint() != initial.fingerprint()
    still = resume(run_folder, str(checkpoint), resume_reference="initial", sync=None)
    assert still.reference.fingerprint() == initial.fingerprint()


def test_initial_is_not_needed_where_the_mark_was_not_looked_at(run_folder: Path) -> None:
    """Beneath the mark, the trainer itself does not go on without the weights that the record speaks of."""
    trainer = dpo_run(run_folder.parent, sync=SyncConfig(every=2, alpha=0.5))
    shutil.rmtree(run_folder / "checkpoint-2" / "reference")
    with pytest.raises(ValueError, match=r"had moved 1 times, and its weights \(reference/\) are gone"):
        trainer._load_reference(run_folder / "checkpoint-2")
    (run_folder / "checkpoint-2" / "reference.json").unlink()
    with pytest.raises(ValueError, match=r"has no reference\.json, which says what its reference was"):
        trainer._load_reference(run_folder / "checkpoint-2")


def test_a_checkpoint_of_trls_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(saved(tmp_path))  # TRL reloads it
    dpo(DPOTrainer, model, tmp_path, {**SAVED, "max_steps": 1}).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"was not written by refkl .* resume_reference='initial'"):
        dpo_run(tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        dpo_run(tmp_path, resume_reference="initial").train(resume_from_checkpoint=True)
    trainer = dpo_run(tmp_path, resume_reference="initial")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 4 and logged(trainer, "kl")[0] > 0


def test_unknown_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_reference 'inital'\. Did you mean 'initial'"):
        dpo_run(tmp_path, resume_reference="inital")
    with pytest.raises(ValueError, match="on_checkpoint_error 'ignore'"):
        dpo_run(tmp_path, on_checkpoint_error="ignore")


def config_of(tmp_path: Path, **sections: Any) -> Path:
    torch.manual_seed(0)
    trainer = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    sections = {"sync": {"every": 1, "alpha": 0.5}, "samples": {"prompts": 0}, **sections}
    return write_config(tmp_path, "dpo", trainer=trainer, **sections)


def test_the_command_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    longer = ["--trainer.max_steps", "4"]
    assert main(["train", str(config), *longer, "--trainer.output_dir", str(tmp_path / "whole")]) == 0
    assert main(["train", str(config), "--resume"]) == 2
    assert "no whole checkpoint in" in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(["train", str(config)]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # as a kill leaves it
    assert main(["train", str(config), "--resume", *longer]) == 0
    assert f"resumes from {tmp_path / 'run' / 'checkpoint-2'}" in capsys.readouterr().err
    named = ["--resume", str(tmp_path / "other" / "checkpoint-1"), "--trainer.output_dir", str(tmp_path / "other")]
    assert main(["train", str(config), *named, *longer]) == 0
    assert (tmp_path / "other" / "abandoned-1-checkpoint-2" / MARK).is_file()  # of a course that was given up
    logs = [
        [
            (line["step"], line["loss"], line["kl"])
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for name in ("whole", "run", "other")
    ]
    assert logs[0] == logs[1] == logs[2] and len(logs[0]) == 4
    after = [json.loads((tmp_path / n / "reference.json").read_text())["after"] for n in ("whole", "run", "other")]
    assert len({record["fingerprint"] for record in after}) == 1 and after[1]["updates"] == 4


def test_a_checkpoint_of_another_run_starts_a_run_of_its_own(tmp_path: Path) -> None:
    """What is in the folder that it goes to is not cut short as if it were the run that is resumed."""
    config = config_of(tmp_path)
    for name in ("run", "other"):
        assert main(["train", str(config), "--trainer.output_dir", str(tmp_path / name)]) == 0
    before = (tmp_path / "other" / "metrics.jsonl").read_text()
    named = ["--resume", str(tmp_path / "run" / "checkpoint-1"), "--trainer.output_dir", str(tmp_path / "other")]
    assert main(["train", str(config), *named]) == 0
    assert (tmp_path / "other.1" / "metrics.jsonl").read_text() == before
    steps = [json.loads(line).get("step") for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    assert 1 not in steps and 2 in steps and (tmp_path / "run" / "checkpoint-2").is_dir()


def test_the_command_goes_on_against_another_reference_when_asked(tmp_path: Path) -> None:
    config = config_of(tmp_path, sync=None)
    assert main(["train", str(config)]) == 0
    torch.manual_seed(5)
    model_folder(tmp_path / "another")
    again = [
        "train",
        str(config),
        "--resume",
        "--trainer.max_steps",
        "3",
        "--reference.source",
        str(tmp_path / "another"),
    ]
    assert main(again) == 2
    assert main([*again, "--resume.reference", "initial"]) == 0
    record = json.loads((tmp_path / "run" / "reference.json").read_text())
    assert record["before"]["fingerprint"] == record["after"]["fingerprint"]
    assert record["before"]["source"] == str(tmp_path / "another")


def test_the_command_takes_the_initial_reference_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    assert main(["train", str(config)]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2" / "reference")
    again = ["train", str(config), "--resume", str(tmp_path / "run" / "checkpoint-2"), "--trainer.max_steps", "3"]
    assert main(again) == 2
    assert "--resume.reference initial" in capsys.readouterr().err
    assert main([*again, "--resume.reference", "initial"]) == 0
    record = json.loads((tmp_path / "run" / "reference.json").read_text())
    assert record["after"]["updates"] == 1
    assert main(["train", str(config), "--resume.reference", "initial"]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*again, "--trainer.resume_from_checkpoint", "x"]) == 2
    assert "Leave one out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "checkpoint"),
    [
        ([], None),
        (["--resume"], "newest"),
        (["--resume", "--kl.coef", "0.1"], "newest"),
        (["--resume", "runs/a/checkpoint-2"], "runs/a/checkpoint-2"),
        (["--resume=runs/a/checkpoint-2"], "runs/a/checkpoint-2"),
        (["--resume.checkpoint", "newest"], "newest"),
    ],
)
def test_ways_to_ask(arguments: list[str], checkpoint: str | None, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert parse_run([str(config), *arguments]).config.resume.checkpoint == checkpoint
    values = yaml.safe_load(config.read_text())
    config.write_text(
        yaml.safe_dump({**values, "resume": {"checkpoint": "newest"}, "checkpoint": {"on_error": "stop"}})
    )
    run = parse_run([str(config), *arguments]).config
    assert run.resume.checkpoint == (checkpoint or "newest") and run.checkpoint.on_error == "stop"
