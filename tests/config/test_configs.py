"""Every YAML and JSON that is shipped loads, and says what its name says. test_printed_commands.py trains with each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.launching import ROOT

from refkl import STRATEGIES
from refkl.cli.inputs import import_function, load_data, load_reward
from refkl.cli.settings import parse_run, peft_config
from refkl.config import is_import_path
from refkl.rewards import TASK_SOURCE

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STRATEGY = {
    "quickstart": "adapter",
    "no_kl": "adapter",
    "moving_reference": "adapter",
    "full_finetune": "clone",
    "dpo": "clone",
    "kto": "clone",
    "sft": "clone",
    "rloo": "adapter",
    "offload": "clone",
    "reward_model": "clone",
    "verifiable": "adapter",
} | {name: name for name in ("swap", "zero3", "fsdp2", "shared_trunk")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_run_configs(path: Path) -> None:
    run = parse_run([str(path)])
    config = run.config
    assert config.reference.strategy == STRATEGY[path.stem]
    assert run.trainer["output_dir"] == f"runs/{path.stem}"
    assert is_import_path(config.model.path) and callable(import_function(config.model.path, "model.path"))
    if config.data.source.startswith(TASK_SOURCE):
        data = load_data(config.data, config.method)
        assert [load_reward(r, data).__name__ for r in config.reward] == [config.data.source.removeprefix(TASK_SOURCE)]
    else:
        assert callable(import_function(config.data.source, "data.source"))
        sources = [r.function if r.model is None else r.model for r in config.reward]
        assert all(s is not None and callable(import_function(s, "reward")) for s in sources)
    assert path.read_text().startswith("# ")  # when to use it
    assert (peft_config(config.peft) is not None) == (config.reference.strategy == "adapter")
    # What it says must survive being written and read again, as a run folder does.
    again = yaml.safe_load(run.resolved)
    assert again["kl"]["coef"] == config.kl.coef and again["trainer"]["max_steps"] == run.trainer["max_steps"]


def test_every_strategy_has_a_config() -> None:
    assert set(STRATEGY.values()) == set(STRATEGIES) and {p.stem for p in CONFIGS} == set(STRATEGY)


def test_no_kl_is_the_quickstart_without_its_leash() -> None:
    quickstart, no_kl = (yaml.safe_load((ROOT / f"configs/{n}.yaml").read_text()) for n in ("quickstart", "no_kl"))
    assert quickstart["kl"].pop("coef") > 0 and no_kl["kl"].pop("coef") == 0.0
    quickstart["trainer"].pop("output_dir"), no_kl["trainer"].pop("output_dir")
    assert quickstart == no_kl


@pytest.mark.parametrize("name", ["single", "multi", "fsdp2", "zero2", "zero3"])
def test_accelerate_configs(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"launch/accelerate/{name}.yaml"))
    kind = {"single": "NO", "multi": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[name]
    assert str(config.distributed_type).split(".")[-1] == kind
    assert config.num_processes == (1 if name == "single" else config.num_processes) and config.num_processes >= 1
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_configs(name: str) -> None:
    from transformers.integrations import HfTrainerDeepSpeedConfig

    path = ROOT / f"deepspeed/{name}.json"
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_param" in config["zero_optimization"]) == ("offload" in name)
    assert "train_batch_size" not in config  # zero.Init runs before the process group that "auto" would need
    assert HfTrainerDeepSpeedConfig(str(path)).is_zero3() == name.startswith("zero3")
