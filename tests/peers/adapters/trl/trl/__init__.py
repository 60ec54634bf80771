"""TRL's names for what refkl computes."""

from trl._absent import absent as __getattr__
from trl.experimental.utils import create_reference_model
from trl.value_head import AutoModelForCausalLMWithValueHead

__all__ = ["AutoModelForCausalLMWithValueHead", "__getattr__", "create_reference_model"]
