"""Attention functions that accept the masks of shared prompts.

transformers looks up a model's attention function by name at each call of a layer. refkl registers a wrapper under that
name. If the mask is a `SharedMask`, the wrapper lets it compute the attention in blocks with torch's attention
(prefix_mask.py); otherwise the wrapper calls the original function. Prompts are thus shared under flash and flex
attention too, which take no such masks, and keys and values are not copied for each query head, as transformers' "sdpa"
does. The wrapper also applies when gradient checkpointing recomputes a layer, in policy and reference alike.
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
"""Attention functions that get a wrapper, under any name."""
BEYOND = ("softcap", "s_aux", "position_bias")
"""Further arguments of an attention function that torch's attention does not support."""


def no_masks(base: nn.Module) -> str | None:
    """Return why a model's attention cannot take masks of shared prompts; None if it can."""
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
    """Make a model's attention accept masks of shared prompts. `no_masks` has returned None for the model."""
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
                f"{type(module).__name__} passes {', '.join(beyond)} to its attention, which a mask of shared prompts "
                "does not support. Pass prefix='off' (scoring.prefix: 'off')."
            )
        # Norms in float32 return queries and keys in float32, which flash attention accepts and torch's does not.
        query, key = query.to(value.dtype), key.to(value.dtype)
        found = attention_mask.attend(query, key, value, dropout_p=dropout, scale=scaling)
        return found.transpose(1, 2).contiguous(), None

    return attend
