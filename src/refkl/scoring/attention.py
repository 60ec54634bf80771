"""Flash and flex attention, and the masks of shared prompts, which these kernels do not know.

transformers looks a model's attention up by its name each time that a layer is called. What it finds there is put
behind a function which leaves tokens under a `SharedMask` to torch's attention, that is to the mask, which computes it
in blocks (shared.py), and everything else to the kernel as before. So it holds for policy and reference alike, and for
what gradient checkpointing computes again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refkl.backend.fsdp import own_class
from refkl.scoring.shared import SharedMask

TORCHS = ("sdpa", "eager")
"""Names of attention that takes masks."""


def no_masks(base: nn.Module) -> str | None:
    """Why a model's attention cannot be given masks of shared prompts; None if it can."""
    config: Any = base.config
    name = config._attn_implementation
    if name in TORCHS:
        return None
    kernel = ALL_ATTENTION_FUNCTIONS.get(name)
    if getattr(kernel, "__wrapped__", kernel) not in (flash_attention_forward, flex_attention_forward):
        return f"its attention is {name!r}; 'sdpa', 'eager', flash and flex attention can"
    kind: Any = own_class(base)
    if not kind._can_set_attn_implementation():
        return f"its code calls {name!r} itself; 'sdpa' and 'eager' can"
    if getattr(config, "attn_logit_softcapping", None):
        return f"its attention {name!r} caps its logits, which torch's does not; 'eager' can"
    if any(hasattr(module, "sinks") for module in base.modules()):
        return f"its attention {name!r} has sinks, which torch's has not; 'eager' can"
    return None


def give_masks(base: nn.Module) -> None:
    """See to it that a model of which `no_masks` says that it can knows masks of shared prompts."""
    config: Any = base.config
    name = config._attn_implementation
    if name not in TORCHS and not hasattr(kernel := ALL_ATTENTION_FUNCTIONS[name], "__wrapped__"):
        AttentionInterface.register(name, _or_mask(kernel))


def _or_mask(kernel: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    @functools.wraps(kernel)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, SharedMask):
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)
        # Norms kept in float32 leave queries and keys in it, which flash attention takes.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)

    return attend
