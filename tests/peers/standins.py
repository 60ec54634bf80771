"""Models in the place of those that TRL's tests load from the hub: of the same kinds, tiny, with random weights.

Their folders have the hub's names, and the tests run beside them, so that nothing is patched: `from_pretrained` takes a
folder where there is one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from support.models import gpt2, llama

HUB = "trl-internal-testing"


def make(folder: Path) -> None:
    """FOLDER/trl-internal-testing/NAME of each."""
    torch.manual_seed(0)
    gpt2().save_pretrained(folder / HUB / "tiny-GPT2LMHeadModel")
    base = llama()
    base.save_pretrained(folder / HUB / "tiny-base")
    for name in ("tiny-PeftModel", "tiny-PeftModel-2"):
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = f"{HUB}/tiny-base"
        adapted.save_pretrained(folder / HUB / name, save_embedding_layers=False)
        base = adapted.unload()
