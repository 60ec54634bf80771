"""Hooks that give a model's attention the masks of shared prompts.

transformers looks a model's attention up by its name each time that a layer is called. What it finds there is put
behind a function which leaves tokens under a `SharedMask` to that mask, which computes their attention in blocks of
torch's (prefix_mask.py), and everything else to what was there before. So flash and flex attention, which take no such
masks, share prompts; keys and values are not copied for each head of the queries, as they are for torch's; and it
holds for what gradient checkpointing computes again, policy and reference alike.
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

from refkl.backend import own_class, submodules
from refkl.scoring.packing.prefix_mask import SharedMask, UnknownAttention

Attention = Callable[..., tuple[Tensor, Any]]
KNOWN = (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
"""Attention functions that are put behind a mask, under whatever name they are found."""
BEYOND = ("softcap", "s_aux", "position_bias")
"""Arguments that attention may be given beside its mask, and that torch's cannot compute."""


def no_masks(base: nn.Module) -> str | None:
    """Why a model's attention cannot be given masks of shared prompts; None if it can."""
    config: Any = base.config
    name = config._attn_implementation
    if name in ("sdpa", "eager"):
        return None
    kernel = ALL_ATTENTION_FUNCTIONS.get(name)
    if getattr(kernel, "__wrapped__", kernel) not in KNOWN:
        return f"its attention is {name!r}; 'sdpa', 'eager', flash and flex attention can"
    kind: Any = own_class(base)
    if not kind._can_set_attn_implementation():
        return f"its code calls {name!r} itself; 'sdpa' and 'eager' can"
    if getattr(config, "attn_logit_softcapping", None):
        return f"its attention {name!r} caps its logits, which torch's does not; 'eager' can"
    if any(hasattr(module, "sinks") for module in submodules(base)):
        return f"its attention {name!r} has sinks, which torch's has not; 'eager' can"
    return None


def give_masks(base: nn.Module) -> None:
    """See to it that the attention of a model, of which `no_masks` says that it can, knows them."""
    config: Any = base.config
    name = config._attn_implementation
    if (kernel := ALL_ATTENTION_FUNCTIONS.get(name)) in KNOWN:
        AttentionInterface.register(name, _or_mask(kernel))


def _or_mask(kernel: Attention) -> Attention:
    @functools.wraps(kernel)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if not isinstance(attention_mask, SharedMask):
            return kernel(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        if beyond := [name for name in BEYOND if kwargs.get(name) is not None]:
            raise UnknownAttention(
                f"{type(module).__name__} gives its attention {', '.join(beyond)}, which a mask that several rows "
                "share a prompt under cannot compute. Pass prefix='off' (scoring.prefix: 'off')."
            )
        # Norms kept in float32 leave queries and keys in it, which flash attention takes.
        query, key = query.to(value.dtype), key.to(value.dtype)
        found = attention_mask.attend(query, key, value, dropout_p=dropout, scale=scaling)
        return found.transpose(1, 2).contiguous(), None

    return attend
