"""DeepSpeed settings that a launch gives twice: in the trainer's DeepSpeed JSON and in accelerate's configuration.

accelerate refuses a launch that gives both, even if they agree. refkl lets them agree, so that one run configuration
serves `accelerate launch` and `deepspeed`. The JSON is used then, and a difference is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils.deepspeed import HfDeepSpeedConfig

_OF_FILE = "ACCELERATE_CONFIG_DS_FIELDS"
"""Variable with the fields under deepspeed_config in accelerate's YAML. accelerate raises if the JSON also has one of
them."""
_CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_FIELDS: dict[str, tuple[str, str, Any]] = {
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_optimization.stage", 0),
    "offload_optimizer_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "zero_optimization.offload_optimizer.device",
        "none",
    ),
    "offload_param_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "zero_optimization.offload_param.device",
        "none",
    ),
    "offload_optimizer_nvme_path": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
        "zero_optimization.offload_optimizer.nvme_path",
        "none",
    ),
    "offload_param_nvme_path": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
        "zero_optimization.offload_param.nvme_path",
        "none",
    ),
    "zero3_save_16bit_model": (
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        False,
    ),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", 1),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", 0.0),
}
"""accelerate's name of a setting, mapped to its environment variable, its key in the JSON, and its value if the JSON
lacks that key."""
_AUTO = {"gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_clipping": "max_grad_norm"}
"""The trainer's argument that "auto" stands for in the JSON."""


@contextmanager
def given_once(trainer: Mapping[str, Any]) -> Iterator[None]:
    """Let accelerate accept settings that agree, while transformers makes its TrainingArguments from `trainer`.

    Args:
        trainer: the arguments; `deepspeed` is a JSON file's path, or its content.

    Raises:
        ValueError: the two configurations differ; the message lists the differences.
    """
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")
    if trainer.get("deepspeed") is None or not asked:
        yield
        return
    given = trainer["deepspeed"]
    name = given if isinstance(given, str) and len(given) < 300 else "trainer.deepspeed"
    if differences := _differences(HfDeepSpeedConfig(given), trainer, os.environ):
        raise ValueError(
            f"DeepSpeed is configured twice, in accelerate's configuration and in {name} (trainer.deepspeed), and they "
            f"differ: {'; '.join(differences)}. Make them equal, or use accelerate's only: --trainer.deepspeed null."
        )
    fields = os.environ.pop(_OF_FILE, None)
    try:
        yield
    finally:
        if fields is not None:
            os.environ[_OF_FILE] = fields


def _differences(config: HfDeepSpeedConfig, trainer: Mapping[str, Any], env: Mapping[str, str]) -> list[str]:
    """Return a phrase for each setting of accelerate that differs in the JSON. "auto" agrees with any value."""
    file = env.get(_CONFIG_FILE, "none")
    if file != "none" and HfDeepSpeedConfig(file).config != config.config:
        return [f"accelerate's deepspeed_config_file is {file}, with other content"]
    found = []
    for field, (variable, key, absent) in _FIELDS.items():
        ours = config.get_value(key, absent)
        ours = trainer.get(_AUTO.get(field, ""), ours) if ours == "auto" else ours
        theirs = _value(env.get(variable, "auto"))
        if "auto" not in (theirs, ours) and theirs != (absent if ours is None else ours):
            found.append(f"{field} is {theirs} in accelerate's and {ours} in the JSON ({key})")
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and precision != (ours := _precision(config, trainer)):  # "no" means unset
        found.append(
            f"mixed_precision is {precision} in accelerate's and {ours} in the JSON and the trainer's arguments"
        )
    return found


def _precision(config: HfDeepSpeedConfig, trainer: Mapping[str, Any]) -> str:
    enabled = {name: config.get_value(f"{name}.enabled", False) for name in ("bf16", "fp16")}
    return next((name for name, on in enabled.items() if (trainer.get(name) if on == "auto" else on)), "no")


def _value(text: str) -> Any:
    """Parse an environment variable's value as JSON: "3" as 3, "true" as True. Other words stay text."""
    try:
        return json.loads(text.lower())
    except (ValueError, RecursionError):
        return text
