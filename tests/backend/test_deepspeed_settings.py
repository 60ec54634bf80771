"""One configuration for `accelerate launch` and `deepspeed`: settings given twice must agree."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from refkl.backend import given_once

FIELDS = "gradient_accumulation_steps,gradient_clipping,zero_stage,offload_optimizer_device"
LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_CONFIG_DS_FIELDS": FIELDS,
}
"""What accelerate's launcher sets for launch/accelerate/zero3.yaml."""
TRAINER: dict[str, Any] = {
    "deepspeed": "deepspeed/zero3.json",
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "bf16": True,
    "fp16": False,
}


@pytest.fixture(autouse=True)
def _launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)


def test_the_shipped_files_agree_and_accelerate_hears_of_one() -> None:
    with given_once(TRAINER):
        assert "ACCELERATE_CONFIG_DS_FIELDS" not in os.environ
    assert os.environ["ACCELERATE_CONFIG_DS_FIELDS"] == FIELDS


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DEEPSPEED_ZERO_STAGE", "2", "zero_stage is 2 in accelerate's and 3 in the JSON (zero_optimization.stage)"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device is cpu in accelerate's and none in"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device is nvme"),
        ("DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", "/disk", "offload_param_nvme_path is /disk"),
        ("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false", "zero3_save_16bit_model is False"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps is 4 in accelerate's and 2 in the JSON"),
        ("GRADIENT_CLIPPING", "0.5", "gradient_clipping is 0.5 in accelerate's and 1.0 in the JSON"),
        ("MIXED_PRECISION", "fp16", "mixed_precision is fp16 in accelerate's and bf16 in the JSON and the trainer's"),
    ],
)
def test_a_difference_is_refused(variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match="configured twice") as error, given_once(TRAINER):
        pass
    assert words in str(error.value) and "deepspeed/zero3.json" in str(error.value)
    assert "--trainer.deepspeed null" in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "2"),  # "auto" in the JSON: the trainer's
        ("GRADIENT_CLIPPING", "1.0"),
        ("MIXED_PRECISION", "bf16"),
        ("DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", "none"),
    ],
)
def test_the_same_said_twice_is_taken(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with given_once(TRAINER):
        assert "ACCELERATE_CONFIG_DS_FIELDS" not in os.environ  # accelerate would refuse both
    assert os.environ["ACCELERATE_CONFIG_DS_FIELDS"] == FIELDS


def test_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(Path("deepspeed/zero3.json").read_text())
    (tmp_path / "same.json").write_text(json.dumps(config))
    (tmp_path / "other.json").write_text(json.dumps({**config, "gradient_clipping": 0.5}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "same.json"))
    with given_once(TRAINER):
        pass
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="with other content"), given_once(TRAINER):
        pass


@pytest.mark.parametrize("trainer", [{**TRAINER, "deepspeed": None}, {**TRAINER, "deepspeed": "deepspeed/zero2.json"}])
def test_what_is_given_once_is_left_alone(trainer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if trainer["deepspeed"] is not None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")  # another launcher
    with given_once(trainer):
        assert os.environ["ACCELERATE_CONFIG_DS_FIELDS"] == FIELDS
