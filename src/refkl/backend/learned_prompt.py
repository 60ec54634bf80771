"""Learned prompts (PEFT's prompt learning): V virtual tokens before the T of a sequence, which only the model sees.

Prompt tuning, p-tuning and similar methods put V embeddings before those of the tokens: the model runs on V + T
positions and returns as many logits. Prefix tuning and cartridges put keys and values of V positions into its cache:
the model runs on T. PEFT extends the attention mask in both cases, and drops position ids in the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from refkl.backend.modules import submodules, unwrap
from refkl.types import TokenBatch

_CACHED = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
OF_PROMPTS = "task_ids"
"""A model input that only PEFT reads, to choose a task's prompt."""


@dataclass(frozen=True)
class Prompt:
    """A learned prompt before each sequence."""

    kind: str
    """PEFT's name: "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", …"""
    tokens: int
    """V, the number of virtual tokens."""
    cached: bool
    """True if it consists of keys and values in the cache instead of embeddings."""

    @property
    def ahead(self) -> int:
        """Number of positions of the model's output before those of the batch."""
        return 0 if self.cached else self.tokens

    def positions(self, positions: Tensor) -> Tensor:
        """Return the positions of all tokens that the model runs on, virtual ones first: [B, T] -> [B, ahead + T]."""
        later = positions + self.tokens
        first = torch.arange(self.ahead, device=later.device, dtype=later.dtype).expand(len(later), -1)
        return torch.cat([first, later], 1)

    def check(self, base: nn.Module, batch: TokenBatch) -> None:
        """Raise ValueError if the prompt, or a model input given with it, would be dropped silently."""
        for name, value in batch.model_inputs.items():
            if isinstance(value, Tensor) and value.shape[:2] == batch.input_ids.shape:
                raise ValueError(
                    f"model_inputs[{name!r}] has a value for each token, but none for the {self.tokens} virtual tokens "
                    f"that {self.kind} puts before them: PEFT drops it, or the model cannot use it. Leave it out."
                )
        # The layers decide this; transformers' property for it has another name in each version.
        checkpointing = any(m.training and getattr(m, "gradient_checkpointing", False) for m in submodules(base))
        if self.cached and checkpointing:
            raise ValueError(
                f"{self.kind} puts its prompt into the model's cache, which gradient checkpointing drops: the policy "
                "would train without its prompt. Call gradient_checkpointing_disable(), or set "
                "trainer.gradient_checkpointing to false."
            )


def learned_prompt(model: nn.Module) -> Prompt | None:
    """Return the prompt that a PEFT policy learns, switched on or off; None for any other adapter or model."""
    inner = unwrap(model)
    if not isinstance(inner, PeftModel) or not inner.active_peft_config.is_prompt_learning:
        return None
    config = inner.active_peft_config
    return Prompt(config.peft_type.value, config.num_virtual_tokens, config.peft_type in _CACHED)


def active_prompt(model: nn.Module) -> Prompt | None:
    """Return the prompt that the next forward uses; None if there is none, or if PEFT's disable_adapter is active."""
    prompt = learned_prompt(model)
    # PEFT marks it in no other way.
    return None if prompt is None or unwrap(model)._adapters_disabled else prompt


@contextmanager
def without_prompt(model: nn.Module) -> Iterator[None]:
    """Switch a learned prompt off while open. Other models are not changed."""
    inner = unwrap(model)
    if active_prompt(model) is None:
        yield
        return
    assert isinstance(inner, PeftModel)
    # PEFT sets the base's methods on the instance, and on exit leaves its own there.
    added = {"forward", "prepare_inputs_for_generation"} - vars(inner).keys()
    try:
        with inner.disable_adapter():
            yield
    finally:
        for name in added & vars(inner).keys():
            delattr(inner, name)
