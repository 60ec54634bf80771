"""`refkl train` and `refkl export`: what a run leaves behind, and for each wrong input an error that helps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from support.launching import ROOT
from support.models import llama
from support.train_inputs import model_folder, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from refkl.cli import main
from refkl.cli.inputs import load_reward
from refkl.cli.settings import parse_run
from refkl.config import RewardConfig

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_folder_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write_config(tmp_path)), "--kl.coef", "0.25"]) == 0
    run = tmp_path / "run"
    error = capsys.readouterr().err.splitlines()
    assert next(line for line in error if line.startswith("reference:")).startswith("reference: clone: ")
    assert any(line.startswith("finished after 4 steps") and "KL" in line and "reward" in line for line in error)

    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["kl"]["coef"] == 0.25 and resolved["trainer"]["learning_rate"] == 0.01
    metrics = [m for m in lines(run / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert metrics[0]["kl"] == 0.0 and metrics[-1]["kl"] > 0 and "reward" in metrics[0]
    samples = lines(run / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(s, p) for s in (0, 2, 4) for p in ("hello", "hi there")]
    assert samples[0]["completion"] != samples[-1]["completion"]

    reference = json.loads((run / "reference.json").read_text())
    assert reference["status"] == "finished" and reference["before"]["strategy"] == "clone"
    assert reference["before"]["fingerprint"] == reference["after"]["fingerprint"]
    assert samples[0]["kl"] == 0.0 and set(samples[0]["kl_per_token"]) == {0.0} and samples[-1]["kl"] > 0
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "</html>" in (run / "report.html").read_text(encoding="utf-8")
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(trained.model.norm.weight, start.model.norm.weight)


@pytest.mark.parametrize("method", ["rloo", "kto"])
def test_the_other_methods(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As GRPO and DPO: trained, recorded, reported; the KL in the folder is per token, also where TRL's is not."""
    sections: dict[str, Any] = {"kl": {"coef": 0.2}, "trainer": {"max_steps": 3}}
    if method == "rloo":
        sections["kl"] |= {"placement": "reward", "reward": "sequence"}
    assert main(["train", str(write_config(tmp_path, method, **sections))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[0]["kl"] == 0.0 and steps[2]["kl"] != 0.0 and steps[0]["kl/coef"] == 0.2
    assert ("kl/mismatched" in steps[0]) == (method == "kto") and "kl/token" not in steps[0]
    record = json.loads((tmp_path / "run/reference.json").read_text())
    assert record["status"] == "finished" and record["before"]["strategy"] == "clone"
    assert (tmp_path / "run/report.html").is_file()
    assert "nats per token" in capsys.readouterr().err


def test_rloos_own_coefficient_is_not_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "rloo")
    assert main(["train", str(path), "--trainer.beta", "0.05"]) == 2
    assert "trainer.beta 0.05 and kl.coef both set the coefficient" in capsys.readouterr().err


def test_an_earlier_run_of_the_same_name_is_kept(tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer={"max_steps": 1})
    main(["train", str(config)])
    (tmp_path / "run" / "mine.txt").write_text("kept")
    main(["train", str(config)])
    assert (tmp_path / "run.1" / "mine.txt").read_text() == "kept"
    assert len([m for m in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in m]) == 1


def test_sync_is_recorded_with_each_fingerprint(tmp_path: Path) -> None:
    config = write_config(tmp_path, "dpo", sync={"every": 2, "alpha": 0.5})
    assert main(["train", str(config)]) == 0
    reference = json.loads((tmp_path / "run" / "reference.json").read_text())
    assert [u["step"] for u in reference["updates"]] == [2, 4]
    prints = [reference["before"]["fingerprint"], *(u["fingerprint"] for u in reference["updates"])]
    assert len(set(prints)) == 3 and reference["after"]["fingerprint"] == prints[-1]


def test_frozen_modules_do_not_train(tmp_path: Path) -> None:
    config = write_config(tmp_path, "dpo", model={"freeze": ["model.embed_tokens", "model.layers.0"]})
    assert main(["train", str(config)]) == 0
    trained, start = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in ("run/model", "model"))
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert moved and not any(n.startswith(("model.embed_tokens", "model.layers.0.", "lm_head")) for n in moved)


def test_a_quantised_reference_is_recorded_with_its_floor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "dpo", reference={"quantize": "int8"})
    assert main(["train", str(config), "--reference.max_kl_floor", "0.2"]) == 0
    record = json.loads((tmp_path / "run" / "reference.json").read_text())["after"]
    assert record["quantize"] == "int8" and 0 < record["kl_floor"]["mean"] < 0.01
    assert len([r for r in caplog.records if "quantised to int8: a KL below" in r.getMessage()]) == 1
    assert main(["train", str(config), "--reference.max_kl_floor", "1e-9"]) == 2
    assert "but reference.max_kl_floor is 1e-09" in capsys.readouterr().err


def test_supervised_texts_of_three_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The KL is exact unless another is asked for; samples begin with prompts, or as texts do."""
    config = write_config(tmp_path, "sft")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " good"}]
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "completion": ({"prompt": "hello", "completion": " you"}, "hello"),
        "text": ({"text": "one two three four five six seven eight"}, "one two three four five six"),
        "messages": ({"messages": turns}, "<user>hello"),
    }
    for kind, (row, beginning) in kinds.items():
        (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 8)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        assert (
            main(["train", str(config), "--trainer.max_steps", "2", "--trainer.output_dir", str(tmp_path / kind)]) == 0
        )
        steps = [m for m in lines(tmp_path / kind / "metrics.jsonl") if "loss" in m]
        assert steps[0]["kl"] == 0.0 and steps[1]["kl"] > 1e-4 and steps[1]["kl/coef"] == 0.1
        assert {s["prompt"] for s in lines(tmp_path / kind / "samples.jsonl")} == {beginning}
        capsys.readouterr()
        assert main(["check", str(config)]) == 0 and "nothing wrong was found" in capsys.readouterr().out
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["train", str(config)]) == 2
    assert "['prompt', 'completion'], or one of ['text', 'messages']" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_export_merges_lora(method: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, method, peft=LORA, trainer={"learning_rate": 0.05})
    assert main(["train", str(config)]) == 0
    assert json.loads((tmp_path / "run" / "reference.json").read_text())["before"]["strategy"] == "adapter"
    assert main(["export", str(tmp_path / "run"), "--merge", "--output", str(tmp_path / "plain")]) == 0
    ids = torch.arange(2, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    untrained = base(input_ids=ids).logits
    policy = PeftModel.from_pretrained(base, str(tmp_path / "run" / "model"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    before, after = policy(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (after - untrained).abs().max() > 1e-3
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("hello")["input_ids"]


def test_export_of_a_full_run_and_of_an_adapter_as_it_is(tmp_path: Path) -> None:
    assert main(["train", str(write_config(tmp_path, "dpo", trainer={"max_steps": 1}))]) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f).state_dict() for f in ("model", "export"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main(["export", str(tmp_path / "run")]) == 2  # it exists: nothing is written over


def test_export_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert "holds no trained policy" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "unknown key in a section": ({"kl": {"cof": 0.1}}, [], r"'kl\.cof'.*Did you mean 'kl\.coef'"),
    "unknown section": ({"refrence": {}}, [], "Did you mean 'reference'"),
    "unknown trainer field": ({"trainer": {"max_step": 3}}, [], r"Did you mean 'trainer\.max_steps'"),
    "unknown key on the command line": ({}, ["--kl.cof", "1"], r"Did you mean 'kl\.coef'"),
    "value of the wrong kind": ({"kl": {"coef": "much"}}, [], r"kl\.coef"),
    "negative coefficient": ({"kl": {"coef": -1.0}}, [], "rewards drift"),
    "model arguments in the trainer": ({"trainer": {"model_init_kwargs": {"a": 1}}}, [], r"Use model\.init_kwargs"),
    "unknown peft type": ({"peft": {"peft_type": "LORAA"}}, [], "Did you mean 'LORA'"),
    "unknown peft field": ({"peft": {**LORA, "rank": 3}}, [], r"peft\.rank is not a field of LoraConfig"),
    "missing data": ({"data": {"source": "nowhere.jsonl"}}, [], "no file nowhere.jsonl"),
    "missing model": ({"model": {"path": "nowhere"}}, [], r"model\.path 'nowhere' cannot be loaded"),
    "unknown strategy": ({"reference": {"strategy": "clon"}}, [], "Did you mean 'clone'"),
    "a device that is none": (
        {"reference": {"device": "cup"}},
        [],
        r"reference\.device 'cup' is not a device\. Use 'cpu'",
    ),
    "a device that is not here": (
        {"reference": {"strategy": "clone", "device": "cuda:77"}},
        [],
        r"reference\.device is 'cuda:77', but (torch finds no accelerator|this process sees).*[Ll]eave",
    ),
    "freeze that matches nothing": ({"model": {"freeze": ["model.layer.0"]}}, [], r"Did you mean 'model\.layers\.0'"),
    "no reward function": ({"reward": [{"function": "support.train_inputs:leters"}]}, [], "Did you mean 'letters'"),
    "no reward module": ({"reward": [{"function": "no_such:thing"}]}, [], "importing it failed"),
    "too few rewards": ({"reward": [{"function": "support.train_inputs:too_few"}]}, [], "returned 3 rewards for 4"),
    "a reward of NaN": (
        {"reward": [{"function": "support.train_inputs:not_a_number"}]},
        [],
        "returned nan for completion 3",
    ),
    "another backend": ({"launch": {"backend": "zero3"}}, [], "asks for zero3.*gave plain on 1 process"),
    "another number of processes": ({"launch": {"processes": 2}}, [], "asks for 2 processes"),
    "an estimate of texts that are given": (
        {"method": "sft", "kl": {"estimator": "k3"}},
        [],
        r"Use 'exact', or leave kl\.",
    ),
    "a section that is a list": ({"samples": []}, [], r"samples is a section of keys and values, and \[\] was given"),
    "a trainer that is a list": ({"trainer": []}, [], "trainer is a section of keys and values"),
    "null in a field that needs a value": ({"kl": {"coef": None}}, [], r"kl\.coef is null, and it needs a value"),
    "null in a field with choices": ({"reference": {"averages": None}}, [], r"reference\.averages is null"),
    "null for a section": ({"kl": None}, [], "kl is null"),
    "a trainer's field that TRL cannot use": (
        {"trainer": {"accelerator_config": "no.json"}},
        [],
        r"GRPOConfig cannot be made of the section trainer: FileNotFoundError: .*no\.json",
    ),
    "an unknown method": ({"method": "gpro"}, [], "Did you mean 'grpo'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    sections, options, message = WRONG[case]
    assert main(["train", str(write_config(tmp_path, **{"trainer": {"max_steps": 1}, **sections})), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_empty_data_and_missing_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "data.jsonl").write_text("")
    assert main(["train", str(config)]) == 2 and "is empty" in capsys.readouterr().err
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    assert main(["train", str(config)]) == 2 and "needs the columns ['prompt']" in capsys.readouterr().err


def test_a_missing_configuration_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    assert main(["train", str(tmp_path / "confg.yaml")]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main(["tran"]) == 2 and "Did you mean 'train'" in capsys.readouterr().err


def test_the_deepspeed_launchers_rank_is_accepted_before_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["--local_rank=0", "--version"]) == 0 and capsys.readouterr().out == "0.1.0\n"
    assert os.environ.pop("LOCAL_RANK") == "0"


def test_help_says_what_each_key_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["train", "--help"])
    assert exit_status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--kl.coef COEF Coefficient of the KL; under a controller, its initial value." in text
    assert "--trainer.learning_rate" in text


def test_any_key_can_be_overridden(tmp_path: Path) -> None:
    options = {
        "--kl.estimator": "k2", "--sync.every": "7", "--peft.peft_type": "LORA", "--peft.r": "3",
        "--trainer.learning_rate": "3e-4", "--reference.strategy": "clone", "--model.freeze": "[a, b]",
        "--data.limit": "2", "--trainer.output_dir": "elsewhere",
    }  # fmt: skip
    run = parse_run([str(write_config(tmp_path)), *(part for pair in options.items() for part in pair)])
    config = run.config
    assert (config.kl.estimator, config.sync.every, config.sync.settled().alpha) == ("k2", 7, 0.6)
    assert config.peft == {"peft_type": "LORA", "r": 3} and config.model.freeze == ["a", "b"]
    assert (config.reference.strategy, config.data.limit) == ("clone", 2)
    assert (run.trainer["learning_rate"], run.trainer["output_dir"]) == (3e-4, "elsewhere")


def test_a_reward_that_fails_late_leaves_what_was_trained(tmp_path: Path) -> None:
    config = write_config(tmp_path, reward=[{"function": "support.train_inputs:fails_in_its_third_call"}])
    assert main(["train", str(config)]) == 2
    run = tmp_path / "run"
    assert json.loads((run / "reference.json").read_text())["status"] == "failed"
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == [1, 2]
    trained, start = (AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("run/model", "model"))
    assert not torch.equal(trained.model.norm.weight, start.model.norm.weight)


def test_resume_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    checkpoints = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    config = write_config(tmp_path, "dpo", trainer=checkpoints, sync={"every": 2, "alpha": 0.5})
    assert main(["train", str(config)]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = ["--trainer.max_steps", "4", "--trainer.resume_from_checkpoint", checkpoint]
    assert main(["train", str(config), *again]) == 0
    run = tmp_path / "run"
    assert [m["step"] for m in lines(run / "metrics.jsonl") if "loss" in m] == [1, 2, 3, 4]
    reference = json.loads((run / "reference.json").read_text())
    # It went on from the reference as it had been moved; "before" stays what the run began with.
    assert reference["before"]["updates"] == 0 and reference["after"]["updates"] == 2
    assert [u["step"] for u in reference["updates"]] == [2, 4]


def test_rewards_may_abstain_and_are_checked_one_by_one() -> None:
    checked = load_reward(RewardConfig(function="support.train_inputs:letters"))
    assert checked.__name__ == "letters"
    assert checked(completions=["ab", "aa"], prompts=["", ""]) == [0.25, 0.125]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_usable_run_folder(number: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer={"max_steps": 10_000})
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "refkl", "train", str(config)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        process.send_signal(number)
        _, error = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "stopped after" in error
    run = tmp_path / "run"
    record = json.loads((run / "reference.json").read_text())
    assert record["status"] == "stopped" and record["before"]["fingerprint"] == record["after"]["fingerprint"]
    assert (run / "report.png").is_file()
    assert main(["export", str(run)]) == 0


def test_model_folder_is_tiny(tmp_path: Path) -> None:
    """The inputs above are the same model each time: runs are comparable."""
    torch.manual_seed(3)
    one = model_folder(tmp_path / "one")
    torch.manual_seed(3)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(one).lm_head.weight, llama(tie_word_embeddings=True).lm_head.weight
    )
