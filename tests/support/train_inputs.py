"""Tiny inputs for `refkl train`: a model folder, data files, rewards that go wrong, and a configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from support.models import byte_tokenizer, llama
from transformers import LlamaConfig, LlamaForSequenceClassification

TRAINER: dict[str, Any] = {
    "max_steps": 4,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
}


def letters(completions: list[Any], **columns: Any) -> list[float]:
    """A reward: distinct letters."""
    return [len(set(str(text))) / 8 for text in completions]


seen: list[dict[str, Any]] = []
"""What `watching` was called with."""


def watching(**inputs: Any) -> list[float]:
    """A reward that keeps prompts, completions and columns for a test to look at."""
    seen.append({name: value for name, value in inputs.items() if isinstance(value, list)})
    return [0.0] * len(inputs["completions"])


def too_few(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def not_a_number(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * (len(completions) - 1) + [float("nan")]


def fails_on_rank_1(completions: list[str], **columns: Any) -> list[float]:
    return letters(completions) if os.environ["RANK"] == "0" else columns["column that is not there"]


_calls = iter(range(1, 1000))


def fails_in_its_third_call(completions: list[str], **columns: Any) -> list[float]:
    return letters(completions) if next(_calls) % 3 else [float("inf")] * len(completions)


def model_folder(folder: Path, **overrides: Any) -> Path:
    """A tiny model with its tokenizer."""
    llama(tie_word_embeddings=True, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def config_models(folder: Path) -> Path:
    """Make the tiny models that configs/ can be trained with: `deep`, with as many layers as the files name, `shallow`,
    and `reward`, a classifier."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    for name, layers in (("deep", 30), ("shallow", 2)):
        small = {"num_hidden_layers": layers, "hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.05}
        model_folder(folder / name, **small)
        tokenizer.save_pretrained(folder / name)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **size)
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder / "reward")
    return folder


def write_config(folder: Path, method: str = "grpo", **sections: Any) -> Path:
    """A configuration that trains in seconds; `sections` replace its own."""
    if not (folder / "model").is_dir():
        model_folder(folder / "model")
    if method in ("grpo", "rloo"):
        rows = [{"prompt": text} for text in ("hello", "hi there", "abc", "what")] * 4
        trainer = {**TRAINER, "num_generations": 4, "max_completion_length": 8}
        reward = {"reward": [{"function": "support.train_inputs:letters"}]}
    elif method == "sft":
        rows = [{"prompt": p, "completion": c} for p, c in (("hello", " good"), ("a", "bc"), ("hi", " you"))] * 8
        trainer, reward = dict(TRAINER), {}
    elif method == "kto":
        texts = ((" good", True), (" bad one", False), ("!", True), (" yes it is", True), (" no", False))
        rows = [{"prompt": p, "completion": text, "label": wanted} for text, wanted in texts for p in ("hello", "a b")]
        rows = rows * 2
        trainer, reward = dict(TRAINER), {}
    else:
        rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (("hello", " good", " bad"), ("a", "b", "c"))]
        rows, trainer, reward = rows * 8, dict(TRAINER), {}
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "method": method,
        "model": {"path": str(folder / "model")},
        "data": {"source": str(folder / "data.jsonl")},
        **reward,
        "kl": {"coef": 0.1},
        "samples": {"prompts": 2},
        "trainer": {**trainer, "output_dir": str(folder / "run")},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
