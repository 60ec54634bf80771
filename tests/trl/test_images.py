"""A policy that sees images: what the processor makes of them reaches policy and reference untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.models import byte_tokenizer
from support.trl_runs import COMMON, logged
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from refkl import KLConfig
from refkl.trl import with_reference

TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
ROWS = 8


def said(role: str, text: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def processor() -> LlavaProcessor:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return LlavaProcessor(
        CLIPImageProcessor(**size), tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token="<image>", chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def policy(tmp_path: Path) -> LlavaForConditionalGeneration:
    """The same one each time, from a folder: TRL loads its reference from there."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=260, num_key_value_heads=2, initializer_range=0.2, **sizes)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=258)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    return LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")


def data(kind: str) -> Dataset:
    noise = torch.Generator().manual_seed(0)
    rows = []
    for at in range(ROWS):
        pixels = (torch.rand(28, 28, 3, generator=noise) * 255).byte().numpy()
        row: dict[str, Any] = {
            "image": Image.fromarray(pixels),
            "prompt": said("user", ["what", "describe it"][at % 2]),
        }
        if kind == "pairs":
            row |= {"chosen": said("assistant", "a " * (at + 1)), "rejected": said("assistant", "bad")}
        if kind == "labels":
            row |= {"completion": said("assistant", "good " * (at % 3 + 1)), "label": at % 2 == 0}
        rows.append(row)
    return Dataset.from_list(rows)


def letters(completions: list[Any], **columns: Any) -> list[float]:
    return [len(set(completion[0]["content"])) / 8 for completion in completions]


SAMPLING = {"reward_funcs": letters}
SIZES = {"num_generations": 2, "max_completion_length": 6}
CASES: dict[str, tuple[Any, Any, str, dict[str, Any], dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, "prompts", SAMPLING, SIZES),
    "rloo": (RLOOTrainer, RLOOConfig, "prompts", SAMPLING, SIZES),
    "dpo": (DPOTrainer, DPOConfig, "pairs", {}, {}),
    "kto": (KTOTrainer, KTOConfig, "labels", {}, {"max_length": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_policy_that_sees_images_is_trained_as_by_trl(name: str, tmp_path: Path) -> None:
    cls, config, kind, own, sizes = CASES[name]
    beta = {"beta": 0.3} if name in ("grpo", "rloo") else {}
    steps, seen = {}, []
    for trainer_class in (cls, with_reference(cls)):
        kl = {}
        options = {**COMMON, **sizes, **beta, "max_steps": 2, "learning_rate": 0.05, "optim": "sgd"}
        if trainer_class is not cls and name == "grpo":
            kl, options["beta"] = {"kl": KLConfig(coef=0.3, gradient="autograd")}, 0.0
        args = config(str(tmp_path / "run"), **options)
        trainer = trainer_class(
            policy(tmp_path), args=args, train_dataset=data(kind), processing_class=processor(), **own, **kl
        )
        if trainer_class is not cls:
            model = trainer.reference.model
            model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append(1))
        trainer.train()
        steps[trainer_class] = logged(trainer, "loss"), logged(trainer, "grad_norm")
    theirs, ours = steps.values()
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6, rel=1e-6)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5) and len(set(ours[1])) == 2
    assert seen
    assert abs(logged(trainer, "kl/sequence")[1]) > 1e-5
