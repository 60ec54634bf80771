"""Small runs of TRL's trainers, with refkl in them, and what they logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from support.models import byte_tokenizer, llama
from transformers import LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig

from refkl import ScoringConfig

PROMPTS = Dataset.from_dict({"prompt": ["hello", "hi there", "abc", "what"] * 4})


PAIRS = Dataset.from_dict(
    {
        "prompt": ["hello", "hi there", "abc", "what"] * 6,
        "chosen": [" good", "yes!", " fine then"] * 8,
        "rejected": ["bad one", " no", " n"] * 8,
    }
)


LABELLED = Dataset.from_dict(
    {
        "prompt": ["hello", "hi there", "abc", "what"] * 6,
        "completion": [" good", "yes!", " fine then", "bad one", " no", " n"] * 4,
        "label": [True, False, True, True, False] * 4 + [False, True, False, True],
    }
)


COMMON: dict[str, Any] = {
    "report_to": [], "bf16": False, "use_cpu": True, "logging_steps": 1, "gradient_checkpointing": False,
    "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
}  # fmt: skip


def distinct_letters(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 8 for text in completions]


def grpo(cls: type, model: Any, tmp_path: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    args = {**COMMON, "num_generations": 4, "max_completion_length": 8, "max_steps": 3, **(options or {})}
    return cls(
        model,
        args=GRPOConfig(str(tmp_path / "run"), **args),
        processing_class=byte_tokenizer(),
        **{"reward_funcs": distinct_letters, "train_dataset": PROMPTS, **refkl},
    )


def dpo(cls: type, model: Any, tmp_path: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    args = DPOConfig(str(tmp_path / "run"), **{**COMMON, "max_steps": 3, **(options or {})})
    return cls(model, args=args, processing_class=byte_tokenizer(), **{"train_dataset": PAIRS, **refkl})


def rloo(cls: type, model: Any, tmp_path: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    args = {**COMMON, "num_generations": 4, "max_completion_length": 8, "max_steps": 3, **(options or {})}
    return cls(
        model,
        args=RLOOConfig(str(tmp_path / "run"), **args),
        processing_class=byte_tokenizer(),
        **{"reward_funcs": distinct_letters, "train_dataset": PROMPTS, **refkl},
    )


def kto(cls: type, model: Any, tmp_path: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    args = KTOConfig(str(tmp_path / "run"), **{**COMMON, "max_steps": 3, **(options or {})})
    return cls(model, args=args, processing_class=byte_tokenizer(), **{"train_dataset": LABELLED, **refkl})


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if entry.get(key) is not None]


def saved(tmp_path: Path, **overrides: Any) -> str:
    torch.manual_seed(0)
    llama(**overrides).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# SGD: Adam makes a full step of a gradient that is rounding alone, and then other tokens are sampled.
OPTIONS = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 3, "max_grad_norm": 0.0}


class Steps(TrainerCallback):
    """Keeps the gradient of each optimizer step and the weights after it; or sets these, where they are given."""

    def __init__(self, course: list[list[torch.Tensor]] | None = None) -> None:
        self.gradients: list[torch.Tensor] = []
        self.weights: list[list[torch.Tensor]] = []
        self.course = course

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            if self.course is not None:
                for own, given in zip(model.parameters(), self.course[len(self.weights)], strict=True):
                    own.copy_(given)
            self.weights.append([p.detach().clone() for p in model.parameters()])


def train(make: Any, cls: type, folder: str, tmp_path: Path, options: Any, like: Any = None, **refkl: Any) -> Any:
    steps = Steps(None if like is None else like[1].weights)
    policy = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if cls.__module__.startswith("refkl."):  # a batch as TRL has it: rounding, too, is of the same sums
        refkl.setdefault("scoring", ScoringConfig(prefix="off"))
    trainer = make(cls, policy, tmp_path, {**OPTIONS, **options}, callbacks=[steps], **refkl)
    trainer.train()
    return trainer, steps
